"""The written specification says what the code does."""

import json
import re
import struct
from pathlib import Path

import pytest

from obfuscatune.errors import ProtocolError
from obfuscatune.parties import link
from obfuscatune.protocol import tls
from obfuscatune.protocol.expand import tensors_drawn
from obfuscatune.protocol.frames import DTYPES, decode_frame, encode_head
from obfuscatune.protocol.limits import Limits
from obfuscatune.worker.acceptor import Bounds

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def example() -> bytes:
    block = re.search(r"```hex\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    return bytes.fromhex("".join(line.partition("#")[0] for line in block[1].splitlines()))


def test_example_decodes_to_what_it_says_and_encodes_to_itself() -> None:
    fields, tensors = decode_frame(example())
    assert fields == {"id": 7, "ok": True}
    ((spec, raw),) = tensors.values()
    assert (spec.name, spec.dtype, spec.shape) == ("y", DTYPES["float32"], (1, 2))
    assert struct.unpack("<2f", raw) == (1.0, -2.5)
    assert encode_head(fields, [spec])[0] + raw == example()


def test_vectors_are_their_frames() -> None:
    block = re.search(r"```vectors\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    lines = block[1].splitlines()
    assert len(lines) == 10
    for line in lines:
        digits, _, text = line.partition(" ")
        assert decode_frame(bytes.fromhex(digits)) == (json.loads(text), {})
        assert encode_head(json.loads(text), [])[0].hex() == digits
    rows = re.search(r"```drawn\n(.*?)```", TEXT, re.DOTALL)
    assert rows is not None
    assert tensors_drawn(json.loads(text)["drawn"], 16)["x"].tolist() == json.loads(rows[1])


def test_the_link_of_the_document() -> None:
    assert f"`{tls.ALPN}`" in TEXT
    assert link.OID.dotted_string in TEXT
    assert f"{link.MAX_CERTIFICATE_BYTES:,} bytes".replace(",", " ") in TEXT
    bounds = Bounds()
    told = f"{bounds.max_greeting} connections that have not greeted, {bounds.max_greeting_each} of them"
    assert told in TEXT
    assert f"At most {bounds.max_waiting} that have greeted wait in the queue" in TEXT
    assert f"| {bounds.greeting_seconds:g} |" in TEXT


def test_example_with_another_byte_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_frame(example() + b"\0")


def test_limits_and_dtypes_of_the_document() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d ]+) \|", TEXT, re.MULTILINE))
    assert {name: int(number.replace(" ", "")) for name, number in table.items()} == vars(Limits())
    sizes = dict(re.findall(r"^\| `(\w+)` \| (\d) byte", TEXT, re.MULTILINE))
    assert {name: int(size) for name, size in sizes.items()} == {n: d.itemsize for n, d in DTYPES.items()}
