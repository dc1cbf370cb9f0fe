"""Identities that all tests of sealed files share."""

from types import SimpleNamespace

import pytest

from obfuscatune.parties.identity import Identity


@pytest.fixture(scope="session")
def party() -> SimpleNamespace:
    """Who seals (lab), two who can open (clinic, enclave), and one who cannot (other)."""
    return SimpleNamespace(
        lab=Identity.generate("lab", "x25519"),
        clinic=Identity.generate("clinic", "x25519"),
        enclave=Identity.generate("enclave"),
        other=Identity.generate("other", "x25519"),
    )
