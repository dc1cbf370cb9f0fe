"""The TDX event log: replay, against a real log and its quote, and bounds."""

import contextlib
import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation import dcap
from obfuscatune.parties.attestation.eventlog import MAX_EVENTS, MAX_LOG_BYTES, read, replay

from .samples import load, needs_samples

ALGORITHMS = struct.pack("<IHH", 1, 0xC, 48)
SPECIFICATION = b"Spec ID Event03\0" + bytes(8) + ALGORITHMS + b"\0"


def header(data: bytes = SPECIFICATION) -> bytes:
    return struct.pack("<II20sI", 0, 3, b"", len(data)) + data


def event(register: int, digest: bytes = b"\1" * 48, kind: int = 1, data: bytes = b"x") -> bytes:
    return struct.pack("<IIIH", register, kind, 1, 0xC) + digest + struct.pack("<I", len(data)) + data


@needs_samples
def test_a_real_log_gives_the_registers_of_its_quote() -> None:
    events = read(load("ccel/ccel_data.dat"))
    assert len(events) == 43
    quote = dcap.peek(load("ccel/cos-113-tdx-quote.dat"))
    registers = replay(events)
    assert registers == {name: quote[name] for name in registers}
    assert replay(events[:-1]) != registers


def test_the_equation() -> None:
    events = read(header() + event(1) + event(3) + event(1, b"\2" * 48) + event(4, kind=3) + event(0) + b"\xff" * 64)
    first = hashlib.sha384(hashlib.sha384(bytes(48) + b"\1" * 48).digest() + b"\2" * 48).hexdigest()
    third = hashlib.sha384(bytes(48) + b"\1" * 48).hexdigest()
    assert replay(events) == {"rtmr0": first, "rtmr1": "00" * 48, "rtmr2": third, "rtmr3": "00" * 48}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"", "cut"),
        (header()[:20], "cut"),
        (header()[:40], "cut"),
        (struct.pack("<II20sI", 0, 1, b"", 0), "header"),
        (struct.pack("<II20sI", 0, 3, b"", 0xFFFFFFFF), "cut"),
        (header(b"Spec ID Event02\0" + SPECIFICATION[16:]), "another format"),
        (header(SPECIFICATION[:24] + struct.pack("<I", 0xFFFFFFFF)), "too many"),
        (header(SPECIFICATION[:24] + struct.pack("<IHH", 1, 0xB, 32)), "without SHA-384"),
        (header(SPECIFICATION[:24] + struct.pack("<IHHHH", 2, 0xC, 48, 0xB, 0xFFFF)), "without SHA-384"),
        (header() + event(5), "unknown register"),
        (header() + event(1)[:-1], "cut"),
        (header() + struct.pack("<III", 1, 1, 0xFFFFFFFF), "too many digests"),
        (header() + struct.pack("<IIIH", 1, 1, 1, 0xB) + bytes(32), "does not name"),
        (header() + struct.pack("<IIII", 1, 1, 0, 0), "without a SHA-384 digest"),
        (header() + struct.pack("<IIIH", 1, 1, 1, 0xC) + bytes(48) + b"\xff" * 4, "cut"),
        (header() + event(1, data=b"") * (MAX_EVENTS + 1), "too many events"),
        (bytes(MAX_LOG_BYTES + 1), "too long"),
    ],
)
def test_bad_logs_are_refused(log: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(log)


@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_a_corrupted_log_raises_our_error_or_gives_registers(data: st.DataObject) -> None:
    log = bytearray(header() + event(1) + event(2) + b"\xff" * 8)
    for _ in range(data.draw(st.integers(1, 4))):
        log[data.draw(st.integers(0, len(log) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        replay(read(bytes(log[: data.draw(st.integers(0, len(log)))])))
