"""``obfuscatune attest show`` and ``measure``: what evidence says of itself, and the measurements of a policy."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from obfuscatune.cli.connecting import load_evidence
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.errors import FormatError, UsageError

if TYPE_CHECKING:
    from obfuscatune.parties.attestation.evidence import Kind as EvidenceKind
    from obfuscatune.parties.attestation.evidence import Quote

Kind = Literal["sgx", "tdx", "snp", "nitro", "azure", "gpu"]
_UNVERIFIED = "# Of a quote that was not verified: use this only if you trust the machine that it comes from."
_SIMULATED = {"tdx": "mrtd", "snp": "measurement"}  # what the simulator's quotes have the measurement in


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
    print_lines(lines)


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
        if name == "guest_svn":  # the least one: a number
            print(f"{name} = {value}")


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


def print_lines(lines: Mapping[str, Any]) -> None:
    """Print names and values as two columns."""
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


COMMANDS = {
    "show": (show, "Examples:\n\nobfuscatune attest show enclave.evidence"),
    "measure": (
        measure,
        "Examples:\n\nobfuscatune attest measure --event_log ccel.bin --quote tdx_quote\n\n"
        "obfuscatune attest measure --simulation",
    ),
}
