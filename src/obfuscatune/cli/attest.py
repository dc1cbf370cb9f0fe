"""``obfuscatune attest``: what evidence of an enclave says, and whether a policy accepts it."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from obfuscatune.cli.connecting import SIMULATION_FLAG, SIMULATION_HELP, load_evidence, load_policy
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_new_file
from obfuscatune.durable import write_new
from obfuscatune.errors import FormatError, UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from obfuscatune.parties.attestation.evidence import Kind as EvidenceKind
    from obfuscatune.parties.attestation.evidence import Quote
    from obfuscatune.parties.attestation.verdict import Verdict

HELP = "Judge evidence of an enclave, show what it says, compute measurements to allow."
_UNVERIFIED = "# Of a quote that was not verified: use this only if you trust the machine that it comes from."
QUOTE_PANEL = "A bare quote instead of EVIDENCE: judged, never accepted"

Kind = Literal["sgx", "tdx", "snp", "nitro", "azure", "gpu"]
_SIMULATED = {"tdx": "mrtd", "snp": "measurement"}  # what the simulator's quotes have the measurement in


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
class ShowOptions:
    """Options of ``obfuscatune attest show``."""

    evidence: Path = argument("evidence file of an enclave")


@takes(ShowOptions)
def show(options: ShowOptions) -> None:
    """Print what evidence says of itself. Nothing of it is verified."""
    from obfuscatune.parties.attestation.claims import EnclaveClaims

    evidence = load_evidence(options.evidence)
    claims = EnclaveClaims.from_dict(dict(evidence.claims))
    print("NOT VERIFIED: this is what the file says of itself; `attest verify` judges it\n")
    lines = {
        "kind": evidence.quote.kind,
        "enclave": f"{claims.identity.name}  {claims.identity.fingerprint}",
        "tls key": claims.tls_key,
        "nonce": claims.nonce or "none",
        "issued": claims.issued,
        "version": claims.version,
        "quote": f"{len(evidence.quote.quote)} bytes",
        **{f"with {name!r}": f"{len(data)} bytes" for name, data in evidence.quote.extras.items()},
        **_peek(evidence.quote),
        **_peek_gpu(evidence.quote),
    }
    _table(lines)


def _peek(quote: "Quote") -> dict[str, str]:
    """Return what a quote says, not verified; of a TPM the key, as a policy names it."""
    from obfuscatune.parties.attestation import azure, dcap, nitro, snp
    from obfuscatune.parties.attestation.fields import parsing

    if quote.kind == "tpm":
        return {"key": key} if (key := _key_hash(quote.extras.get("key", b""))) else {}
    peek = {"snp": snp.peek, "nitro": nitro.peek, "azure": azure.peek}.get(quote.kind, dcap.peek)
    with parsing("quote"):
        return peek(quote.quote)


def _peek_gpu(quote: "Quote") -> dict[str, str]:
    from obfuscatune.parties.attestation import gpu, gpu_report

    if gpu.REPORT not in quote.extras:
        return {}
    report = gpu_report.parse(quote.extras[gpu.REPORT])
    return {"gpu driver": report.driver, "gpu vbios": report.vbios, "gpu nonce": report.nonce.hex()}


def _key_hash(pem: bytes) -> str:
    import hashlib

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return ""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """Options of ``obfuscatune attest measure``."""

    event_log: Path | None = option("TDX event log (CCEL) of a boot that you trust", None)
    quote: Path | None = option("quote or report of a machine that you trust", None)
    kind: Kind = option("of the quote, or of the simulator", "tdx")
    simulation: bool = option("measure this program, as the simulator does", False)


@takes(MeasureOptions)
def measure(options: MeasureOptions) -> None:
    """Print a policy's table of measurements: from a TDX event log, from a quote, or for this program.

    From a GPU's report: the file that a policy names as gpu.reference.
    """
    from obfuscatune.parties.attestation.policy import MEASUREMENTS

    if options.kind == "gpu":
        if options.quote is None:
            raise UsageError("nothing to measure", expected="--quote, a report of a GPU")
        print(f"{_UNVERIFIED}\n{_gpu_reference(options.quote)}")
        return
    found: dict[str, str] = {}
    if options.quote is not None:
        found |= _measured_by_quote(options.quote, options.kind)
    if options.event_log is not None:
        replayed = _replay(options.event_log)
        differ = [name for name, value in replayed.items() if found.get(name, value) != value]
        if differ:
            raise FormatError("the event log does not give the quote's registers", got=", ".join(differ))
        found |= replayed
    if options.simulation:
        from obfuscatune.parties.attestation.measurement import measure_code

        if options.kind not in _SIMULATED:
            raise UsageError("kind of the simulator", got=options.kind, expected=f"--kind {' or '.join(_SIMULATED)}")
        found[_SIMULATED[options.kind]] = measure_code().hex()
    names = {name for kind in MEASUREMENTS.values() for name in kind}
    if not found:
        raise UsageError("nothing to measure", expected="--event_log, --quote or --simulation")
    if options.quote is not None:
        print(_UNVERIFIED)
    print("[measurements]")
    for name, value in found.items():
        if name in names:
            print(f'{name} = ["{value}"]')


def _gpu_reference(path: Path) -> str:
    from obfuscatune.parties.attestation.gpu_reference import write_reference
    from obfuscatune.parties.attestation.gpu_report import MAX_REPORT_BYTES, parse
    from obfuscatune.parties.files import read_small

    return write_reference(parse(read_small(path, MAX_REPORT_BYTES, "report")))


def _measured_by_quote(path: Path, kind: "EvidenceKind") -> Mapping[str, str]:
    from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Quote
    from obfuscatune.parties.files import read_small

    return _peek(Quote(kind, read_small(path, MAX_QUOTE_BYTES, "quote")))


def _replay(path: Path) -> dict[str, str]:
    from obfuscatune.parties.attestation import eventlog
    from obfuscatune.parties.files import read_small

    return eventlog.replay(eventlog.read(read_small(path, eventlog.MAX_LOG_BYTES, "event log")))


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
    """Fetch Intel's collateral, which says which platforms are good, or show until when it is good itself.

    No other command connects for it: fetch it on a machine that may connect, and name the file in the policy.
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
    _table({name: f"good until {end:%Y-%m-%d %H:%M}" for name, end in ends.items()})
    print(f"all of it is good until {earliest:%Y-%m-%d %H:%M} UTC")
    if earliest <= datetime.now(UTC):
        print("EXPIRED: fetch it again")
        raise typer.Exit(1)


def _table(lines: Mapping[str, Any]) -> None:
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


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
    "show": (show, "Examples:\n\nobfuscatune attest show enclave.evidence"),
    "measure": (
        measure,
        "Examples:\n\nobfuscatune attest measure --event_log ccel.bin --quote tdx_quote\n\n"
        "obfuscatune attest measure --simulation",
    ),
}
