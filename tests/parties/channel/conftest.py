"""Enclaves on a simulated platform, their parties, and policies that accept the simulator or refuse it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import ConsentError
from obfuscatune.parties.attestation.evidence import Attester
from obfuscatune.parties.attestation.platform import open_platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.channel import AttestedServer
from obfuscatune.parties.identity import Identity, PublicIdentity


@dataclass
class Enclave:
    """A server in a thread of this process, and what it was asked to do."""

    identity: Identity
    attester: Attester
    server: AttestedServer
    handled: list[tuple[str, dict[str, Any], int]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.server.address


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("platform") / "simulation"


@pytest.fixture(scope="session")
def platform(simulation: Path) -> SimulatedPlatform:
    platform = open_platform(f"simulation:{simulation}")
    assert isinstance(platform, SimulatedPlatform)
    return platform


@pytest.fixture(scope="session")
def policy(simulation: Path, platform: SimulatedPlatform) -> Policy:
    """Accepts this program on this simulated platform."""
    return _policy(simulation, platform, '[simulation]\nallow = true\nroot = "simulation-root.pem"\n')


@pytest.fixture(scope="session")
def production(simulation: Path, platform: SimulatedPlatform) -> Policy:
    """Accepts this program on genuine hardware only."""
    return _policy(simulation, platform, "")


def _policy(simulation: Path, platform: SimulatedPlatform, more: str) -> Policy:
    path = simulation / "policy.toml"
    path.write_text(
        f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{platform.measurements()["mrtd"]}"]\n{more}'
    )
    return Policy.load(path)


@pytest.fixture(scope="session")
def owner() -> Identity:
    return Identity.generate("owner")


@pytest.fixture
def start(platform: SimulatedPlatform, owner: Identity) -> Iterator[Callable[..., Enclave]]:
    """Start an enclave that knows the owner; all of them end with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            handle: Callable[..., Any] | None = None, *, attester: Attester | None = None, **options: Any
        ) -> Enclave:
            handled: list[tuple[str, dict[str, Any], int]] = []

            def echo(client: PublicIdentity, fields: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
                handled.append((client.fingerprint, fields, len(payload)))
                if fields.get("op") == "refuse":
                    raise ConsentError("job is used up", hint="make a new one")
                if fields.get("op") == "fail":
                    raise ValueError("canary")
                return {"echo": fields}, payload

            identity, attester = Identity.generate("enclave"), attester or platform.attester
            options = {"allow": lambda client: client == owner.public, **options}
            server = AttestedServer(
                "tls://127.0.0.1:0", identity=identity, attester=attester, handle=handle or echo, **options
            )
            thread = threading.Thread(target=server.serve_forever)
            thread.start()

            def stop() -> None:
                server.close()
                thread.join(20)
                assert not thread.is_alive()

            stack.callback(stop)
            return Enclave(identity, attester, server, handled)

        yield start


@pytest.fixture
def enclave(start: Callable[..., Enclave]) -> Enclave:
    return start()
