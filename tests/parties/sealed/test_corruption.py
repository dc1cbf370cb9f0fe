"""No changed file is taken for a right one: a thousand random changes, every byte of the outside, and any bytes."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError
from obfuscatune.parties.sealed import SealedArchive, SealedReader, read_header, seal_files
from obfuscatune.parties.sealed.fields import Header

CANARY = b"canary-of-the-data-owner"


@pytest.fixture(scope="module")
def sealed(party: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "file.sealed"
    files = {"a.txt": CANARY * 300, "b/c.txt": b"", "d.txt": CANARY}
    recipients = [party.clinic.public, party.enclave.public]
    seal_files(path, files, kind="data", sender=party.lab, recipients=recipients, terms={"a": 1}, chunk_bytes=4096)
    return path


def open_all(path: Path, party: SimpleNamespace) -> dict[str, bytes]:
    with SealedReader(path, party.clinic) as reader:
        archive = SealedArchive(reader)
        return {name: archive.read(name, 1 << 20) for name in archive.names()}


def corrupt(data: bytes, draw: random.Random) -> bytes:
    """One change: bits, bytes, a range removed, doubled, moved or replaced, an end cut or added."""
    place, size = draw.randrange(len(data)), draw.randint(1, 64)
    end = min(len(data), place + size)
    match draw.randrange(7):
        case 0:
            return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        case 1:
            return data[:place] + draw.randbytes(end - place) + data[end:]
        case 2:
            return data[:place] + data[end:]
        case 3:
            return data[:end] + data[place:end] + data[end:]
        case 4:
            other = draw.randrange(len(data) - size)
            moved = data[other : other + end - place]
            return data[:place] + moved + data[place + len(moved) :]
        case 5:
            return data[:place]
        case _:
            return data + draw.randbytes(size)


def test_a_thousand_random_changes_are_all_refused(sealed: Path, party: SimpleNamespace, tmp_path: Path) -> None:
    assert open_all(sealed, party)["d.txt"] == CANARY  # the control
    data, draw, path = sealed.read_bytes(), random.Random(7), tmp_path / "changed"
    refused = 0
    while refused < 1000:
        changed = corrupt(data, draw)
        if changed == data:
            continue
        path.write_bytes(changed)
        with pytest.raises(FormatError) as caught:
            open_all(path, party)
        assert "canary" not in str(caught.value)
        refused += 1


def test_every_byte_of_header_and_footer_counts(sealed: Path, tmp_path: Path) -> None:
    data, path = bytearray(sealed.read_bytes()), tmp_path / "changed"
    signed = read_header(sealed)
    footer = len(data) - len(signed.table) - 64
    for place in [*range(signed.payload_offset), *range(footer, len(data))]:
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(FormatError):
            read_header(path)
        data[place] ^= 0x10
    path.write_bytes(data)
    assert read_header(path).digest == signed.digest


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_arbitrary_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any"
    for start in (b"", b"OBSF\1\0\0\0" + len(data).to_bytes(4, "little")):
        path.write_bytes(start + data)
        with pytest.raises(FormatError):
            read_header(path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_arbitrary_headers(data: st.DataObject, sealed: Path) -> None:
    """Any value in any field: refused, or read into a record that encodes to the very same bytes."""
    import json

    from obfuscatune.parties.canonical import encode

    raw = sealed.read_bytes()[12 : read_header(sealed).payload_offset]
    fields = json.loads(raw)
    name = data.draw(st.sampled_from(sorted(fields)))
    leaves = st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.floats(allow_nan=False, allow_infinity=False)
    leaves |= st.text("0123456789abcdef=", max_size=64)
    leaves |= st.sampled_from([fields["id"], fields["kind"], fields["sender"], fields["recipients"][0]])
    fields[name] = data.draw(
        leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.sampled_from(["fingerprint", "a"]), leaves)
    )
    text = encode(fields)
    try:
        header = Header.from_bytes(text, "header")
    except FormatError:
        return
    assert header.to_bytes()[12:] == text
