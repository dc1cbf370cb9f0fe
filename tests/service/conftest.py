"""Simulated hardware, and a policy that accepts this program on it."""

import pytest

from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimulatedPlatform, Policy]:
    directory = tmp_path_factory.mktemp("simulated")
    platform = SimulatedPlatform.create(directory)
    path = directory / "policy.toml"
    path.write_text(
        f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{platform.measurements()["mrtd"]}"]\n'
        '[simulation]\nallow = true\nroot = "simulation-root.pem"\n'
    )
    return platform, Policy.load(path)
