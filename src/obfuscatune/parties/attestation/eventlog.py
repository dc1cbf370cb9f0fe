"""The TDX event log (CCEL): replaying it gives the registers RTMR0 to RTMR3 that a quote shows.

    RTMR := SHA-384(RTMR || digest)   for each event of that register, in order, from zeros

The log itself is not trusted. It says what was measured; whether that was so, only the comparison with a verified quote
says. Format: TCG PC Client Platform Firmware Profile, crypto agile log; register index 0 is MRTD, 1 to 4 RTMR0 to RTMR3
(UEFI, EFI_CC_MEASUREMENT_PROTOCOL).
"""

import hashlib
from dataclasses import dataclass

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.fields import Fields

MAX_LOG_BYTES = 4 * 1024 * 1024
MAX_EVENTS = 10_000
REGISTERS = 4
_DIGEST_BYTES = 48
_NO_ACTION = 3
_SHA384 = 0x000C
_SPECIFICATION = b"Spec ID Event03\0"
_SHA1_BYTES = 20
_MAX_ALGORITHMS = 8
_MAX_DIGEST_BYTES = 64
_END = 0xFFFFFFFF  # ACPI tables are filled up with ones


@dataclass(frozen=True)
class Event:
    """One entry: index of the register (1 is RTMR0), type, SHA-384 digest; what was measured is left out."""

    register: int
    kind: int
    digest: bytes


def read(log: bytes) -> list[Event]:
    """Return the events after the header.

    Raises:
        FormatError: no such log, cut, too long, or without SHA-384.
    """
    if len(log) > MAX_LOG_BYTES:
        raise FormatError("event log is too long", got=f"{len(log)} bytes", expected=f"at most {MAX_LOG_BYTES}")
    reader = Fields(log, "event log")
    reader.number(4)
    if reader.number(4) != _NO_ACTION:
        raise FormatError("event log does not begin with its header")
    reader.take(_SHA1_BYTES)
    sizes = _algorithms(Fields(reader.take(reader.number(4)), "event log's header"))
    events: list[Event] = []
    while reader.left >= 4:
        register = reader.number(4)
        if register == _END:
            return events
        if len(events) == MAX_EVENTS or register > REGISTERS:
            what = "too many events" if len(events) == MAX_EVENTS else "an event of an unknown register"
            raise FormatError(f"event log has {what}", got=register)
        kind, digests = reader.number(4), {}
        count = reader.number(4)
        if count > _MAX_ALGORITHMS:
            raise FormatError("event log has too many digests in an event", got=count)
        for _ in range(count):
            algorithm = reader.number(2)
            if algorithm not in sizes:
                raise FormatError("event log has a digest that its header does not name", got=f"{algorithm:#x}")
            digests[algorithm] = reader.take(sizes[algorithm])
        reader.take(reader.number(4))
        if _SHA384 not in digests:
            raise FormatError("event log has an event without a SHA-384 digest")
        events.append(Event(register, kind, digests[_SHA384]))
    return events


def replay(events: list[Event]) -> dict[str, str]:
    """Return rtmr0 to rtmr3, hex: the equation at the head of this module. Events of other registers are left out."""
    registers = [bytes(_DIGEST_BYTES)] * REGISTERS
    for event in events:
        if event.register >= 1 and event.kind != _NO_ACTION:
            at = event.register - 1
            registers[at] = hashlib.sha384(registers[at] + event.digest).digest()
    return {f"rtmr{number}": value.hex() for number, value in enumerate(registers)}


def _algorithms(header: Fields) -> dict[int, int]:
    """Return digest sizes by algorithm, of the header's data."""
    if header.take(len(_SPECIFICATION)) != _SPECIFICATION:
        raise FormatError("event log of another format", expected="crypto agile, Spec ID Event03")
    header.take(8)  # class of the platform, version, size of a word
    count = header.number(4)
    if not 1 <= count <= _MAX_ALGORITHMS:
        raise FormatError("event log's header names no algorithms, or too many", got=count)
    sizes = {header.number(2): header.number(2) for _ in range(count)}
    if any(size > _MAX_DIGEST_BYTES for size in sizes.values()) or sizes.get(_SHA384) != _DIGEST_BYTES:
        raise FormatError("event log without SHA-384")
    return sizes
