"""The written specification says what the code does."""

import re
import struct
from pathlib import Path

import pytest

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.frames import DTYPES, decode_frame, encode_head
from obfuscatune.protocol.limits import Limits

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


def test_example_with_another_byte_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_frame(example() + b"\0")


def test_limits_and_dtypes_of_the_document() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d ]+) \|", TEXT, re.MULTILINE))
    assert {name: int(number.replace(" ", "")) for name, number in table.items()} == vars(Limits())
    sizes = dict(re.findall(r"^\| `(\w+)` \| (\d) byte", TEXT, re.MULTILINE))
    assert {name: int(size) for name, size in sizes.items()} == {n: d.itemsize for n, d in DTYPES.items()}
