"""docs/channel.md says what the code does: limits, example, codes; and each test that it names is there."""

import re
from pathlib import Path

from obfuscatune.parties.canonical import decode
from obfuscatune.parties.channel import conversation, frames, server, tls
from obfuscatune.parties.channel.certificate import CBOR_TAG, MAX_CERTIFICATE_BYTES, OID, PLATFORM_EXTRAS
from obfuscatune.parties.channel.faults import CODES, MAX_CHARS
from obfuscatune.parties.channel.frames import SESSION, MessageLimits, encode_message, read_message
from obfuscatune.parties.channel.handshake import PROTOCOL, Transcript
from obfuscatune.parties.identity import Identity

from .test_frames import reader

TEXT = (Path(__file__).parents[3] / "docs" / "channel.md").read_text()


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def test_limits() -> None:
    rows = re.findall(r"^\| `([A-Z]+)` \| ([\d ]+) \| ([\d ]+) \|", TEXT, re.MULTILINE)
    told = {name: MessageLimits(number(fields), number(payload)) for name, fields, payload in rows}
    assert told == {name: value for name, value in vars(frames).items() if isinstance(value, MessageLimits)}
    assert f"more than {MAX_CERTIFICATE_BYTES:,} bytes".replace(",", " ") in TEXT
    assert f"at most {MAX_CHARS:,} characters".replace(",", " ") in TEXT
    assert f"of at most {frames.MAX_PIECE_BYTES >> 20} MiB of payload" in TEXT
    assert server._RENEWAL_SECONDS == 60
    defaults = server.AttestedServer.__init__.__kwdefaults__
    assert f"{defaults['timeout']:.0f} s from accept" in TEXT
    assert f"{defaults['idle_timeout']:.0f} s to the first byte of the next request" in TEXT
    assert TEXT.count(f"| {defaults['max_connections']} |") == 2
    assert f"a party has {server.MAX_AT_ONCE} requests" in TEXT and f"{server.MAX_PIECES} long payloads" in TEXT
    assert "60 s for the rest" in TEXT and conversation.MESSAGE_SECONDS == 60


def test_names() -> None:
    assert f"ALPN `{tls.ALPN}`" in TEXT
    assert f"extension `{OID.dotted_string}`" in TEXT
    assert f"{CBOR_TAG}([evidence, claims])" in TEXT
    assert "extras " + " and\n  ".join(f"`{name}`" for name in PLATFORM_EXTRAS) in TEXT
    assert f'"{PROTOCOL}" || 0x00' in TEXT
    assert f"Codes: {', '.join(f'`{code}`' for code in CODES)}." in TEXT


def test_transcript() -> None:
    section = TEXT.split("| transcript | |")[1].split("\n\n")[0]
    told = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    signed = Transcript("a", "b", "c", "d").to_bytes(Identity.generate("x").public)
    assert told == list(decode(signed, "transcript"))


def test_example() -> None:
    block = re.search(r"```hex\n(.*?)```", TEXT, re.DOTALL)
    assert block
    data = bytes.fromhex("".join(line.split("#")[0] for line in block[1].splitlines()))
    fields, payload = read_message(reader(data), SESSION)
    assert fields == {"fields": {"op": "status"}, "id": 7}
    assert len(payload) == 2
    assert encode_message(fields, payload, SESSION) + payload == data


def test_each_threat_names_tests_that_are_there() -> None:
    section = TEXT.split("## Threats")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+)`", section)
    there = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) > 15
    assert [name for name in named if f"def {name}(" not in there] == []
