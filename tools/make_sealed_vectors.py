#!/usr/bin/env python3
"""Make the test vectors of the sealed file format: small files, each right or with one fault, and who opens them.

The files are built here from the words of ``docs/sealed-format.md``, slowly and all in memory, without the package's
own writer: so the vectors check the reader against the document. Identities are made anew with each run, for these
tests only.

    python tools/make_sealed_vectors.py --output_dir tests/vectors/sealed
"""

import argparse
import base64
import hashlib
import json
import struct
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.parties.identity import Identity

CHUNK = 4096
DATA_KEY, FILE_ID = bytes(range(32)), bytes(range(32, 64))
Edit = Callable[[Any], Any]


def canonical(value: Any) -> bytes:
    """Return canonical JSON, for values that need no check."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def derive(key: bytes, salt: bytes, purpose: str) -> bytes:
    """Return 32 bytes by HKDF-SHA256."""
    return HKDF(SHA256(), 32, salt=salt, info=f"obfuscatune sealed file {purpose} 1".encode()).derive(key)


def sha256(data: bytes) -> bytes:
    """Return the hash."""
    return hashlib.sha256(data).digest()


def keep(value: Any) -> Any:
    """Change nothing."""
    return value


@dataclass
class Parts:
    """A sealed file in pieces."""

    head: bytes
    chunks: list[bytes]
    table: list[bytes]
    signature: bytes

    def join(self) -> bytes:
        """Return the file."""
        return self.head + b"".join(self.chunks) + b"".join(self.table) + self.signature


def entry(recipient: Identity, key: bytes, sender: Identity, /, **changed: Any) -> dict[str, Any]:
    """Return a recipient's entry in the header; ``changed`` fields of its info make it wrong."""
    fingerprint = recipient.public.fingerprint
    info = {
        "format": "obfuscatune sealed file 1",
        "id": FILE_ID.hex(),
        "kind": "data",
        "recipient": fingerprint,
        "sender": sender.public.fingerprint,
        **changed,
    }
    wrapped = recipient.public.wrap(key, canonical(info))
    return {"fingerprint": fingerprint, "wrapped_key": base64.b64encode(wrapped).decode()}


def build(
    payload: bytes,
    sender: Identity,
    recipients: list[Identity],
    *,
    prefix: Edit = keep,
    fields: Edit = keep,
    text: Edit = keep,
    nonces: Edit = keep,
    chunks: Edit = keep,
    context: str = "sealed file",
    signer: Identity | None = None,
    key: bytes = DATA_KEY,
    hash_of: Edit = keep,
) -> Parts:
    """Return a sealed file; each function edits one piece of it before what depends on it is made."""
    header = {
        "chunk_bytes": CHUNK,
        "commitment": derive(DATA_KEY, FILE_ID, "commitment").hex(),
        "created": 1_800_000_000,
        "format": "obfuscatune sealed file 1",
        "id": FILE_ID.hex(),
        "kind": "data",
        "payload_bytes": len(payload),
        "recipients": [entry(recipient, key, sender) for recipient in recipients],
        "sender": sender.public.to_dict(),
        "terms": None,
    }
    body = text(canonical(fields(header)))
    head = struct.pack("<4sB3sI", *prefix([b"OBSF", 1, bytes(3), len(body)])) + body
    cipher = AESGCM(derive(DATA_KEY, hash_of(sha256(head)), "payload"))
    plain = [payload[start : start + CHUNK] for start in range(0, len(payload), CHUNK)]
    numbers = nonces([(index, index == len(plain) - 1) for index in range(len(plain))])
    sealed = chunks(
        [
            cipher.encrypt(struct.pack("<Q", index) + bytes(3) + bytes([last]), part, None)
            for (index, last), part in zip(numbers, plain, strict=True)
        ]
    )
    table = [sha256(chunk) for chunk in sealed]
    signature = (signer or sender).sign(context, sha256(head) + sha256(b"".join(table)))
    return Parts(head, sealed, table, signature)


def archive(rows: Any, data: bytes, **more: Any) -> bytes:
    """Return an archive's payload for any table of contents."""
    contents = canonical({"files": rows, "format": "obfuscatune archive 1", **more})
    return struct.pack("<I", len(contents)) + contents + data


def safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file for any header."""
    text = header if isinstance(header, bytes) else canonical(header)
    return struct.pack("<Q", len(text)) + text + data


def model(header: Any, data: bytes) -> bytes:
    """Return the payload of a model that is one safetensors file."""
    file = safetensors(header, data)
    return archive([["model.safetensors", len(file)]], file)


def tensor(start: int, end: int, **more: Any) -> dict[str, Any]:
    """Return the row of a tensor of U8."""
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **more}


def flip(data: bytes, place: int = 0) -> bytes:
    """Return ``data`` with one bit changed."""
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def change(**fields: Any) -> Edit:
    """Return an edit that sets fields of the header."""
    return lambda header: {**header, **fields}


def first(**fields: Any) -> Edit:
    """Return an edit that sets fields of the first recipient."""
    return lambda header: {**header, "recipients": [{**header["recipients"][0], **fields}, *header["recipients"][1:]]}


def with_table(parts: Parts, table: Edit) -> Parts:
    """Return the file with another table under the old signature."""
    return Parts(parts.head, parts.chunks, table(parts.table), parts.signature)


def with_head(parts: Parts, old: bytes, new: bytes) -> Parts:
    """Return the file with another header under the old signature."""
    if parts.head.count(old) != 1:
        raise ValueError("not one place to change")
    head = parts.head.replace(old, new)
    return Parts(head[:8] + struct.pack("<I", len(head) - 12) + head[12:], parts.chunks, parts.table, parts.signature)


def make(lab: Identity, clinic: Identity, other: Identity, hybrid: Identity) -> dict[str, tuple[str, str, bytes]]:
    """Return (expect, what, file) by name: sealed by ``lab``, opened by ``clinic``."""
    small, long = b"a test payload", bytes(range(256)) * 17  # one chunk; two, the second of 256 bytes
    one: Callable[..., bytes] = lambda **edits: build(small, lab, [clinic], **edits).join()  # noqa: E731
    two = build(long, lab, [clinic])
    plain = build(small, lab, [clinic])
    found: dict[str, tuple[str, str, bytes]] = {}

    def add(expect: str, name: str, what: str, data: bytes) -> None:
        found[name] = (expect, what, data)

    for kind, cases in {
        "ok": {
            "one_chunk": ("a payload shorter than a chunk", one()),
            "two_chunks": ("a payload of two chunks", two.join()),
            "whole_chunk": ("a payload of exactly one chunk", build(long[:CHUNK], lab, [clinic]).join()),
            "hybrid": ("two recipients, the other one with ML-KEM", build(small, lab, [hybrid, clinic]).join()),
            "terms": ("with terms", one(fields=change(terms={"purpose": "research", "max_epochs": 3}))),
        },
        "format": {
            "magic": ("another magic", one(prefix=lambda p: [b"OBFT", *p[1:]])),
            "version": ("version 2", one(prefix=lambda p: [p[0], 2, *p[2:]])),
            "reserved": ("a reserved byte of 1", one(prefix=lambda p: [*p[:2], b"\0\1\0", p[3]])),
            "header_too_long": ("a length of 65537 bytes for the header", one(prefix=lambda p: [*p[:3], 65_537])),
            "header_beyond_file": ("a header that ends behind the file", plain.head[:-9]),
            "prefix_short": ("eleven bytes", plain.head[:11]),
            "not_json": ("a header that is no JSON", one(text=lambda t: t[:-1])),
            "not_object": ("a header that is a list", one(text=lambda t: b"[" + t + b"]")),
            "space": ("a space in the header", one(text=lambda t: t.replace(b":", b": ", 1))),
            "order": (
                "fields in another order",
                one(text=lambda t: b'{"terms":null,' + t[1:].replace(b',"terms":null', b"")),
            ),
            "key_twice": ("a key twice", one(text=lambda t: t[:-1] + b',"terms":null}')),
            "escape": ("a letter written as an escape", one(text=lambda t: t.replace(b'"data"', b'"d\\u0061ta"'))),
            "float": ("a size written as a float", one(text=lambda t: t.replace(b":4096", b":4096.0"))),
            "unknown_field": ("a field too many", one(fields=change(comment="x"))),
            "missing_field": ("no field terms", one(fields=lambda h: {k: v for k, v in h.items() if k != "terms"})),
            "other_format": ("format of another version", one(fields=change(format="obfuscatune sealed file 2"))),
            "kind": ("an unknown kind", one(fields=change(kind="key"))),
            "chunk_too_small": ("chunks of 2 KiB", one(fields=change(chunk_bytes=2048))),
            "chunk_too_large": ("chunks of 2 MiB", one(fields=change(chunk_bytes=1 << 21))),
            "chunk_no_power": ("chunks of 5000 bytes", one(fields=change(chunk_bytes=5000))),
            "payload_empty": ("a payload of 0 bytes", build(b"", lab, [clinic]).join()),
            "payload_too_large": ("more than 2^20 chunks", one(fields=change(payload_bytes=(CHUNK << 20) + 1))),
            "payload_bool": ("true for a size", one(fields=change(payload_bytes=True))),
            "created": ("a time before 1970", one(fields=change(created=-1))),
            "id_short": ("an id of 31 bytes", one(fields=change(id=FILE_ID.hex()[2:]))),
            "id_upper_case": ("an id in upper case", one(fields=change(id=FILE_ID.hex().upper()))),
            "commitment": ("a commitment of 31 bytes", one(fields=change(commitment="00" * 31))),
            "no_recipient": ("no recipient", build(small, lab, []).join()),
            "recipients_17": (
                "17 recipients",
                one(
                    fields=lambda h: {
                        **h,
                        "recipients": [{**h["recipients"][0], "fingerprint": f"{n:064x}"} for n in range(17)],
                    }
                ),
            ),
            "recipient_twice": ("a recipient twice", build(small, lab, [clinic, clinic]).join()),
            "recipient_field": ("a recipient with a name", one(fields=first(name="clinic"))),
            "fingerprint": ("a fingerprint of 16 digits", one(fields=first(fingerprint="0" * 16))),
            "wrapped_size": (
                "a wrapped key of 81 bytes",
                one(fields=first(wrapped_key=base64.b64encode(bytes(81)).decode())),
            ),
            "wrapped_base64": (
                "a wrapped key whose base64 has bits that are not used",
                one(fields=first(wrapped_key=base64.b64encode(bytes(80)).decode()[:-2] + "B=")),
            ),
            "terms_list": ("terms that are a list", one(fields=change(terms=[]))),
            "terms_too_long": ("terms of more than 16384 bytes", one(fields=change(terms={"a": "x" * 16_377}))),
            "too_deep": ("terms nested 8 deep", one(fields=change(terms=json.loads('{"a":' * 8 + "0" + "}" * 8)))),
            "sender": (
                "a sender whose key has 31 bytes",
                one(
                    fields=lambda h: {
                        **h,
                        "sender": {**h["sender"], "signing_key": base64.b64encode(bytes(31)).decode()},
                    }
                ),
            ),
        },
        "length": {
            "cut": ("the last byte is missing", one()[:-1]),
            "cut_chunk": (
                "the last chunk and its hash are missing",
                Parts(two.head, two.chunks[:1], two.table[:1], two.signature).join(),
            ),
            "appended": ("a byte too many", one() + b"\0"),
            "payload_bytes": ("a byte less announced than there is", one(fields=change(payload_bytes=len(small) - 1))),
        },
        "signature": {
            "signature_bit": (
                "a bit of the signature",
                Parts(plain.head, plain.chunks, plain.table, flip(plain.signature)).join(),
            ),
            "table_bit": ("a bit of the table", with_table(plain, lambda t: [flip(t[0])]).join()),
            "table_swapped": (
                "two hashes of the table in each other's place",
                with_table(two, lambda t: t[::-1]).join(),
            ),
            "created_changed": ("another time", with_head(plain, b"1800000000", b"1800000001").join()),
            "terms_changed": ("terms added", with_head(plain, b'"terms":null', b'"terms":{}').join()),
            "kind_changed": ("another kind", with_head(plain, b'"kind":"data"', b'"kind":"model"').join()),
            "recipient_added": (
                "a recipient added",
                with_head(
                    plain, b'"}],"sender"', b'"},' + canonical(entry(other, DATA_KEY, lab)) + b'],"sender"'
                ).join(),
            ),
            "sender_replaced": (
                "another sender in the header",
                with_head(plain, canonical(lab.public.to_dict()), canonical(other.public.to_dict())).join(),
            ),
            "other_signer": ("signed by another identity", one(signer=other)),
            "other_context": ("signed for another purpose", one(context="job")),
        },
        "recipient": {
            "not_for_us": ("sealed to another identity only", build(small, lab, [other]).join()),
            "wrapped_bit": (
                "a wrapped key that does not open",
                one(
                    fields=lambda h: first(
                        wrapped_key=base64.b64encode(
                            flip(base64.b64decode(h["recipients"][0]["wrapped_key"]), 79)
                        ).decode()
                    )(h)
                ),
            ),
            "wrapped_other": (
                "our entry holds a key wrapped for another",
                one(fields=lambda h: first(wrapped_key=entry(other, DATA_KEY, lab)["wrapped_key"])(h)),
            ),
            "wrapped_kind": (
                "a key wrapped for a file of another kind",
                one(fields=lambda h: {**h, "recipients": [entry(clinic, DATA_KEY, lab, kind="model")]}),
            ),
            "wrapped_id": (
                "a key wrapped for another file",
                one(fields=lambda h: {**h, "recipients": [entry(clinic, DATA_KEY, lab, id="00" * 32)]}),
            ),
            "wrapped_sender": (
                "a key wrapped by another sender",
                one(
                    fields=lambda h: {
                        **h,
                        "recipients": [entry(clinic, DATA_KEY, lab, sender=other.public.fingerprint)],
                    }
                ),
            ),
            "uncommitted": ("a data key that the sender has not committed to", one(key=bytes(32))),
        },
        "payload": {
            "chunk_bit": (
                "a bit of a chunk",
                Parts(plain.head, [flip(plain.chunks[0])], plain.table, plain.signature).join(),
            ),
            "tag_bit": (
                "a bit of a chunk's tag",
                Parts(plain.head, [flip(plain.chunks[0], -1)], plain.table, plain.signature).join(),
            ),
            "chunk_forged": (
                "a chunk by a recipient, who knows the data key, under the sender's table",
                Parts(
                    plain.head,
                    build(small[::-1], lab, [clinic], text=lambda _: plain.head[12:]).chunks,
                    plain.table,
                    plain.signature,
                ).join(),
            ),
            "chunks_swapped": (
                "two chunks in each other's place, also in a signed table",
                build(long[:CHUNK] * 2, lab, [clinic], chunks=lambda c: c[::-1]).join(),
            ),
            "number": ("chunk 0 under the nonce of chunk 1", one(nonces=lambda n: [(1, True)])),
            "not_last": ("a last chunk without the flag", one(nonces=lambda n: [(0, False)])),
            "last_too_early": (
                "the flag on the first of two chunks",
                build(long, lab, [clinic], nonces=lambda n: [(0, True), n[1]]).join(),
            ),
            "other_header": ("chunks under the key of another header", one(hash_of=lambda h: bytes(32))),
        },
    }.items():
        for name, (what, data) in cases.items():
            add(kind, f"{kind}_{name}", what, data)

    ok_row, two_rows = [["a", 1]], lambda a, b: [[a, 1], [b, 1]]
    payloads = {
        "archive": {
            "short": ("three bytes", b"abc"),
            "table_too_long": ("a table that ends behind the payload", struct.pack("<I", 99) + b"{}"),
            "table_space": (
                "a table that is not canonical",
                struct.pack("<I", 53) + b'{"files": [["a",1]],"format":"obfuscatune archive 1"}' + b"x",
            ),
            "other_format": ("a table of another version", archive(ok_row, b"x", format="obfuscatune archive 2")),
            "no_file": ("no file", archive([], b"")),
            "row": ("a row of three", archive([["a", 1, 0]], b"x")),
            "size": ("a negative size", archive([["a", 2], ["b", -1]], b"x")),
            "sum_short": ("a byte that no file has", archive(ok_row, b"xy")),
            "sum_long": ("a file that ends behind the payload", archive([["a", 3]], b"xy")),
            "absolute": ("an absolute name", archive([["/a", 1]], b"x")),
            "parent": ("a name with ..", archive([["a/../b", 1]], b"x")),
            "hidden": ("a name that begins with a dot", archive([[".bashrc", 1]], b"x")),
            "backslash": ("a name with a backslash", archive([["a\\b", 1]], b"x")),
            "empty_name": ("an empty name", archive([["", 1]], b"x")),
            "twice": ("a name twice", archive(two_rows("a", "a"), b"xy")),
            "case": ("two names that differ in case only", archive(two_rows("a", "A"), b"xy")),
            "folder": ("a file that is also a folder", archive(two_rows("a", "a/b"), b"xy")),
        },
        "tensors": {
            "none": ("no weights", archive(ok_row, b"x")),
            "both": (
                "weights and an index",
                archive([["model.safetensors", 0], ["model.safetensors.index.json", 0]], b""),
            ),
            "header_beyond": (
                "a header that ends behind the file",
                archive([["model.safetensors", 12]], struct.pack("<Q", 5) + b"{}  "),
            ),
            "not_json": ("a header that is no JSON", model(b"{]", b"")),
            "twice": ("a tensor twice", model(b'{"a":%s,"a":%s}' % ((canonical(tensor(0, 1)),) * 2), b"x")),
            "dtype": ("an unknown dtype", model({"a": tensor(0, 1, dtype="U7")}, b"x")),
            "shape": ("a shape that needs more than its range", model({"a": tensor(0, 1, shape=[2])}, b"x")),
            "negative": ("a negative size", model({"a": tensor(0, 1, shape=[-1, -1])}, b"x")),
            "huge_empty": (
                "an empty tensor of a huge size",
                model({"a": tensor(0, 0, shape=[0, 1 << 40, 1 << 40])}, b""),
            ),
            "overlap": ("two tensors that overlap", model({"a": tensor(0, 2), "b": tensor(1, 3)}, b"xyz")),
            "gap": ("a gap between two tensors", model({"a": tensor(0, 1), "b": tensor(2, 3)}, b"xyz")),
            "beyond": ("a tensor that ends behind the file", model({"a": tensor(0, 4)}, b"xyz")),
            "trailing": ("a byte behind the last tensor", model({"a": tensor(0, 2)}, b"xyz")),
            "name": ("a name with a line end", model({"a\n": tensor(0, 1)}, b"x")),
            "metadata": ("metadata that is a list", model({"__metadata__": [], "a": tensor(0, 1)}, b"x")),
        },
    }
    index = canonical({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    shard = safetensors({"b": tensor(0, 1)}, b"x")
    rows = [["model.safetensors.index.json", len(index)], ["model-00001-of-00001.safetensors", len(shard)]]
    payloads["tensors"]["index"] = ("index and shard that name other tensors", archive(rows, index + shard))
    missing = archive([["model.safetensors.index.json", len(index)]], index)
    payloads["tensors"]["shard_missing"] = ("an index that names a missing file", missing)
    for kind, contents in payloads.items():
        for name, (what, payload) in contents.items():
            add(kind, f"{kind}_{name}", what, build(payload, lab, [clinic]).join())
    add(
        "ok",
        "ok_model",
        "a model of two tensors",
        build(model({"a": tensor(0, 1), "b": tensor(1, 3)}, b"xyz"), lab, [clinic]).join(),
    )
    return found


def main() -> None:
    """Write the identities and the vectors, in place of those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    directory = parser.parse_args().output_dir
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*directory.glob("*.txt"), *directory.glob("*.key")]:
        path.unlink()
    lab, clinic, other = (Identity.generate(f"test-only-{name}", "x25519") for name in ("lab", "clinic", "other"))
    hybrid = Identity.generate("test-only-hybrid")
    for identity in (clinic, hybrid):
        (directory / f"{identity.public.name}.key").write_bytes(identity.to_bytes() + b"\n")
    for name, (expect, what, data) in make(lab, clinic, other, hybrid).items():
        body = "\n".join(textwrap.wrap(base64.b64encode(data).decode(), 120))
        text = f"expect: {expect}\nwhat: {what}\nidentity: {clinic.public.name}.key\n\n{body}\n"
        (directory / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main()
