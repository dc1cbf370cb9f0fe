"""Simulated platforms, made once: two RSA keys take seconds."""

import pytest

from obfuscatune.parties.attestation.simulator import SimulatedPlatform


@pytest.fixture(scope="session")
def simulated_tdx(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("hardware") / "tdx")


@pytest.fixture(scope="session")
def simulated_snp(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("hardware") / "snp", "snp")
