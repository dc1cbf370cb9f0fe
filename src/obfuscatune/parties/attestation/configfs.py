"""Quotes of a TDX or SEV-SNP guest by configfs-tsm (Linux 6.7 and later).

Source: the kernel's Documentation/ABI/testing/configfs-tsm-report. Each quote takes a directory of its own under
``/sys/kernel/config/tsm/report``: 64 bytes are written to ``inblob``, the quote is read from ``outblob``, what comes
with it from ``auxblob``. The kernel takes a write when the file is closed, and then reports no fault: that it was
taken, and that nobody else wrote, shows in ``generation``, which must have advanced by one.
"""

import errno
import os
from pathlib import Path
from typing import Protocol

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Kind, Quote
from obfuscatune.parties.attestation.quoting import bound_quote, check_report_data, own_measurements, read_bounded
from obfuscatune.parties.attestation.snp_certificates import MAX_TABLE_BYTES, certificate_chain
from obfuscatune.parties.attestation.snp_key import DEVICE, derived_key

ROOT = Path("/sys/kernel/config/tsm/report")
EVENT_LOG = Path("/sys/firmware/acpi/tables/data/CCEL")
MAX_LOG_AREA_BYTES = 1 << 20
MAX_LOG_BYTES = 256 * 1024  # half of the evidence
ATTEMPTS = 4
_PROVIDERS: dict[bytes, Kind] = {b"tdx_guest": "tdx", b"sev_guest": "snp"}
_CONFLICTS = (errno.EWOULDBLOCK, errno.EBUSY)
_HINT = "a TDX or SEV-SNP guest with Linux 6.7 or later, configfs mounted, and the module tdx_guest or sev_guest"


class System(Protocol):
    """The calls of the system that this module makes: the module `os`, or in tests a kernel made of dictionaries."""

    def mkdir(self, path: str, /) -> None: ...  # noqa: D102 - as in os
    def rmdir(self, path: str, /) -> None: ...  # noqa: D102
    def open(self, path: str, flags: int, /) -> int: ...  # noqa: D102
    def read(self, handle: int, count: int, /) -> bytes: ...  # noqa: D102
    def write(self, handle: int, data: bytes, /) -> int: ...  # noqa: D102
    def close(self, handle: int, /) -> None: ...  # noqa: D102


class ConfigfsAttester:
    """A source of quotes; `root`, `event_log` and `system` are other ones in tests."""

    def __init__(self, root: Path = ROOT, event_log: Path = EVENT_LOG, system: System = os) -> None:
        self._root, self._event_log, self._system = root, event_log, system

    def quote(self, report_data: bytes) -> Quote:
        """Return a fresh quote: a TDX quote with the event log where there is one, or an SNP report with certificates.

        Raises:
            AttestationError: no such guest, another provider, or what the kernel or the host gives breaks its format.
        """
        check_report_data(report_data)
        entry = self._root / f"obfuscatune-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            self._system.mkdir(str(entry))
            try:
                kind, raw, auxiliary = self._report(entry, report_data)
            finally:
                self._system.rmdir(str(entry))
        except OSError as error:
            raise AttestationError(
                "configfs-tsm gives no quote", got=error.strerror, where=str(self._root), hint=f"it needs {_HINT}"
            ) from None
        extras: dict[str, bytes] = {}
        if kind == "snp" and auxiliary:
            extras["certificates"] = certificate_chain(auxiliary, raw)
        if kind == "tdx" and (log := self._log()):
            extras["event_log"] = log
        return bound_quote(kind, raw, report_data, extras)

    def _report(self, entry: Path, report_data: bytes) -> tuple[Kind, bytes, bytes]:
        """Return kind, quote and auxiliary data of one generation of ``entry``; raises OSError too."""
        provider = self._read(entry / "provider", 64).strip()
        if provider not in _PROVIDERS:
            raise AttestationError("provider of configfs-tsm", got=ascii(provider), expected=f"one for {_HINT}")
        kind = _PROVIDERS[provider]
        for _ in range(ATTEMPTS):
            before = self._generation(entry)
            try:
                self._write(entry / "inblob", report_data)
                raw = self._read(entry / "outblob", MAX_QUOTE_BYTES)
                auxiliary = self._read(entry / "auxblob", MAX_TABLE_BYTES) if kind == "snp" else b""
            except OSError as error:
                if error.errno not in _CONFLICTS:
                    raise
                continue
            if self._generation(entry) == before + 1:
                return kind, raw, auxiliary
        raise AttestationError(
            "configfs-tsm: the report was changed while it was made, or our data were not taken",
            got=f"{ATTEMPTS} attempts",
            where=str(entry),
        )

    def _generation(self, entry: Path) -> int:
        text = self._read(entry / "generation", 24).strip()
        if not text.isdigit():
            raise AttestationError("configfs-tsm: the generation is no number", where=str(entry))
        return int(text)

    def _write(self, path: Path, data: bytes) -> None:
        handle = self._system.open(str(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = self._system.write(handle, data)
        finally:
            self._system.close(handle)
        if written != len(data):
            raise AttestationError("configfs-tsm took a part of our data", got=written, where=str(path))

    def _read(self, path: Path, max_bytes: int) -> bytes:
        parts, left = [], max_bytes + 1
        handle = self._system.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while left and (part := self._system.read(handle, left)):
                parts.append(part)
                left -= len(part)
        finally:
            self._system.close(handle)
        if not left:
            raise AttestationError("configfs-tsm: too long", expected=f"at most {max_bytes} bytes", where=str(path))
        return b"".join(parts)

    def _log(self) -> bytes | None:
        """Return the firmware's event log without the unused end of its area, which is all ones.

        None where the firmware keeps none, and where it is too long for the evidence: a policy then has to name the
        RTMRs themselves.
        """
        if not self._event_log.exists():
            return None
        log = read_bounded(self._event_log, MAX_LOG_AREA_BYTES, "event log").rstrip(b"\xff")
        return log if len(log) <= MAX_LOG_BYTES else None


class ConfigfsPlatform:
    """A TDX or SEV-SNP guest.

    Attributes:
        attester: source of quotes. simulated: False. name: for people. counter: None, the hardware has none.
    """

    simulated = False
    name = "confidential VM"
    counter = None

    def __init__(self) -> None:
        self.attester = ConfigfsAttester()

    def sealing_key(self) -> bytes | None:
        """Return SEV-SNP's derived key; None on TDX, which has none. Secret.

        Raises:
            AttestationError: the secure processor does not give it.
        """
        return derived_key() if DEVICE.exists() else None

    def measurements(self) -> dict[str, str]:
        """Return what the hardware measured; raises AttestationError where there is no quote."""
        return own_measurements(self.attester)
