"""Quotes of an SGX enclave under Gramine, by its pseudo-files in ``/dev/attestation``.

Source: Gramine's documentation, "Attestation and Secret Provisioning": 64 bytes are written to ``user_report_data``,
the DCAP quote is read from ``quote``, and ``keys/_sgx_mrenclave`` holds 16 bytes that the processor derives for this
MRENCLAVE. ``attestation_type`` must be ``dcap``, which the manifest's ``sgx.remote_attestation`` sets.
"""

import threading
from pathlib import Path

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Quote
from obfuscatune.parties.attestation.quoting import (
    bound_quote,
    check_report_data,
    derive_sealing_key,
    own_measurements,
    read_bounded,
)

ROOT = Path("/dev/attestation")
_KEY_BYTES = 16
_MAX_TYPE_BYTES = 16


class GramineAttester:
    """A source of quotes; ``root`` is another one in tests."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._turn = threading.Lock()  # the files are the enclave's, not the thread's

    def quote(self, report_data: bytes) -> Quote:
        """Return a fresh quote; raises AttestationError where Gramine gives none."""
        check_report_data(report_data)
        path = self._root / "user_report_data"
        with self._turn:
            try:
                with path.open("r+b", buffering=0) as file:  # not made where it is missing
                    file.write(report_data)
            except OSError as error:
                hint = "this runs under gramine-sgx only, with a manifest that says sgx.remote_attestation = 'dcap'"
                raise AttestationError(
                    "Gramine takes no report data", got=error.strerror, where=str(path), hint=hint
                ) from None
            raw = read_bounded(self._root / "quote", MAX_QUOTE_BYTES, "quote of Gramine")
        return bound_quote("sgx", raw, report_data, {})


class GraminePlatform:
    """An SGX enclave under Gramine.

    Attributes:
        attester: source of quotes. simulated: False. name: for people. counter: None, the hardware has none.

    Raises:
        AttestationError: not under Gramine, or in a manifest without DCAP attestation.
    """

    simulated = False
    name = "SGX enclave under Gramine"
    counter = None

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        kind = read_bounded(root / "attestation_type", _MAX_TYPE_BYTES, "attestation type of Gramine").strip()
        if kind != b"dcap":
            raise AttestationError("attestation type of Gramine", got=ascii(kind), expected="dcap", where=str(root))
        self.attester = GramineAttester(root)

    def sealing_key(self) -> bytes:
        """Return HKDF of the processor's key for this MRENCLAVE, 32 bytes. Secret.

        Raises:
            AttestationError: Gramine does not give it.
        """
        key = read_bounded(self._root / "keys" / "_sgx_mrenclave", _KEY_BYTES, "sealing key of Gramine")
        if len(key) != _KEY_BYTES or not any(key):
            raise AttestationError(
                "sealing key of Gramine", got=f"{len(key)} bytes", expected=f"{_KEY_BYTES}, not zero"
            )
        return derive_sealing_key(key)

    def measurements(self) -> dict[str, str]:
        """Return what the hardware measured; raises AttestationError where there is no quote."""
        return own_measurements(self.attester)
