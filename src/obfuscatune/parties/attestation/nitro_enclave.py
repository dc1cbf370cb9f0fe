"""An AWS Nitro enclave as platform: documents of its security module, asked through ``/dev/nsm``.

    ioctl(0xC0200A00, {address, length of the request; address, length of the response})
    request   CBOR {"Attestation": {"user_data": bytes, "nonce": null, "public_key": null}}
    response  CBOR {"Attestation": {"document": bytes}}, or {"Error": text}

A Nitro enclave has no network: what it serves goes through vsock, which a program beside it must carry to its loopback
address and, on the parent machine, to the parties. It has no disk, no sealing key and no counter either: identity, jobs
and log last until it ends. Format: aws-nitro-enclaves-nsm-api.
"""

import ctypes
import fcntl
import os
from pathlib import Path
from typing import Any

import cbor2

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation import nitro
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Quote
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.quoting import check_report_data

DEVICE = Path("/dev/nsm")
REQUEST_CODE = 0xC0200A00  # _IOWR(0x0A, 0, 32 bytes)
_MAX_RESPONSE_BYTES = 0x3000  # as the module's
_HINT = "this runs within a Nitro enclave, whose kernel has the module nsm"


class _Message(ctypes.Structure):
    """Two vectors of the kernel: the request, and the room for the response, whose length it changes."""

    _fields_ = (
        ("request", ctypes.c_uint64),
        ("request_bytes", ctypes.c_uint64),
        ("response", ctypes.c_uint64),
        ("response_bytes", ctypes.c_uint64),
    )


class NitroAttester:
    """A source of documents; ``device`` is another one in tests."""

    def __init__(self, device: Path = DEVICE) -> None:
        self._device = device

    def quote(self, report_data: bytes) -> Quote:
        """Return a document whose ``user_data`` are ``report_data``; raises AttestationError where there is none."""
        check_report_data(report_data)
        fields = {"user_data": report_data, "nonce": None, "public_key": None}
        answer = self._ask(cbor2.dumps({"Attestation": fields}))
        inner = answer.get("Attestation") if isinstance(answer, dict) else None
        document = inner.get("document") if isinstance(inner, dict) else None
        if type(document) is not bytes or len(document) > MAX_QUOTE_BYTES:
            raise AttestationError("the Nitro module gives no document", where=str(self._device))
        try:
            with parsing("it"):
                bound = nitro.peek(document)["report data"] == report_data.hex()
        except FormatError as error:
            where = str(self._device)
            raise AttestationError(f"the Nitro module's document: {error.what}", got=error.got, where=where) from None
        if not bound:
            raise AttestationError("the Nitro module's document is over other report data than ours")
        return Quote("nitro", document)

    def _ask(self, request: bytes) -> Any:
        given = ctypes.create_string_buffer(request, len(request))
        room = ctypes.create_string_buffer(_MAX_RESPONSE_BYTES)
        message = _Message(ctypes.addressof(given), len(request), ctypes.addressof(room), _MAX_RESPONSE_BYTES)
        try:
            handle = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(handle, REQUEST_CODE, message)
            finally:
                os.close(handle)
        except OSError as error:
            where = str(self._device)
            raise AttestationError(
                "the Nitro module gives no document", got=error.strerror, where=where, hint=_HINT
            ) from None
        try:
            with parsing("answer of the Nitro module"):
                return cbor2.loads(room.raw[: min(message.response_bytes, _MAX_RESPONSE_BYTES)])
        except FormatError as error:
            raise AttestationError(error.what, where=str(self._device)) from None


class NitroPlatform:
    """An AWS Nitro enclave.

    Attributes:
        attester: source of documents. simulated: False. name: for people. counter: None, there is none.

    Raises:
        AttestationError: not in a Nitro enclave.
    """

    simulated = False
    name = "Nitro enclave"
    counter = None

    def __init__(self, device: Path = DEVICE) -> None:
        if not device.exists():
            raise AttestationError("no Nitro module here", where=str(device), hint=_HINT)
        self.attester = NitroAttester(device)

    def sealing_key(self) -> None:
        """Return None: a Nitro enclave has no key of its own."""

    def measurements(self) -> dict[str, str]:
        """Return the PCRs of a document of this moment; raises AttestationError where there is none."""
        found = nitro.peek(self.attester.quote(bytes(64)).quote)
        return {name: value for name, value in found.items() if name.startswith(nitro.PREFIX)}
