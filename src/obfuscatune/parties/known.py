"""What a party has seen of an enclave's membership, kept in its folder, and compared at every connection.

    FOLDER/members-FINGERPRINT.jsonl    the chain of memberships of that enclave, a signed change a line (`membership`)

An enclave whose chain does not go on from the one that is kept was put back, or there are two of it.
"""

import logging
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.durable import rename, write_new
from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, ProtocolError, RollbackError
from obfuscatune.parties.change import SignedChange
from obfuscatune.parties.channel.client import AttestedChannel
from obfuscatune.parties.files import read_small
from obfuscatune.parties.membership import MAX_CHAIN_BYTES, Membership, follow

logger = logging.getLogger(__name__)
_HINT = "keep the file: the enclave's state was put back, or there are two of it; talk to the others"


@dataclass(frozen=True)
class Members:
    """The membership of an enclave as it told it, checked.

    Attributes:
        membership: who is in. chain: how it came to be, oldest first. is_open: the operator's directory still says who
            is in, until the first job.
    """

    membership: Membership
    chain: tuple[SignedChange, ...]
    is_open: bool


def members_of(channel: AttestedChannel) -> Members:
    """Return an enclave's membership, its whole chain checked; raises as `follow`, and ProtocolError."""
    lines, is_open = _fetch(channel, 0)
    return _members(lines, channel.enclave.fingerprint, is_open=is_open)


def compare(channel: AttestedChannel, folder: Path) -> None:
    """Compare the membership that an enclave is under with what the folder knows of it; keep and tell what is new.

    Raises:
        RollbackError: not the one that is known, and no continuation of it. ObfuscatuneError: it cannot be kept.
    """
    with _KEEPING:
        _compare(channel, folder)


_KEEPING = threading.Lock()  # `connect` asks from several threads, and they keep one file


def _compare(channel: AttestedChannel, folder: Path) -> None:
    enclave = channel.enclave.fingerprint
    path = folder / f"members-{enclave[:16]}.jsonl"
    known = read_small(path, 2 * MAX_CHAIN_BYTES, "known memberships").splitlines() if path.exists() else []
    before = follow(known, enclave)
    if channel.members is None:
        if before is not None:
            raise RollbackError("the enclave says that nobody was admitted yet", where=str(path), hint=_HINT)
        return
    number, digest = channel.members
    if before is not None and (before.number, before.digest) == (number, digest):
        return
    if before is not None and before.number >= number:
        what = "an older membership than the one that you know" if before.number > number else "another membership"
        got, expected = f"{number} {digest[:16]}", f"{before.number} {before.digest[:16]}"
        raise RollbackError(f"the enclave is under {what}", got=got, expected=expected, where=str(path), hint=_HINT)
    lines, is_open = _fetch(channel, len(known))
    try:
        after = follow(lines, enclave, before)
    except (ConsentError, FormatError) as error:  # what is no change at all does not go on from it either
        raise RollbackError(
            f"the membership is no continuation of the one that you know: {error.what}", where=str(path), hint=_HINT
        ) from None
    if is_open or after is None or after.number < number:
        raise ProtocolError("enclave tells another membership than it is under")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # its own: other commands may keep the same now
    try:
        write_new(beside, b"".join(line + b"\n" for line in [*known, *lines]))
        rename(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ObfuscatuneError("cannot keep the membership", got=error.strerror, where=str(path)) from None
    for line in lines:
        change = SignedChange.from_bytes(line).change
        logger.warning("membership %d: %s", change.number, change)


def _members(lines: list[bytes], enclave: str, *, is_open: bool) -> Members:
    now = follow(lines, enclave)
    if now is None:
        raise ProtocolError("enclave without a membership")
    return Members(now, tuple(map(SignedChange.from_bytes, lines)), is_open)


def _fetch(channel: AttestedChannel, start: int) -> tuple[list[bytes], bool]:
    """Return the lines of an enclave's chain from one on, unchecked, and whether the membership is open."""
    lines: list[bytes] = []
    size = 0
    while True:
        reply, page = channel.request({"op": "members", "start": start + len(lines)})
        size += len(page)
        count, is_open = reply.get("changes"), reply.get("open")
        if type(count) is not int or is_open not in (0, 1) or size > 2 * MAX_CHAIN_BYTES:
            raise ProtocolError("enclave's reply is no membership")
        found = page.splitlines()
        lines += found
        if start + len(lines) >= count:
            return lines, bool(is_open)
        if not found:
            raise ProtocolError("enclave's membership has an end before its end")
