"""What the data key of a sealed file is, who gets it, and what is derived from it.

    entry       = HPKE(recipient's key, data key, info = canonical JSON of format, id, kind, recipient, sender)
    commitment  = HKDF-SHA256(data key, salt = id,          info = "obfuscatune sealed file commitment 1")
    payload key = HKDF-SHA256(data key, salt = header hash, info = "obfuscatune sealed file payload 1")
    nonce       = chunk's number, u64 little-endian || 000000 || 01 for the last chunk, 00 for every other

The data key is 32 random bytes, fresh for each file, so a nonce never meets the same payload key twice. The commitment
is there because GCM is not committing: a sender could make chunks that decrypt to one text under one recipient's key
and to another under another's, and both would hold the same digest in their hands.
"""

import hmac
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.errors import SealError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.sealed.fields import FORMAT, Header, Recipient

DATA_KEY_BYTES = 32
_NONCE = struct.Struct("<Q3xB")


def wrap_key(data_key: bytes, recipient: PublicIdentity, *, file_id: bytes, kind: str, sender: str) -> Recipient:
    """Return the entry by which ``recipient`` gets ``data_key``; ``sender`` is a fingerprint.

    Raises:
        FormatError: the recipient's key is none that can be sealed to.
    """
    fingerprint = recipient.fingerprint
    return Recipient(fingerprint, recipient.wrap(data_key, _info(file_id, kind, sender, fingerprint)))


def unwrap_key(header: Header, identity: Identity) -> bytes:
    """Return the data key of a file that is sealed to ``identity``. Secret.

    Raises:
        SealError: no entry for this identity, a changed entry, or another key than the one committed to.
    """
    own = identity.public.fingerprint
    entry = next((recipient for recipient in header.recipients if recipient.fingerprint == own), None)
    if entry is None:
        raise SealError(
            "not sealed to this identity",
            got=f"{identity.public.name} ({own[:16]}...)",
            expected=", ".join(f"{recipient.fingerprint[:16]}..." for recipient in header.recipients),
        )
    info = _info(header.id, header.kind, header.sender.fingerprint, own)
    data_key = identity.unwrap(entry.wrapped_key, info)
    if len(data_key) != DATA_KEY_BYTES or not hmac.compare_digest(commitment(data_key, header.id), header.commitment):
        raise SealError("the key sealed to this identity is not the one that the sender committed to")
    return data_key


def commitment(data_key: bytes, file_id: bytes) -> bytes:
    """Return the 32 public bytes that fix ``data_key`` and tell nothing else of it."""
    return _derive(data_key, file_id, b"commitment")


def payload_cipher(data_key: bytes, header_hash: bytes) -> AESGCM:
    """Return AES-256-GCM under the payload key: bound to every byte of the header."""
    return AESGCM(_derive(data_key, header_hash, b"payload"))


def chunk_nonce(index: int, chunks: int) -> bytes:
    """Return the 12 bytes of chunk ``index`` of ``chunks``: no chunk can take another's place, nor end the payload."""
    return _NONCE.pack(index, index == chunks - 1)


def _derive(data_key: bytes, salt: bytes, purpose: bytes) -> bytes:
    info = b"obfuscatune sealed file " + purpose + b" 1"
    return HKDF(SHA256(), 32, salt=salt, info=info).derive(data_key)


def _info(file_id: bytes, kind: str, sender: str, recipient: str) -> bytes:
    return encode({"format": FORMAT, "id": file_id.hex(), "kind": kind, "recipient": recipient, "sender": sender})
