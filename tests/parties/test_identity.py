"""Identities: signing, sealing, files, every refusal; and no secret in a repr or an error."""

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError, SealError, UsageError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import SUITES, Identity, PublicIdentity, SuiteName

ALICE, BOB = Identity.generate("alice"), Identity.generate("bob", "x25519")
BOTH = pytest.mark.parametrize("identity", [ALICE, BOB], ids=lambda identity: identity.public.suite)


def secrets_of(identity: Identity) -> list[str]:
    raw = identity._secret
    return [raw.hex(), base64.b64encode(raw).decode(), str(raw)[2:-1], raw[:32].hex(), raw[-32:].hex()]


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


@BOTH
@given(message=st.binary(max_size=50), context=st.text("abc ", max_size=6))
def test_signature(identity: Identity, message: bytes, context: str) -> None:
    signature = identity.sign(context, message)
    assert len(signature) == 64
    assert identity.public.verify(signature, context, message)
    assert not identity.public.verify(signature, context, message + b"\0")
    assert not identity.public.verify(signature, context + "x", message)
    other = BOB if identity is ALICE else ALICE
    assert not other.public.verify(signature, context, message)


def test_a_message_does_not_reach_into_the_context() -> None:
    signature = ALICE.sign("job", b"x")
    assert not ALICE.public.verify(signature, "jo", b"b 1\0x")
    assert not ALICE.public.verify(signature, "", b"job 1\0x")


@given(st.binary(max_size=80))
def test_arbitrary_signature(signature: bytes) -> None:
    assert not ALICE.public.verify(signature, "job", b"x")


def test_a_key_that_is_no_point_verifies_nothing() -> None:
    nobody = PublicIdentity("nobody", b"\xff" * 32, "x25519", BOB.public.sealing_key)
    assert not nobody.verify(bytes(64), "job", b"x")


@BOTH
@settings(max_examples=20)
@given(data=st.binary(max_size=40), info=st.binary(max_size=20))
def test_wrap(identity: Identity, data: bytes, info: bytes) -> None:
    wrapped = identity.public.wrap(data, info)
    assert identity.unwrap(wrapped, info) == data
    assert wrapped != identity.public.wrap(data, info)
    for bad, context in [(wrapped, info + b"x"), (wrapped[:-1], info), (wrapped + b"\0", info), (b"", info)]:
        with pytest.raises(SealError):
            identity.unwrap(bad, context)
    other = Identity.generate("other", identity.public.suite)
    with pytest.raises(SealError, match="not sealed to this identity"):
        other.unwrap(wrapped, info)


@BOTH
@given(wrapped=st.binary(max_size=1300))
def test_arbitrary_wrapped(identity: Identity, wrapped: bytes) -> None:
    with pytest.raises(SealError):
        identity.unwrap(wrapped, b"")


@pytest.mark.parametrize("suite", SUITES)
def test_a_sealing_key_that_is_none(suite: SuiteName) -> None:
    size = len((ALICE if suite == ALICE.public.suite else BOB).public.sealing_key)
    with pytest.raises(FormatError, match="sealing key that is none"):  # all zeros: no secret is shared with it
        PublicIdentity("zero", bytes(32), suite, bytes(size)).wrap(b"data key", b"")


@BOTH
def test_files(identity: Identity, tmp_path: Path) -> None:
    secret = write(tmp_path / "a.key", identity.to_bytes() + b"\n")
    public = write(tmp_path / "a.pub", encode(identity.public.to_dict()) + b"\n", 0o644)
    loaded = Identity.load(secret)
    assert loaded.public == identity.public == PublicIdentity.load(public)
    assert loaded.public.fingerprint == PublicIdentity.load(public).fingerprint
    assert identity.public.verify(loaded.sign("job", b"x"), "job", b"x")
    assert loaded.unwrap(identity.public.wrap(b"k", b"i"), b"i") == b"k"
    locked = write(tmp_path / "b.key", identity.lock("correct horse battery"))
    for wrong in (secret, locked):
        with pytest.raises(FormatError, match="is a secret key") as refused:
            PublicIdentity.load(wrong)
        assert "party rotate" in str(refused.value)


def test_fingerprints_differ_where_anything_does() -> None:
    public = BOB.public
    variants = [
        public,
        PublicIdentity("bobby", public.signing_key, public.suite, public.sealing_key),
        PublicIdentity(public.name, bytes(32), public.suite, public.sealing_key),
        PublicIdentity(public.name, public.signing_key, public.suite, bytes(32)),
        ALICE.public,
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644])
def test_a_secret_that_others_can_reach_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="readable by others"):
        Identity.load(write(tmp_path / "a.key", ALICE.to_bytes(), mode))


def test_a_public_identity_in_the_place_of_a_secret_one_is_named_so(tmp_path: Path) -> None:
    """And nobody is told to hide it, whoever can read it."""
    with pytest.raises(UsageError, match="public identity: expected the secret one") as caught:
        Identity.load(write(tmp_path / "a.pub", encode(ALICE.public.to_dict()) + b"\n", 0o644))
    assert "chmod" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        PublicIdentity.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="cannot read"):
        PublicIdentity.load(tmp_path)
    with pytest.raises(UsageError, match="too long"):
        PublicIdentity.load(write(tmp_path / "long", b"x" * 20_000))


def changed(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(fields), **more}


@pytest.mark.parametrize(
    "more",
    [
        {"format": "obfuscatune identity 2"},
        {"comment": "x"},
        {"name": ""},
        {"name": "a b"},
        {"name": "../a"},
        {"name": "a\n"},
        {"name": "a" * 65},
        {"name": 7},
        {"suite": "rsa"},
        {"suite": "x25519"},  # the key has another suite's size
        {"suite": None},
        {"signing_key": ""},
        {"signing_key": base64.b64encode(bytes(31)).decode()},
        {"signing_key": base64.b64encode(bytes(32)).decode()[:-2] + "B="},
        {"signing_key": base64.b64encode(bytes(32)).decode() + "\n"},
        {"signing_key": None},
        {"sealing_key": base64.b64encode(bytes(1215)).decode()},
    ],
)
def test_public_fields_are_checked(more: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        PublicIdentity.from_dict(changed(ALICE.public.to_dict(), **more))


@pytest.mark.parametrize("fields", [None, [], "x", {}, 1])
def test_what_is_no_identity(fields: object) -> None:
    with pytest.raises(FormatError):
        PublicIdentity.from_dict(fields)


def test_the_halves_must_belong_together() -> None:
    fields = json.loads(BOB.to_bytes())
    fields["public"] = Identity.generate("bob", "x25519").public.to_dict()
    with pytest.raises(FormatError, match="do not belong together"):
        Identity.from_bytes(encode(fields), "file")
    fields = json.loads(BOB.to_bytes())
    fields["public"]["name"] = "eve"  # the name is in the fingerprint, but no key fixes it
    assert Identity.from_bytes(encode(fields), "file").public.fingerprint != BOB.public.fingerprint


@BOTH
def test_every_tampered_byte_of_a_secret_is_noticed(identity: Identity) -> None:
    data = bytearray(identity.to_bytes())
    noticed = 0
    for place in range(0, len(data), 7):
        data[place] ^= 1
        try:
            found = Identity.from_bytes(bytes(data), "file").public
        except FormatError as error:
            noticed += 1
            assert not any(secret in str(error) for secret in secrets_of(identity))
        else:  # a letter of the name, which makes another identity; or a bit that X25519 ignores (RFC 7748, 5)
            assert found.name != identity.public.name or found == identity.public
        data[place] ^= 1
    assert noticed > 0.9 * len(range(0, len(data), 7))


@pytest.mark.parametrize("data", [b"", b"{}", encode(ALICE.public.to_dict()), encode({"secret": "canary"})])
def test_what_is_no_secret_identity(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        Identity.from_bytes(data, "file")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(("name", "suite"), [("", "x25519"), ("a/b", "x25519"), ("a", "rsa")])
def test_generate_refuses(name: str, suite: Any) -> None:
    with pytest.raises(UsageError):
        Identity.generate(name, suite)


@BOTH
def test_no_secret_in_a_repr(identity: Identity) -> None:
    shown = f"{identity!r} {identity} {[identity]} {identity.public!r}"
    assert not any(secret in shown for secret in secrets_of(identity))
    assert any(secret in identity.to_bytes().decode() for secret in secrets_of(identity))  # the control
    assert identity.public.fingerprint[:16] in repr(identity)
