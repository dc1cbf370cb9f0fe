"""A new enclave that waits for the state of another (`handover`, `escrow`): it serves nothing else until it has it."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from obfuscatune.errors import BusyError, ConsentError, ObfuscatuneError, ProtocolError, UsageError
from obfuscatune.parties.attestation.platform import Platform
from obfuscatune.parties.channel.server import AttestedServer
from obfuscatune.parties.channel.transfer import Piece
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.service.escrow import Recovery
from obfuscatune.service.handover import MAX_BUNDLE_BYTES, Taken, open_bundle
from obfuscatune.service.log import AuditLog
from obfuscatune.service.members import Members
from obfuscatune.service.records import JobFiles, Record
from obfuscatune.service.state import State

logger = logging.getLogger(__name__)
_COPY = "the operator copies store/ and log.jsonl of the old enclave's directory into the new one's; then ask again"
_MAX_PARTS_BYTES = 4 * MAX_BUNDLE_BYTES  # of all parties together: a true state is rarely a tenth of the most
_ANSWER_SECONDS = 10.0  # that the last reply may take before the server is closed


class TakeOver:
    """Answers whoever brings the state, in pieces; no party spoils what another brings.

    Args:
        state: new. directory: where store and log of the old enclave must be by then.
        old: its fingerprint. Else anybody who may connect could bring a state of his own making, and the real one would
            find its place taken.
    """

    def __init__(self, state: State, directory: Path, old: str) -> None:
        self._state, self._directory, self._old = state, directory, old
        self._parts: dict[str, tuple[int, bytearray]] = {}  # by party: the announced size, and what has come
        self._lock = threading.Lock()
        self._recovery = Recovery(directory, state.identity)
        self.taken = threading.Event()

    def handle(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """Answer one request. Raises ObfuscatuneError: what the party is told."""
        with self._lock:
            if fields.get("op") == "former":
                return certificates(self._state)
            if fields.get("op") == "share":
                return self._recovery.share(party)
            if fields.get("op") == "release":
                return self._release(party, payload)
            if fields.get("op") != "take_over":
                if self._recovery.waits:
                    what, verb = "this enclave waits until all parties have released a state", "release"
                else:
                    what, verb = "this enclave waits for a hand-over", "hand-over"
                raise ConsentError(what, hint=f"obfuscatune party {verb}")
            piece = Piece.of(fields, payload, max_bytes=MAX_BUNDLE_BYTES)
            data = self._add(party.fingerprint, piece)
            if piece.is_last:
                del self._parts[party.fingerprint]
                self._take(open_bundle(data, self._state.identity))
            return {}, b""

    def _add(self, party: str, piece: Piece) -> bytes:
        """Return what a party has sent, with a piece more. Beyond `_MAX_PARTS_BYTES` in all the longest file goes."""
        size, data = (piece.size, bytearray()) if piece.offset == 0 else self._parts.get(party, (0, bytearray()))
        if (len(data), size) != (piece.offset, piece.size):
            raise ProtocolError("piece does not follow the one before", got=piece.offset, expected=len(data))
        data += piece.data
        self._parts[party] = (size, data)
        while sum(len(each) for _, each in self._parts.values()) > _MAX_PARTS_BYTES:
            longest = max(self._parts, key=lambda name: self._parts[name][0])
            del self._parts[longest]
            if longest == party:
                raise BusyError("no room for so long a state beside those of others", hint="ask again")
        return bytes(data) if piece.is_last else b""

    def _release(self, party: PublicIdentity, share: bytes) -> tuple[dict[str, Any], bytes]:
        taken, lacking = self._recovery.release(party, share)
        if taken is not None:
            self._take(taken)
            self._recovery.forget()
        return {"lacking": lacking}, b""

    def _take(self, taken: Taken) -> None:
        came = taken.old.public.fingerprint
        if came != self._old:
            raise ConsentError("this enclave waits for another one's state", got=came[:16], expected=self._old[:16])
        self._check_disk(taken.fields["jobs"], *taken.log)
        with self._state.lock:
            if self.taken.is_set():
                return
            before = (self._state.former, self._state.jobs, self._state.members)
            counts = (self._state.uses, self._state.forgotten)
            log = (self._state.log_head, self._state.log_length)
            taken.adopt(self._state)
            try:
                self._state.commit()
            except BaseException:
                self._state.former, self._state.jobs, self._state.members = before
                self._state.uses, self._state.forgotten = counts
                self._state.log_head, self._state.log_length = log
                raise
            self.taken.set()

    def _check_disk(self, jobs: dict[str, Any], head: str, length: int) -> None:
        """Check that what the state needs is on the disk, before the state is taken: on TDX there is no second try."""
        path = self._directory / "log.jsonl"
        try:
            if not path.exists():
                raise UsageError("the audit log of the old enclave is not here", where=str(path), hint=_COPY)
            AuditLog.open(path, head, length).close()
        except ObfuscatuneError as error:
            raise UsageError(error.what, got=error.got, expected=error.expected, hint=_COPY) from None
        store = self._directory / "store"
        if not (store / "jobs").is_dir():  # and it is not made here: `cp -r store` would copy into it
            raise UsageError("the store of the old enclave is not here", where=str(store), hint=_COPY)
        files, lost = JobFiles(store / "jobs"), 0
        for digest, fields in jobs.items():
            record = Record.from_fields(fields)
            if record.retired or record.status == "deleted":
                continue
            named = [*record.results.values(), *([record.checkpoint] if record.checkpoint else [])]
            lost += files.read(digest) is None
            lost += sum(not (store / f"{name}.sealed").is_file() for name in named)
        if lost:
            raise UsageError("sealed files of the old enclave are not here", got=f"{lost} missing", hint=_COPY)


def certificates(state: State) -> tuple[dict[str, Any], bytes]:
    """Return the reply to ``former``: the certificates of enclaves that have handed over to this one, a line each."""
    return {}, b"".join(each["certificate"].encode() + b"\n" for each in state.former)


def wait_for_hand_over(
    state: State,
    directory: Path,
    platform: Platform,
    *,
    listen: str,
    parties: Path,
    operator: PublicIdentity | None,
    old: PublicIdentity,
    waiting: Callable[[str], None],
) -> None:
    """Serve until a state was taken over and committed; return at once where that was so at an earlier start.

    Args:
        state: of the new enclave. directory: its own. old: whose state it is. listen, parties, operator: as of
            `open_service`. waiting: called with the address once it listens.
    """
    if state.former or state.members or state.jobs:
        return
    members, taking = Members(state, parties, operator), TakeOver(state, directory, old.fingerprint)
    server = AttestedServer(
        listen,
        identity=state.identity,
        attester=platform.attester,
        allow=members.allows,
        handle=taking.handle,
    )
    thread = threading.Thread(target=server.serve_forever, name="hand-over", daemon=True)
    thread.start()
    try:
        waiting(server.address)
        taking.taken.wait()
        server.drain(_ANSWER_SECONDS)  # the reply that tells that it is done
    finally:
        server.close()
        thread.join(_ANSWER_SECONDS)
    logger.info("the state was taken over")
