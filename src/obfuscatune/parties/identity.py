"""An identity: the key pair by which a party signs, and the one to which others seal.

The public half is a small file to hand around, known by its fingerprint; compare that over a second channel. The
secret half is a file of mode 0600 that its owner never gives away. An enclave has an identity too, attested instead of
compared.

Signatures are Ed25519 (RFC 8032) over ``"obfuscatune <context> 1" || 0x00 || message``: a signature made for one
purpose is none for another. Sealing keys are HPKE's (RFC 9180): X25519 together with ML-KEM-768 (X-Wing), or X25519
alone.
"""

import base64
import functools
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from obfuscatune.errors import FormatError, SealError, UsageError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.files import read_small
from obfuscatune.parties.passphrase import FORMAT as LOCKED
from obfuscatune.parties.passphrase import known_passphrase, lock, unlock

SuiteName = Literal["mlkem768-x25519", "x25519"]
SUITES: tuple[SuiteName, ...] = ("mlkem768-x25519", "x25519")
FORMAT = "obfuscatune identity 1"
ENCLAVE = "enclave"  # the name of each enclave's own identity: a party of this name would be taken for one
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_BYTES = 16_384
_PUBLIC_BYTES = {"mlkem768-x25519": 1184 + 32, "x25519": 32}
_SECRET_BYTES = {"mlkem768-x25519": 64 + 32, "x25519": 32}


@dataclass(frozen=True)
class PublicIdentity:
    """Who a party is: name, Ed25519 key (32 bytes), HPKE suite and key. Public; equal where all of it is."""

    name: str
    signing_key: bytes
    suite: SuiteName
    sealing_key: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical form, as 64 hex digits: what people compare, and what jobs and files name."""
        return hashlib.sha256(encode(self.to_dict())).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical fields."""
        return {
            "format": FORMAT,
            "name": self.name,
            "sealing_key": base64.b64encode(self.sealing_key).decode(),
            "signing_key": base64.b64encode(self.signing_key).decode(),
            "suite": self.suite,
        }

    @classmethod
    def from_dict(cls, fields: Any, what: str = "identity") -> "PublicIdentity":
        """Return the identity of ``fields``.

        Raises:
            FormatError: other fields, another format, or keys of a wrong size.
        """
        names = {"format", "name", "sealing_key", "signing_key", "suite"}
        if isinstance(fields, dict) and fields.get("format") in (f"{FORMAT} secret", LOCKED):
            hint = "NAME.pub is the file to give; if NAME.key has left its owner's machine: obfuscatune party rotate"
            raise FormatError(f"{what} is a secret key, where a public identity belongs", hint=hint)
        if not isinstance(fields, dict) or set(fields) != names or fields["format"] != FORMAT:
            raise FormatError(f"{what} is no public identity of this version", expected=FORMAT)
        name, suite = fields["name"], fields["suite"]
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise FormatError(f"{what} has no usable name", expected="letters, digits, '.', '_' and '-', at most 64")
        if suite not in SUITES:
            raise FormatError(f"{what} has an unknown sealing suite", expected=" or ".join(SUITES))
        signing = _decode_bytes(fields["signing_key"], 32, f"{what}'s signing key")
        sealing = _decode_bytes(fields["sealing_key"], _PUBLIC_BYTES[suite], f"{what}'s sealing key")
        return cls(name, signing, suite, sealing)

    @classmethod
    def load(cls, path: Path) -> "PublicIdentity":
        """Read a public identity file; raises UsageError where it cannot be read, FormatError where it is none."""
        data = read_small(path, _MAX_BYTES, "identity file")
        return cls.from_dict(decode(data.rstrip(b"\n"), f"identity file {path}"), f"identity file {path}")

    def verify(self, signature: bytes, context: str, message: bytes) -> bool:
        """Return whether this identity signed ``message`` for ``context``."""
        try:
            Ed25519PublicKey.from_public_bytes(self.signing_key).verify(signature, _signed(context, message))
        except (InvalidSignature, ValueError):
            return False
        return True

    @property
    def can_be_sealed_to(self) -> bool:
        """Whether its sealing key is one: bytes of the right size may still be none, and its maker may mean it so."""
        return _is_key(self.suite, self.sealing_key)

    def wrap(self, data: bytes, info: bytes) -> bytes:
        """Return ``data`` (small: a data key) under HPKE for this identity; ``info`` binds its context.

        Raises:
            FormatError: the sealing key has the right size but is none.
        """
        try:
            return _suite(self.suite).encrypt(data, _public_key(self.suite, self.sealing_key), info=info)
        except ValueError:
            raise FormatError(f"identity {self.name} has a sealing key that is none") from None


@dataclass(frozen=True, repr=False)
class Identity:
    """The secret half. Never leaves its owner; no ``repr`` and no error shows any of it."""

    public: PublicIdentity
    _signing: Ed25519PrivateKey = field(compare=False)
    _sealing: Any = field(compare=False)
    _secret: bytes = field(compare=False)

    def __repr__(self) -> str:
        return f"Identity({self.public.name!r}, {self.public.fingerprint[:16]}...)"

    @classmethod
    def generate(cls, name: str, suite: SuiteName = "mlkem768-x25519") -> "Identity":
        """Return a new identity, from the system's generator."""
        if not _NAME.fullmatch(name):
            raise UsageError("name of an identity", got=repr(name), expected="letters, digits, '.', '_', '-'")
        if suite not in SUITES:
            raise UsageError("sealing suite", got=repr(suite), expected=" or ".join(SUITES))
        return cls._from_secret(name, suite, os.urandom(32 + _SECRET_BYTES[suite]))

    @classmethod
    def _from_secret(cls, name: str, suite: SuiteName, secret: bytes) -> "Identity":
        signing = Ed25519PrivateKey.from_private_bytes(secret[:32])
        x25519 = X25519PrivateKey.from_private_bytes(secret[-32:])
        public_bytes = x25519.public_key().public_bytes_raw()
        sealing: Any = x25519
        if suite == "mlkem768-x25519":
            mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[32:96])
            public_bytes = mlkem.public_key().public_bytes_raw() + public_bytes
            sealing = MLKEM768X25519PrivateKey(mlkem, x25519)
        public = PublicIdentity(name, signing.public_key().public_bytes_raw(), suite, public_bytes)
        return cls(public, signing, sealing, secret)

    def to_bytes(self) -> bytes:
        """Return the secret file's content. Secret: for the owner's disk, or sealed, and for nothing else."""
        secret = base64.b64encode(self._secret).decode()
        return encode({"format": f"{FORMAT} secret", "public": self.public.to_dict(), "secret": secret})

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Identity":
        """Return the identity of a secret file's content; raises FormatError, without any of it in the message."""
        fields = decode(data.rstrip(b"\n"), what, max_bytes=_MAX_BYTES)
        if set(fields) != {"format", "public", "secret"} or fields["format"] != f"{FORMAT} secret":
            raise FormatError(f"{what} is no secret identity", hint="it is the file NAME.key of `identity new`")
        public = PublicIdentity.from_dict(fields["public"], what)
        secret = _decode_bytes(fields["secret"], 32 + _SECRET_BYTES[public.suite], f"{what}'s secret")
        identity = cls._from_secret(public.name, public.suite, secret)
        if identity.public != public:
            raise FormatError(f"{what}: its public and its secret half do not belong together")
        return identity

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read a secret identity file; refuses one that others on this machine can read.

        Where it is locked, the passphrase is asked, or read: see `passphrase`, with what that raises.
        """
        what = f"identity file {path}"
        try:
            data = read_small(path, _MAX_BYTES, "identity file", private=True)
        except UsageError:  # NAME.pub is readable by others, as it may be
            if _is_public(path):
                raise UsageError(f"{what} is a public identity", expected="the secret one, NAME.key") from None
            raise
        fields = decode(data.rstrip(b"\n"), what, max_bytes=_MAX_BYTES)
        if fields.get("format") == LOCKED:
            data = unlock(fields, known_passphrase(str(path)), what)
        identity = cls.from_bytes(data, what)
        if fields.get("format") == LOCKED and identity.public.to_dict() != fields["public"]:
            raise FormatError(f"{what}: its public and its secret half do not belong together")
        return identity

    def lock(self, passphrase: str) -> bytes:
        """Return the secret file's content under a passphrase; raises as `passphrase.lock`."""
        return lock(self.to_bytes(), self.public.to_dict(), passphrase)

    def sign(self, context: str, message: bytes) -> bytes:
        """Return the Ed25519 signature (64 bytes) of ``message`` for ``context``."""
        return self._signing.sign(_signed(context, message))

    def sign_certificate(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        """Return the certificate under this identity's key; its bytes begin unlike those of any other message."""
        return builder.sign(self._signing, None)

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """Return what was wrapped for this identity under the same ``info``.

        Raises:
            SealError: wrapped for another identity or context, or changed.
        """
        problem: SealError | None = None
        try:
            return _suite(self.public.suite).decrypt(wrapped, self._sealing, info=info)
        except (InvalidTag, ValueError) as error:
            problem = SealError("not sealed to this identity, or changed", got=type(error).__name__)
        raise problem


def _is_public(path: Path) -> bool:
    try:
        PublicIdentity.load(path)
    except UsageError:
        return False
    return True


def _suite(name: SuiteName) -> Suite:
    kem = KEM.MLKEM768_X25519 if name == "mlkem768-x25519" else KEM.X25519
    return Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _public_key(suite: SuiteName, data: bytes) -> Any:
    x25519 = X25519PublicKey.from_public_bytes(data[-32:])
    if suite == "x25519":
        return x25519
    return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(data[:-32]), x25519)


@functools.lru_cache(maxsize=256)
def _is_key(suite: SuiteName, data: bytes) -> bool:
    try:
        _suite(suite).encrypt(b"", _public_key(suite, data), info=b"")
    except ValueError:
        return False
    return True


def _signed(context: str, message: bytes) -> bytes:
    return f"obfuscatune {context} 1".encode() + b"\0" + message


def _decode_bytes(text: Any, size: int, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:
        data = b""
    if len(data) != size or base64.b64encode(data).decode() != text:
        raise FormatError(f"{what} is not the base64 of {size} bytes")
    return data
