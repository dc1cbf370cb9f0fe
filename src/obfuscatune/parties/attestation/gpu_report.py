"""The attestation report of an NVIDIA GPU: an SPDM 1.1 request for measurements, and the response, which is signed.

    request   0x11 | 0xE0 | attributes 1 (signed) | 0xFF (all) | nonce (32) | slot
    response  0x11 | 0x60 | 0 | slot | count | length (24 bits) | blocks | nonce of the GPU (32)
              | length (16 bits) | opaque data | signature (96)
    block     index (from 1) | 1 (DMTF) | size | type | size of the value | value, a SHA-384
    opaque    type (16 bits) | size (16 bits) | data, again and again: of NVIDIA's own

Numbers are little-endian. Formats: DMTF DSP0274 1.1, GET_MEASUREMENTS; NVIDIA/nvtrust, local GPU verifier.
"""

import re
from dataclasses import dataclass, field

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.fields import Fields

MAX_REPORT_BYTES = 8 * 1024  # as NVML's buffer
NONCE_BYTES, DIGEST_BYTES, SIGNATURE_BYTES = 32, 48, 96
_VERSION, _GET_MEASUREMENTS, _MEASUREMENTS = 0x11, 0xE0, 0x60
_SIGNED, _ALL = 1, 0xFF
_DMTF = 1
_RAW = 0x80  # bit of a value's type: no digest
_DRIVER, _VBIOS, _FIRMWARE_ID = 3, 6, 20
_VERSION_TEXT = re.compile(rb"[0-9A-Za-z.]{1,31}")
_VBIOS_BYTES = 8


@dataclass(frozen=True)
class GpuReport:
    """What a report says. Nothing of it is verified.

    Attributes:
        nonce: the verifier's, of the request, 32 bytes. signed: request and response without the signature.
        signature: r || s, big-endian, 96 bytes. measurements: by index from 1, SHA-384 each.
        driver, vbios: versions, for people. firmware_id: SHA-384 that the certificate of the GPU's key has too.
    """

    nonce: bytes
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    measurements: dict[int, bytes] = field(repr=False)
    driver: str
    vbios: str
    firmware_id: bytes


def parse(data: bytes) -> GpuReport:
    """Return the parts of a report.

    Raises:
        FormatError: too long, another message, or a length, an index or a field that does not fit.
    """
    what = "report of a GPU"
    if len(data) > MAX_REPORT_BYTES:
        raise FormatError(f"{what} is too long", got=f"{len(data)} bytes", expected=f"at most {MAX_REPORT_BYTES}")
    reader = Fields(data, what)
    if tuple(reader.take(4)) != (_VERSION, _GET_MEASUREMENTS, _SIGNED, _ALL):
        raise FormatError(f"{what} is no SPDM 1.1 request for all measurements, signed")
    nonce, slot = reader.take(NONCE_BYTES), reader.number(1)
    if tuple(reader.take(4)) != (_VERSION, _MEASUREMENTS, 0, slot):
        raise FormatError(f"{what} without a response of SPDM 1.1 by the slot that was asked")
    count = reader.number(1)
    measurements = _blocks(reader.take(reader.number(3)), count)
    reader.take(NONCE_BYTES)
    opaque = _opaque(reader.take(reader.number(2)))
    end = reader.at
    signature = reader.take(SIGNATURE_BYTES)
    reader.end()
    firmware_id = opaque[_FIRMWARE_ID]
    if len(firmware_id) != DIGEST_BYTES:
        raise FormatError(f"{what}: id of the firmware", got=f"{len(firmware_id)} bytes", expected=DIGEST_BYTES)
    return GpuReport(
        nonce, data[:end], signature, measurements, _driver(opaque[_DRIVER]), _vbios(opaque[_VBIOS]), firmware_id
    )


def _blocks(data: bytes, count: int) -> dict[int, bytes]:
    reader = Fields(data, "measurements of a GPU")
    found: dict[int, bytes] = {}
    for index in range(1, count + 1):
        head = (reader.number(1), reader.number(1), reader.number(2))
        value_type, size = reader.number(1), reader.number(2)
        if head != (index, _DMTF, size + 3) or value_type & _RAW or size != DIGEST_BYTES:
            raise FormatError("measurement of a GPU", where=f"block {index}", expected="a SHA-384, in its order")
        found[index] = reader.take(size)
    reader.end()
    return found


def _opaque(data: bytes) -> dict[int, bytes]:
    reader = Fields(data, "opaque data of a GPU")
    found: dict[int, bytes] = {}
    while reader.left:
        kind, size = reader.number(2), reader.number(2)
        if kind in found:
            raise FormatError("opaque data of a GPU has a field twice", got=kind)
        found[kind] = reader.take(size)
    if missing := {_DRIVER, _VBIOS, _FIRMWARE_ID} - set(found):
        raise FormatError("opaque data of a GPU lacks a field", got=sorted(missing), expected="driver, VBIOS, firmware")
    return found


def _driver(data: bytes) -> str:
    text = data.removesuffix(b"\0")
    if not _VERSION_TEXT.fullmatch(text):
        raise FormatError("driver's version in the report of a GPU", expected="digits and dots")
    return text.decode()


def _vbios(data: bytes) -> str:
    """Return the version as NVIDIA writes it: 00 9F 00 96 01 00 00 00 is 96.00.9F.00.01."""
    if len(data) != _VBIOS_BYTES or any(data[5:]):
        raise FormatError("VBIOS version in the report of a GPU", expected="five bytes, then zeros")
    return ".".join(f"{number:02X}" for number in (*reversed(data[:4]), data[4]))
