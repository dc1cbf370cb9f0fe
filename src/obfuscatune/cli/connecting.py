"""What several verbs share: judging an enclave by a policy, and connecting to it."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obfuscatune.cli.options import option
from obfuscatune.errors import UsageError

if TYPE_CHECKING:
    from obfuscatune.parties.attestation.evidence import Evidence
    from obfuscatune.parties.attestation.policy import Policy
    from obfuscatune.parties.channel.client import AttestedChannel
    from obfuscatune.parties.enclave import Enclave
    from obfuscatune.parties.identity import PublicIdentity
    from obfuscatune.parties.party import Party

SIMULATION_FLAG = "--allow-simulation"
SIMULATION_HELP = "accept an enclave in a simulator, which protects nothing; the policy must allow it too"


@dataclass(frozen=True, kw_only=True)
class PartyOptions:
    """Whose folder."""

    party: Path = option("your folder, with the party.toml of `party init`", Path("."))


@dataclass(frozen=True, kw_only=True)
class EnclaveOptions(PartyOptions):
    """Which enclave, and who asks; what is not given is what party.toml says."""

    enclave: str | None = option("address of the enclave, tls://HOST:PORT", None)
    identity: Path | None = option("your NAME.key", None)
    policy: Path | None = option("TOML file that says which enclaves you accept", None)
    allow_simulation: bool = option(SIMULATION_HELP, False, flag=SIMULATION_FLAG)
    timeout: float = option("seconds for a connection, and for each reply", 60.0, min=1e-3, ceiling=1e6)

    def client(self, party: "Party | None" = None) -> "Enclave":
        """Return the enclave, which is judged by the policy at each connection; ``party``: of the folder, if open."""
        from obfuscatune.parties.enclave import Enclave
        from obfuscatune.parties.identity import Identity

        if self.enclave is not None and self.identity is not None and self.policy is not None:
            policy = load_policy(self.policy, self.allow_simulation)
            return Enclave(self.enclave, policy, Identity.load(self.identity), self.timeout)
        party = party or open_party(self.party)
        policy = party.policy if self.policy is None else load_policy(self.policy, self.allow_simulation)
        identity = party.identity if self.identity is None else Identity.load(self.identity)
        return Enclave(self.enclave or party.enclave_address, policy, identity, self.timeout, party.folder)

    def connect(self, fingerprint: str | None = None) -> "AttestedChannel":
        """Return a channel to the enclave if the policy accepts it, and to no other identity than ``fingerprint``."""
        return self.client().connect(fingerprint)


def open_party(folder: Path) -> "Party":
    """Return the party of a folder; says where it allows a simulator."""
    from obfuscatune.parties.party import Party

    party = Party.open(folder)
    if party.allow_simulation:
        print("SIMULATION: this party accepts a simulator, which protects nothing", file=sys.stderr)
    return party


def load_policy(path: Path, allow_simulation: bool) -> "Policy":
    """Return the policy of a file; simulation must be allowed in the file and on the command line, by name.

    Raises:
        UsageError: the file allows it and the command line does not; or as `Policy.load`.
    """
    from obfuscatune.parties.attestation.policy import Policy

    policy = Policy.load(path)
    if policy.allow_simulation and not allow_simulation:
        hint = f"{SIMULATION_FLAG} if that is meant: a simulator protects nothing"
        raise UsageError("policy allows simulation", where=str(path), hint=hint)
    return policy


def load_evidence(path: Path) -> "Evidence":
    """Return the evidence of a file, not judged yet; raises UsageError and FormatError."""
    from obfuscatune.parties.attestation.evidence import MAX_EVIDENCE_BYTES, Evidence
    from obfuscatune.parties.files import read_small

    return Evidence.from_bytes(read_small(path, MAX_EVIDENCE_BYTES, "evidence file").rstrip(b"\n"))


def attested_identity(evidence: Path, policy: Path, allow_simulation: bool) -> "PublicIdentity":
    """Return the identity of the enclave that evidence proves; raises AttestationError where it does not."""
    from obfuscatune.parties.attestation.verify import judge

    verdict = judge(load_evidence(evidence), load_policy(policy, allow_simulation))
    identity: PublicIdentity = verdict.require().identity
    return identity
