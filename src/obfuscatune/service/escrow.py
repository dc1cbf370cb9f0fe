"""The state on the disk of a platform without a sealing key, under a key that all parties release together.

    DIRECTORY/escrow.sealed = canonical JSON of {"box", "enclave", "format", "nonce", "shares": {fingerprint: base64}}

    key K      = XOR of the shares, one of 32 random bytes for each party that ever was a member
    share      = HPKE(the party's identity, info = canonical JSON of format, enclave, party)
    box        = AES-256-GCM(K, nonce of 12 random bytes, state, associated data = canonical JSON of enclave and shares)

Any number of shares but all of them are uniformly random and tell nothing. K is another one after each change of
membership and each start. The state goes to an enclave that every party has verified, as a hand-over goes (`handover`):
what it had opens there, and nothing is sealed to its keys any more.

Nothing here tells the last state from an older one, or whether the enclave of before still runs: that is for the
parties to judge before they release. They see it in the audit log.
"""

import base64
import hmac
import logging
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from obfuscatune.durable import rename, write_private
from obfuscatune.errors import ConsentError, FormatError, SealError, StorageError, UsageError
from obfuscatune.parties.canonical import decode, encode, unbase64
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.upgrade import SHARE_BYTES, certify, share_info, signers
from obfuscatune.parties.vocabulary import is_digest
from obfuscatune.service.handover import EARLIER, NAMES, Taken
from obfuscatune.service.members import chains
from obfuscatune.service.state import MAX_BYTES, State

logger = logging.getLogger(__name__)
FORMAT = "obfuscatune escrow 1"
FILE = "escrow.sealed"
REVOKED = "a party has revoked its identity: the state is kept in escrow no more, and is lost when this enclave stops"
NO_STATEMENT = "0" * 64  # in the certificate: the parties have released it, and signed no upgrade
_NAMES = {"box", "enclave", "format", "nonce", "shares"}


class Escrow:
    """Keeps the state of a running enclave on the disk; call :meth:`write` after each commit, under the state's lock.

    Args:
        state: of a platform without a sealing key. directory: of the enclave.
    """

    def __init__(self, state: State, directory: Path) -> None:
        self._state, self._path = state, directory / FILE
        self._key, self._shares, self._for = b"", dict[str, str](), [""]

    def write(self) -> None:
        """Write the state as it is, whole or not at all; nothing while the membership is open, or once handed over.

        Raises:
            StorageError: the disk refuses. FormatError: a party's sealing key is none, so it could release nothing.
        """
        state = self._state
        try:
            if state.handed:
                self._path.unlink(missing_ok=True)
                return
            if not state.members:
                return
            if self._for != state.members:
                self._split()
            if not self._shares:  # nobody could ever release the share of an identity that was revoked
                self._path.unlink(missing_ok=True)
                return
            fields = {name: value for name, value in state.fields().items() if name in NAMES}
            enclave, nonce = state.identity.public.fingerprint, os.urandom(12)
            box = AESGCM(self._key).encrypt(nonce, encode(fields), _associated(enclave, self._shares))
            record = {"enclave": enclave, "format": FORMAT, "shares": self._shares, "box": _text(box)}
            beside = self._path.with_suffix(".new")
            write_private(beside, encode({**record, "nonce": _text(nonce)}))
            rename(beside, self._path)
        except OSError as error:
            raise StorageError("cannot write the state", got=error.strerror, where=str(self._path)) from None

    def _split(self) -> None:
        enclave = self._state.identity.public.fingerprint
        found = set(signers([each for each in chains(self._state) if each is not None]).values())
        parties = [party for party in found if party is not None]
        if None in found or not parties:
            logger.warning("%s", REVOKED)
            self._key, self._shares, self._for = b"", {}, list(self._state.members)
            return
        key, shares = bytes(SHARE_BYTES), dict[str, str]()
        for party in parties:
            share = os.urandom(SHARE_BYTES)
            key = _xor(key, share)
            shares[party.fingerprint] = _text(party.wrap(share, share_info(enclave, party.fingerprint)))
        # All at once: a party whose sealing key is none ends the loop, and those before it would be all who release.
        self._key, self._shares, self._for = key, shares, list(self._state.members)


class Recovery:
    """Collects the shares of a state that an enclave has left on the disk; it is read when they are all there.

    Args:
        directory: of the new enclave, with ``escrow.sealed`` of the old one in it. identity: the new enclave's.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._path, self._identity = directory / FILE, identity
        self._released: dict[str, bytes] = {}
        self._file: bytes = b""

    @property
    def waits(self) -> bool:
        """Whether there is a state to be released."""
        return self._path.is_file()

    def share(self, party: PublicIdentity) -> tuple[dict[str, Any], bytes]:
        """Return the enclave of the state, and a party's share as it is sealed to it.

        Raises:
            UsageError: there is no such file. ConsentError: no share for this party.
        """
        record = self._read()
        if party.fingerprint not in record["shares"]:
            raise ConsentError("no share of this state is yours")
        return {"enclave": record["enclave"]}, unbase64(record["shares"][party.fingerprint], "share")

    def release(self, party: PublicIdentity, share: bytes) -> tuple[Taken | None, list[str]]:
        """Take a party's share; return the state once all are there, or else the fingerprints that lack.

        The shares stay until :meth:`forget`: where what goes with the state is not on the disk yet, one party asks
        again, and not all of them.

        Raises:
            SealError: the shares do not open the file: one is of another state, or it was changed. All are forgotten.
        """
        record = self._read()
        if party.fingerprint not in record["shares"] or len(share) != SHARE_BYTES:
            raise ConsentError("no share of this state is yours")
        self._released[party.fingerprint] = share
        lacking = sorted(set(record["shares"]) - set(self._released))
        if lacking:
            return None, lacking
        key = bytes(SHARE_BYTES)
        for name in record["shares"]:
            key = _xor(key, self._released[name])
        return self._open(record, key), []

    def forget(self) -> None:
        """Forget the shares: the state was taken over."""
        self._released = {}

    def _open(self, record: dict[str, Any], key: bytes) -> Taken:
        problem: SealError | None = None
        plain = b""
        try:
            nonce, box = unbase64(record["nonce"], "escrow"), unbase64(record["box"], "escrow")
            plain = AESGCM(key).decrypt(nonce, box, _associated(record["enclave"], record["shares"]))
        except (InvalidTag, ValueError):
            hint = "a share of another state, or the file was changed; all release again"
            problem = SealError("the shares do not open the state", hint=hint)
            self.forget()  # which of them is wrong nobody can tell
        if problem is not None:
            raise problem
        fields = decode(plain, "state of an escrow", max_bytes=MAX_BYTES)
        if set(fields) not in (NAMES, EARLIER):
            raise FormatError("state of an escrow has other fields")
        old = Identity.from_bytes(base64.b64decode(fields["identity"]), "identity of an escrow")
        if old.public.fingerprint != record["enclave"]:
            raise SealError("an escrow of another enclave's state")
        return Taken(fields, old, certify(old, self._identity.public, NO_STATEMENT))

    def _read(self) -> dict[str, Any]:
        """Return the record of the file; shares of another file are forgotten, since the host may exchange it."""
        if not self.waits:
            hint = f"the operator copies {FILE}, log.jsonl and store/ of the old enclave into the new one's directory"
            raise UsageError("there is no state to be released here", hint=hint)
        data = read_small(self._path, 2 * MAX_BYTES, "escrow")
        record = decode(data, "escrow", max_bytes=2 * MAX_BYTES)
        shares = record.get("shares")
        if set(record) != _NAMES or record["format"] != FORMAT or not is_digest(record["enclave"]):
            raise FormatError("escrow is none", expected=FORMAT)
        if not isinstance(shares, dict) or not shares or not all(map(is_digest, shares)):
            raise FormatError("shares of an escrow", expected="by fingerprint")
        if not hmac.compare_digest(data, self._file):
            self._released, self._file = {}, data
        return record


def _associated(enclave: str, shares: dict[str, str]) -> bytes:
    return encode({"enclave": enclave, "format": FORMAT, "shares": shares})


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
