"""Claims: what they take and give back, and that nothing else is taken."""

import pytest

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.canonical import decode, encode

from .enclaves import claims


def test_claims_come_back_from_their_canonical_form() -> None:
    for nonce in ("", "ab" * 32):
        made = claims(nonce=nonce)
        assert EnclaveClaims.from_dict(decode(encode(made.to_dict()), "claims")) == made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "obfuscatune enclave claims 2"),
        ("tls_key", ""),
        ("tls_key", "AB" * 32),
        ("tls_key", b"ab" * 32),
        ("tls_key", "ab" * 32 + "\n"),
        ("nonce", "ab" * 31),
        ("nonce", None),
        ("issued", -1),
        ("issued", 1 << 63),
        ("issued", 1.5),
        ("issued", True),
        ("version", "1\x1b[2J"),
        ("version", ""),
        ("identity", {}),
        ("identity", None),
        ("more", 1),
    ],
)
def test_other_claims_are_refused(name: str, value: object) -> None:
    with pytest.raises(FormatError):
        EnclaveClaims.from_dict({**claims().to_dict(), name: value})


@pytest.mark.parametrize("name", list(claims().to_dict()))
def test_every_field_is_required(name: str) -> None:
    fields = claims().to_dict()
    del fields[name]
    with pytest.raises(FormatError):
        EnclaveClaims.from_dict(fields)


@pytest.mark.parametrize("value", [None, [], "claims", 3])
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        EnclaveClaims.from_dict(value)
