"""What a judgement says: the rules one by one, and whether all of them held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.claims import EnclaveClaims


@dataclass(frozen=True)
class Rule:
    """One rule: ``passed`` is None where it was not judged. ``got`` and ``expected`` are safe to print."""

    name: str
    passed: bool | None
    got: str
    expected: str


@dataclass(frozen=True)
class Checked:
    """What the module of one format found in a quote.

    Attributes:
        rules: signature, certificates, state of the platform; at least one.
        report_data: what the verified quote binds; None where its signature was not verified.
        measurements: names of policy files to hex (isv_prod_id, isv_svn, guest_svn: decimal); empty where unverified.
        simulation: the quote is genuine under a root or key that the policy lists for simulation only.
    """

    rules: Sequence[Rule]
    report_data: bytes | None = None
    measurements: Mapping[str, str] = field(default_factory=dict)
    simulation: bool = False


@dataclass(frozen=True)
class Verdict:
    """The judgement of one piece of evidence by one policy.

    Attributes:
        rules: every rule that was judged, in order, and those that could not be.
        claims: what the evidence says, only where a verified quote binds it; good for use only if ``accepted``.
        measurements: those of the verified quote, by the names of policy files.
        simulation: the quote comes from a simulator, which protects nothing.
    """

    rules: Sequence[Rule]
    claims: EnclaveClaims | None = None
    measurements: Mapping[str, str] = field(default_factory=dict)
    simulation: bool = False

    @property
    def failed(self) -> list[Rule]:
        """The rules that did not hold."""
        return [rule for rule in self.rules if rule.passed is False]

    @property
    def accepted(self) -> bool:
        """No rule failed, and a verified quote binds the claims."""
        return not self.failed and self.claims is not None

    def require(self) -> EnclaveClaims:
        """Return the claims of accepted evidence.

        Raises:
            AttestationError: refused; names the first rule that failed.
        """
        if self.accepted and self.claims is not None:
            return self.claims
        if self.failed:
            rule = self.failed[0]
            raise AttestationError(f"evidence refused by the rule '{rule.name}'", got=rule.got, expected=rule.expected)
        raise AttestationError(
            "evidence without claims of an enclave", hint="a bare quote says nothing about a channel"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``attest verify --json`` prints."""
        return {
            "accepted": self.accepted,
            "claims": None if self.claims is None else self.claims.to_dict(),
            "measurements": dict(self.measurements),
            "rules": [vars(rule) for rule in self.rules],
            "simulation": self.simulation,
        }

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: "not judged"}
        lines = []
        for rule in self.rules:
            lines.append(f"{marks[rule.passed]:10}  {rule.name:14}  {rule.got}")
            if rule.passed is False:
                lines.append(f"{'':10}  {'':14}  expected: {rule.expected}")
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        simulated = "; SIMULATION, it protects nothing" if self.simulation else ""
        if self.accepted:
            return f"accepted{simulated}"
        names = ", ".join(rule.name for rule in self.failed) or "no claims of an enclave"
        return f"refused: {names}{simulated}"
