"""``obfuscatune attest``: what evidence of an enclave says, and whether a policy accepts it."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from obfuscatune.cli import measure
from obfuscatune.cli.connecting import SIMULATION_FLAG, SIMULATION_HELP, load_evidence, load_policy
from obfuscatune.cli.measure import Kind, print_lines
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_new_file
from obfuscatune.durable import write_new
from obfuscatune.errors import UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from obfuscatune.parties.attestation.verdict import Verdict

HELP = "Judge evidence of an enclave, show what it says, compute measurements to allow."
QUOTE_PANEL = "A bare quote instead of EVIDENCE: judged, never accepted"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of ``obfuscatune attest verify``."""

    evidence: Path | None = argument("evidence file of an enclave", None)
    policy: Path | None = option("your policy, TOML; required with EVIDENCE", None)
    nonce: str | None = option("64 hex digits that you sent", None)
    allow_simulation: bool = option(SIMULATION_HELP, False, flag=SIMULATION_FLAG)
    json: bool = option("print the verdict as JSON", False)
    time: int | None = option("judge at this Unix second instead of now", None, min=0)
    quote: Path | None = option("file of the raw quote or report", None, rich_help_panel=QUOTE_PANEL)
    kind: Kind | None = option("its kind", None, rich_help_panel=QUOTE_PANEL)
    collateral: Path | None = option(
        "collateral in dcap-qvl's JSON, for sgx and tdx; used instead of the policy's", None
    )
    certificates: list[Path] | None = option(
        "VCEK, ASK and ARK, if an snp report comes without them; the chain of a gpu; PEM or DER, repeatable", None
    )


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """Judge evidence by your policy, rule by rule; exit code 0: accepted, 1: refused, 2: misuse."""
    verdict = _judge_quote(options) if options.evidence is None else _judge_evidence(options.evidence, options)
    print(json.dumps(verdict.to_dict(), indent=2) if options.json else verdict)
    if not verdict.accepted:
        raise typer.Exit(1)


def _judge_evidence(path: Path, options: VerifyOptions) -> "Verdict":
    from obfuscatune.parties.attestation.verify import judge
    from obfuscatune.parties.channel.handshake import is_nonce

    if options.policy is None:
        raise UsageError("no policy", expected="--policy FILE", hint="docs/attestation.md has one to start from")
    if options.nonce is not None and not is_nonce(options.nonce):
        raise UsageError("not a nonce", got=repr(options.nonce), expected="--nonce with 64 lower-case hex digits")
    if any((options.quote, options.kind)):
        raise UsageError("EVIDENCE together with options of a bare quote", hint="evidence holds its quote")
    policy = load_policy(options.policy, options.allow_simulation)
    if options.collateral is not None:
        policy = replace(policy, collateral=_read_collateral(options.collateral).decode("utf-8", "replace"))
    if options.certificates:
        policy = replace(policy, certificates=b"".join(_pem(path) for path in options.certificates))
    return judge(load_evidence(path), policy, nonce=options.nonce, now=options.time)


def _judge_quote(options: VerifyOptions) -> "Verdict":
    from obfuscatune.parties.attestation import gpu
    from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Quote
    from obfuscatune.parties.attestation.policy import Policy
    from obfuscatune.parties.attestation.verify import judge_gpu_report, judge_quote
    from obfuscatune.parties.files import read_small

    if options.quote is None or options.kind is None or options.nonce is not None:
        raise UsageError("nothing to judge", expected="EVIDENCE, or --quote and --kind", hint="a quote has no nonce")
    policy = Policy(() if options.kind == "gpu" else (options.kind,))
    if options.policy is not None:
        policy = load_policy(options.policy, options.allow_simulation)
    extras = {}
    if options.collateral is not None:
        extras["collateral"] = _read_collateral(options.collateral)
    if options.certificates:
        extras["certificates"] = b"".join(_pem(path) for path in options.certificates)
    raw = read_small(options.quote, MAX_QUOTE_BYTES, "quote")
    if options.kind == "gpu":
        given = {gpu.REPORT: raw, gpu.CERTIFICATES: extras.get("certificates", b"")}
        return judge_gpu_report(given, policy, now=options.time)
    return judge_quote(Quote(options.kind, raw, extras), policy, now=options.time)


def _read_collateral(path: Path) -> bytes:
    from obfuscatune.parties.attestation.policy import MAX_COLLATERAL_BYTES
    from obfuscatune.parties.files import read_small

    return read_small(path, MAX_COLLATERAL_BYTES, "collateral")


def _pem(path: Path) -> bytes:
    from obfuscatune.parties.attestation.certificates import MAX_CHAIN_BYTES, to_pem
    from obfuscatune.parties.files import read_small

    data = read_small(path, MAX_CHAIN_BYTES, "certificates")
    return data if data.startswith(b"-----BEGIN ") else to_pem(data)


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Options of ``obfuscatune attest fetch``."""

    enclave: str = option("address of the enclave, tls://HOST:PORT")
    output: Path = option("file for the evidence; must not exist")
    timeout: float = option("seconds", 30.0, min=1e-3, ceiling=1e6)


@takes(FetchOptions)
def fetch(options: FetchOptions) -> None:
    """Fetch fresh evidence from an enclave, without saying who asks. It is not judged here: `attest verify` does that.

    Its claims name the nonce that was sent, and the TLS key of this very connection.
    """
    from obfuscatune.parties.channel.client import fetch_evidence

    check_new_file(options.output, "--output")
    evidence, nonce = fetch_evidence(options.enclave, timeout=options.timeout)
    try:
        write_new(options.output, evidence.to_bytes() + b"\n", mode=0o644)
    except OSError as error:
        raise UsageError("cannot write the evidence", got=error.strerror, where=str(options.output)) from None
    print(f"{options.output}  {evidence.quote.kind}  nonce {nonce}")


@dataclass(frozen=True, kw_only=True)
class CollateralOptions:
    """Options of ``obfuscatune attest collateral``."""

    action: Literal["fetch", "show"] = argument("fetch: from a service; show: until when a file is good")
    source: str = argument("fetch: URL of Intel's PCS or of a PCCS; show: the file", metavar="URL|FILE")
    quote: Path | None = option("fetch: a quote of the platform, or evidence with one", None)
    output: Path | None = option("fetch: file for the collateral; must not exist", None)
    timeout: float = option("seconds", 30.0, min=1e-3, ceiling=1e6)


@takes(CollateralOptions)
def collateral(options: CollateralOptions) -> None:
    """Fetch Intel's collateral (signed data on which platforms are up to date), or show when a file of it expires.

    No other command downloads collateral. Fetch it on a machine with network access, and name the file in the policy.
    """
    from obfuscatune.parties.attestation.collateral import fetch
    from obfuscatune.parties.attestation.collateral_dates import expiry
    from obfuscatune.parties.attestation.evidence import MAX_EVIDENCE_BYTES
    from obfuscatune.parties.files import read_small

    if options.action == "show":
        _show_expiry(expiry(_read_collateral(Path(options.source))))
        return
    if options.quote is None or options.output is None:
        raise UsageError("what to fetch collateral for", expected="--quote FILE and --output FILE")
    check_new_file(options.output, "--output")
    raw = read_small(options.quote, MAX_EVIDENCE_BYTES, "quote or evidence")
    if raw.startswith(b"{"):
        quote = load_evidence(options.quote).quote
        raw = quote.extras.get("td_quote", quote.quote)  # of Azure's machines the quote is beside the report
    text = fetch(options.source, raw, options.timeout)
    try:
        write_new(options.output, text, mode=0o644)
    except OSError as error:
        raise UsageError("cannot write the collateral", got=error.strerror, where=str(options.output)) from None
    _show_expiry(expiry(text))


def _show_expiry(ends: "Mapping[str, datetime]") -> None:
    from datetime import UTC, datetime

    earliest = min(ends.values())
    print_lines({name: f"good until {end:%Y-%m-%d %H:%M}" for name, end in ends.items()})
    print(f"all of it is good until {earliest:%Y-%m-%d %H:%M} UTC")
    if earliest <= datetime.now(UTC):
        print("EXPIRED: fetch it again")
        raise typer.Exit(1)


COMMANDS = {
    "fetch": (
        fetch,
        "Examples:\n\nobfuscatune attest fetch --enclave tls://cloud.example:7443 --output enclave.evidence",
    ),
    "collateral": (
        collateral,
        "Examples:\n\nobfuscatune attest collateral fetch https://api.trustedservices.intel.com "
        "--quote enclave.evidence --output collateral.json\n\nobfuscatune attest collateral show collateral.json",
    ),
    "verify": (
        verify,
        "Examples:\n\nobfuscatune attest verify enclave.evidence --policy clinic.toml\n\n"
        "obfuscatune attest verify --quote tdx_quote --kind tdx --collateral collateral.json --time 1750331763",
    ),
    **measure.COMMANDS,
}
