"""Writer and reader: what goes in comes out, at any offset and size; what is announced must be written."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError, ObfuscatuneError, SealError, UsageError
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.sealed import SealedReader, SealedWriter, read_header

CHUNK = 4096
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


def seal(path: Path, payload: bytes, party: SimpleNamespace, **more: Any) -> str:
    options = {"kind": "data", "recipients": [party.clinic.public], "chunk_bytes": CHUNK, **more}
    with SealedWriter(path, sender=party.lab, payload_bytes=len(payload), **options) as writer:
        writer.write(payload)
    return writer.digest


@SHARED
@given(data=st.data(), size=st.integers(1, 4 * CHUNK) | st.sampled_from([1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]))
def test_any_range_comes_back(data: st.DataObject, size: int, tmp_path: Path, party: SimpleNamespace) -> None:
    payload = os.urandom(size)
    path = tmp_path / "file.sealed"
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=5)))
    with SealedWriter(
        path, kind="data", sender=party.lab, recipients=[party.clinic.public], payload_bytes=size, chunk_bytes=CHUNK
    ) as writer:
        for start, end in zip([0, *cuts], [*cuts, size], strict=True):
            writer.write(payload[start:end])
    with SealedReader(path, party.clinic) as reader:
        assert (reader.digest, reader.payload_bytes) == (writer.digest, size)
        for _ in range(5):
            start = data.draw(st.integers(0, size))
            length = data.draw(st.integers(0, size - start))
            assert reader.read(start, length) == payload[start : start + length]
        assert reader.read(0, size) == payload


def test_what_everybody_sees(tmp_path: Path, party: SimpleNamespace) -> None:
    terms = {"purpose": "research"}
    recipients = [party.clinic.public, party.enclave.public]
    digest = seal(tmp_path / "a", b"x" * 5000, party, recipients=recipients, terms=terms, kind="model")
    signed = read_header(tmp_path / "a")
    assert signed.digest == digest and len(digest) == 64
    assert (signed.header.kind, signed.header.payload_bytes, signed.header.chunks) == ("model", 5000, 2)
    assert signed.header.sender == party.lab.public and signed.header.terms == terms
    assert [one.fingerprint for one in signed.header.recipients] == [one.fingerprint for one in recipients]
    assert signed.file_bytes == (tmp_path / "a").stat().st_size
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    for identity in (party.clinic, party.enclave):
        with SealedReader(tmp_path / "a", identity) as reader:
            assert reader.read(4999, 1) == b"x"
            assert reader.terms == terms and reader.sender == party.lab.public


def test_neither_the_sender_nor_a_stranger_can_open(tmp_path: Path, party: SimpleNamespace) -> None:
    seal(tmp_path / "a", b"x", party)
    for identity in (party.lab, party.other):
        with pytest.raises(SealError, match="not sealed to this identity"):
            SealedReader(tmp_path / "a", identity)


def test_the_same_content_has_another_digest_each_time(tmp_path: Path, party: SimpleNamespace) -> None:
    digests = {seal(tmp_path / "a", b"a guess", party) for _ in range(3)}
    headers = [read_header(tmp_path / "a").header]
    seal(tmp_path / "a", b"a guess", party)
    headers.append(read_header(tmp_path / "a").header)
    assert len(digests) == 3
    assert headers[0].id != headers[1].id and headers[0].commitment != headers[1].commitment


def test_no_plain_byte_is_in_the_file(tmp_path: Path, party: SimpleNamespace) -> None:
    payload = b"canary of the data owner " * 400
    seal(tmp_path / "a", payload, party)
    assert b"canary" not in (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("written", [0, 9, 11])
def test_another_size_than_announced_writes_nothing(written: int, tmp_path: Path, party: SimpleNamespace) -> None:
    (tmp_path / "a").write_bytes(b"before")
    writer = SealedWriter(
        tmp_path / "a", kind="data", sender=party.lab, recipients=[party.clinic.public], payload_bytes=10
    )
    with pytest.raises(UsageError, match="payload than announced"), writer:
        writer.write(bytes(written))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"
    with pytest.raises(UsageError, match="no digest"):
        _ = writer.digest
    with pytest.raises(UsageError, match="makes one"), writer:
        pass


def test_an_exception_in_the_block_writes_nothing(tmp_path: Path, party: SimpleNamespace) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        SealedWriter(
            tmp_path / "a", kind="data", sender=party.lab, recipients=[party.clinic.public], payload_bytes=10
        ) as writer,
    ):
        writer.write(bytes(5))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "more",
    [
        {"kind": "key"},
        {"payload_bytes": 0},
        {"payload_bytes": -1},
        {"chunk_bytes": 0},
        {"chunk_bytes": 5000},
        {"chunk_bytes": 1 << 21},
        {"chunk_bytes": CHUNK, "payload_bytes": (CHUNK << 20) + 1},
        {"terms": {"a": "x" * 20_000}},
        {"terms": {"a": b"x"}},
        {"recipients": []},
        {"recipients": [Identity.generate("a", "x25519").public] * 2},
        {"recipients": [PublicIdentity("zero", bytes(32), "x25519", bytes(32))]},
        {"recipients": [Identity.generate("a", "x25519").public] * 17},
    ],
)
def test_the_writer_refuses_what_a_reader_would(more: dict[str, Any], tmp_path: Path, party: SimpleNamespace) -> None:
    options = {"kind": "data", "recipients": [party.clinic.public], "payload_bytes": 1, **more}
    with pytest.raises(UsageError):
        SealedWriter(tmp_path / "a", sender=party.lab, **options)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses(tmp_path: Path, party: SimpleNamespace) -> None:
    with pytest.raises(ObfuscatuneError, match="cannot write"):
        seal(tmp_path / "nowhere" / "a", b"x", party)


def test_a_full_disk(tmp_path: Path, party: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SealedWriter(
        tmp_path / "a", kind="data", sender=party.lab, recipients=[party.clinic.public], payload_bytes=1 << 21
    )
    with pytest.raises(ObfuscatuneError, match="cannot write the sealed file: got No space left"), writer:
        full = open("/dev/full", "wb")  # noqa: SIM115 - the writer closes it
        assert writer._file is not None
        writer._file.close()
        writer._file = full
        writer.write(bytes(1 << 21))
    assert not list(tmp_path.iterdir())


def test_the_most_recipients(tmp_path: Path, party: SimpleNamespace) -> None:
    recipients = [Identity.generate(f"r{number}") for number in range(16)]
    terms = {"text": "x" * 16_000}
    seal(tmp_path / "a", b"x", party, recipients=[one.public for one in recipients], terms=terms)
    with SealedReader(tmp_path / "a", recipients[15]) as reader:
        assert reader.read(0, 1) == b"x"


def test_ranges_beyond_the_payload(tmp_path: Path, party: SimpleNamespace) -> None:
    seal(tmp_path / "a", bytes(10), party)
    with SealedReader(tmp_path / "a", party.clinic) as reader:
        for offset, length in [(0, 11), (10, 1), (-1, 1), (0, -1), (1 << 70, 1), (0, 1 << 70)]:
            with pytest.raises(UsageError, match="beyond"):
                reader.read(offset, length)
        assert reader.read(10, 0) == b""


@pytest.mark.parametrize("name", ["nowhere", ".", "pipe"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="cannot read the sealed file"):
        read_header(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b"OBSF", b"\0" * 200, b"OBSF\1\0\0\0\xff\xff\xff\xff"])
def test_what_is_no_sealed_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FormatError):
        read_header(tmp_path / "a")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, party: SimpleNamespace) -> None:
    path = tmp_path / "a"
    payload = os.urandom(3 * CHUNK)
    seal(path, payload, party)
    with SealedReader(path, party.clinic) as reader:
        assert reader.read(0, 1) == payload[:1]
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            file.write(b"changed")
        assert reader.read(0, 2 * CHUNK) == payload[: 2 * CHUNK]
        with pytest.raises(SealError, match="chunk 2"):
            reader.read(0, 3 * CHUNK)
        with pytest.raises(SealError, match="chunk 2"):  # nor from the cache, at the second try
            reader.read(2 * CHUNK, 1)
        os.truncate(path, 2000)
        with pytest.raises(SealError, match="cut while it was read"):
            reader.read(CHUNK, 1)


def test_a_refused_chunk_leaves_nothing_in_the_buffer(tmp_path: Path, party: SimpleNamespace) -> None:
    path = tmp_path / "a"
    seal(path, os.urandom(2 * CHUNK), party)
    with SealedReader(path, party.clinic) as reader:
        place = read_header(path).payload_offset
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"changed")
        buffer = bytearray(CHUNK)
        with pytest.raises(SealError):
            reader.read_into(0, memoryview(buffer))
        assert not any(buffer)


MEMORY = """
import os, sys
from pathlib import Path
from obfuscatune.protocol.memory import peak_memory_bytes
from obfuscatune.parties.sealed.measure import measure
from obfuscatune.parties.identity import Identity
Identity.generate("warm").public.wrap(b"x", b"")
base = peak_memory_bytes()
passes = list(measure(Path(sys.argv[1]), 96_000_000, 1))
print(peak_memory_bytes() - base)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 24_000_000  # a quarter of the file; 5 MB measured
