"""The simulated platform: real formats, a real chain of keys, and no protection whatever.

Its directory stands for what hardware holds in fuses and in a persistent counter. Here these are files of mode 0600
that the operator, against whom a TEE protects, can read and write: whoever has the directory can forge any evidence,
read any sealed state and put back the counter. It exists so that everything but the hardware can be run and tested.

    simulation-root.pem   certificate of the root, public: what a verifier's policy names to accept this simulation
    hardware.key          canonical JSON: kind, fuse (32 bytes), private keys. Stands for fuses and the CA
    counter               the monotonic counter, decimal

The sealing key is HKDF(fuse, measurement of the code): a changed program cannot open what another sealed. On hardware
MRTD measures a virtual machine's firmware; here it measures our own source (`measurement`).
"""

import base64
import fcntl
import os
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from obfuscatune.durable import rename, write_private
from obfuscatune.errors import AttestationError, FormatError, UsageError
from obfuscatune.parties.attestation import simulated_dcap, simulated_snp
from obfuscatune.parties.attestation.evidence import Attester
from obfuscatune.parties.attestation.measurement import MEASUREMENT_BYTES, measure_code
from obfuscatune.parties.attestation.quoting import derive_sealing_key, own_measurements
from obfuscatune.parties.attestation.simulated_pki import Flaws
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.files import read_small

SimulatedKind = Literal["tdx", "snp"]
FORMAT = "obfuscatune simulated hardware 1"
ROOT_FILE = "simulation-root.pem"
_HARDWARE_FILE, _COUNTER_FILE = "hardware.key", "counter"
_MAX_BYTES = 32 * 1024
_FUSE_BYTES, _PLATFORM_ID_BYTES = 32, 16
_KEY_NAMES = {"tdx": {"root", "pck"}, "snp": {"root", "ask", "vcek"}}
_NO_FLAWS = Flaws()


class FileCounter:
    """A counter in a file: increments are atomic and on the disk when they return. Who can write it can put it back."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        """Return the count; raises AttestationError where the file is no counter."""
        text = read_small(self._path, 20, "simulated counter", private=True)
        if not (text.isascii() and text.isdigit()):
            raise AttestationError("the simulated counter is no number", where=str(self._path))
        return int(text)

    def used(self) -> bool:
        """Return whether it was ever moved; raises AttestationError where the file is no counter."""
        return self.read() > 0

    def increment(self) -> int:
        """Add one and return the new count; raises AttestationError where the file is no counter or cannot be written.

        Processes that share the platform take turns: no count is given twice.
        """
        try:
            turn = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(turn, fcntl.LOCK_EX)
                count = self.read() + 1
                _write(self._path, str(count).encode())
            finally:
                os.close(turn)
        except OSError as error:
            raise AttestationError("the simulated counter", got=error.strerror, where=str(self._path)) from None
        return count


class SimulatedPlatform:
    """A platform of the simulator, in the directory that :meth:`create` made.

    Args:
        directory: of the simulated hardware. flaws: what is to be wrong with it, for tests that it is refused.
        measurement: to run as other code, for tests: 48 bytes in place of the measurement of this program.

    Attributes:
        attester: its source of quotes. simulated: True. name: for people. counter: survives restarts. kind: tdx or snp.
        root: the public certificate that a verifier's policy names (``DIRECTORY/simulation-root.pem``).

    Raises:
        UsageError: a file is missing, or readable by others.
        FormatError: a file is damaged.
    """

    simulated = True

    def __init__(self, directory: Path, *, flaws: Flaws = _NO_FLAWS, measurement: bytes | None = None) -> None:
        self._measurement = measure_code() if measurement is None else measurement
        if len(self._measurement) != MEASUREMENT_BYTES:
            raise UsageError("measurement", got=f"{len(self._measurement)} bytes", expected=MEASUREMENT_BYTES)
        self.kind, self._fuse, keys = _load(directory / _HARDWARE_FILE)
        self.root = directory / ROOT_FILE
        root = _load_root(self.root, keys["root"])
        self.name = f"simulated {self.kind}"
        self.counter = FileCounter(directory / _COUNTER_FILE)
        identifier = _derive(self._fuse, b"chip", simulated_snp.CHIP_ID_BYTES)
        self.attester: Attester
        if self.kind == "tdx":
            identifier = identifier[:_PLATFORM_ID_BYTES]
            self.attester = simulated_dcap.SimulatedTdx(keys, root, self._measurement, identifier, flaws)
        else:
            self.attester = simulated_snp.SimulatedSnp(keys, root, self._measurement, identifier, flaws)

    @classmethod
    def create(cls, directory: Path, kind: SimulatedKind = "tdx") -> "SimulatedPlatform":
        """Make simulated hardware in ``directory`` and return it; for snp this takes seconds (two RSA-4096 keys).

        Raises:
            UsageError: there is simulated hardware already, or the directory cannot be written.
        """
        if cls.exists(directory):
            raise UsageError("simulated hardware is there already", where=str(directory))
        maker = simulated_dcap if kind == "tdx" else simulated_snp
        keys = maker.new_keys()
        fields = {
            "format": FORMAT,
            "fuse": base64.b64encode(os.urandom(_FUSE_BYTES)).decode(),
            "keys": {name: _to_pem(key) for name, key in keys.items()},
            "kind": kind,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / ROOT_FILE).write_bytes(maker.new_root(keys["root"]).public_bytes(Encoding.PEM))
            _write(directory / _COUNTER_FILE, b"0")
            _write(directory / _HARDWARE_FILE, encode(fields))  # last: a directory without it is no platform
        except OSError as error:
            raise UsageError("cannot make simulated hardware", got=error.strerror, where=str(directory)) from None
        return cls(directory)

    @staticmethod
    def exists(directory: Path) -> bool:
        """Return whether ``directory`` holds simulated hardware."""
        return (directory / _HARDWARE_FILE).exists()

    def sealing_key(self) -> bytes:
        """Return the sealing key of this code on this platform, 32 bytes. Secret (on hardware)."""
        return derive_sealing_key(self._fuse, self._measurement)

    def measurements(self) -> dict[str, str]:
        """Return, in hexadecimal and by the names of the quote's fields, what a policy must allow for this code."""
        return own_measurements(self.attester)


def _load(path: Path) -> tuple[SimulatedKind, bytes, dict[str, Any]]:
    what = f"simulated hardware {path}"
    fields = decode(read_small(path, _MAX_BYTES, "simulated hardware", private=True), what, max_bytes=_MAX_BYTES)
    kind, keys = fields.get("kind"), fields.get("keys")
    if set(fields) != {"format", "fuse", "keys", "kind"} or fields["format"] != FORMAT or kind not in _KEY_NAMES:
        raise FormatError(f"{what} is not of this version", expected=FORMAT)
    if not isinstance(keys, dict) or set(keys) != _KEY_NAMES[kind] or not isinstance(fields["fuse"], str):
        raise FormatError(f"{what} has other keys", expected=", ".join(sorted(_KEY_NAMES[kind])))
    problem: FormatError | None = None
    try:
        fuse = base64.b64decode(fields["fuse"], validate=True)
        loaded = {name: load_pem_private_key(str(text).encode(), None) for name, text in keys.items()}
        if len(fuse) == _FUSE_BYTES:
            return kind, fuse, loaded
        problem = FormatError(f"{what} has a fuse of another size")
    except (ValueError, TypeError) as error:
        problem = FormatError(f"{what} is damaged", got=f"a {type(error).__name__} in the decoder")
    raise problem  # outside the handler: the decoder's own exception may hold a part of a key


def _load_root(path: Path, key: Any) -> x509.Certificate:
    data = read_small(path, _MAX_BYTES, "simulated root")
    try:
        root = x509.load_pem_x509_certificate(data)
    except ValueError:
        raise FormatError("the simulated root is no certificate", where=str(path)) from None
    if _spki(root.public_key()) != _spki(key.public_key()):
        raise FormatError("the simulated root belongs to other hardware", where=str(path))
    return root


def _spki(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _to_pem(key: Any) -> str:
    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def _derive(fuse: bytes, use: bytes, size: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=b"obfuscatune simulated " + use).derive(fuse)


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f"{path.name}.new")
    write_private(beside, data)
    rename(beside, path)
