"""The example bytes of docs/sealed-format.md are what the code derives."""

import re
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.parties.sealed import contents, fields, header, keys

TEXT = (Path(__file__).parents[3] / "docs" / "sealed-format.md").read_text()
VALUES, INFO, ARCHIVE = re.findall(r"^```\n(.*?)\n```$", TEXT, re.MULTILINE | re.DOTALL)
DATA_KEY, FILE_ID = bytes(range(32)), bytes(range(32, 64))
HEADER_HASH, TABLE_HASH = b"\xaa" * 32, b"\xbb" * 32


def test_values() -> None:
    found = {name.strip(): bytes.fromhex(value) for name, value in re.findall(r"^(.{12}) (.+)$", VALUES, re.MULTILINE)}
    payload_key = HKDF(SHA256(), 32, salt=HEADER_HASH, info=b"obfuscatune sealed file payload 1").derive(DATA_KEY)
    assert found == {
        "commitment": keys.commitment(DATA_KEY, FILE_ID),
        "payload key": payload_key,
        "nonce 0 of 2": keys.chunk_nonce(0, 2),
        "nonce 1 of 2": keys.chunk_nonce(1, 2),
        "digest": bytes.fromhex(header.digest(HEADER_HASH + TABLE_HASH)),
    }
    nonce = bytes(12)  # and that payload key is the one of the cipher, which does not show it
    assert keys.payload_cipher(DATA_KEY, HEADER_HASH).encrypt(nonce, b"x", None) == (
        keys.AESGCM(payload_key).encrypt(nonce, b"x", None)
    )


def test_info() -> None:
    assert keys._info(FILE_ID, "data", sender="2" * 64, recipient="1" * 64).decode() == "".join(INFO.split("\n"))


def test_archive() -> None:
    data = contents.encode_contents({"a.txt": 5}) + b"hello"
    assert data == bytes.fromhex(ARCHIVE)
    (length,) = contents.LENGTH.unpack(data[:4])
    assert contents.decode_contents(data[4 : 4 + length], len(data)) == {"a.txt": contents.Entry(4 + length, 5)}


def test_limits_are_the_ones_written_down() -> None:
    text = TEXT.replace(" ", "").replace("\n", "")
    for number in (
        fields.MAX_HEADER_BYTES,
        fields.MAX_TERMS_BYTES,
        fields.MAX_RECIPIENTS,
        fields.CHUNK_SIZES[0],
        fields.CHUNK_SIZES[-1],
        contents.MAX_TABLE_BYTES,
        contents.MAX_FILES,
        contents.MAX_NAME_CHARS,
    ):
        assert str(number) in text
    assert all(f"`{kind}`" in TEXT for kind in fields.KINDS)
