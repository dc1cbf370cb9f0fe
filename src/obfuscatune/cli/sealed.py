"""``obfuscatune sealed``: look at sealed files, open them, measure what they cost."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_place
from obfuscatune.cli.table import print_table
from obfuscatune.errors import SealError

HELP = "Look at sealed files without keys, open those that are sealed to you, measure what they cost."


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of ``obfuscatune sealed inspect``."""

    file: Path = argument("a sealed file", metavar="FILE")
    json: bool = option("print JSON", False)


@takes(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Verify the signature and print what everybody can see: kind, sizes, sender, recipients, terms, digest."""
    facts = _facts(options.file)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            shown = json.dumps(line, ensure_ascii=True) if isinstance(line, dict) else line
            print(f"{name.replace('_', ' '):14} {'none' if line is None else shown}")


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """Options of ``obfuscatune sealed open``."""

    file: Path = argument("a sealed file", metavar="FILE")
    identity: Path = option("your NAME.key")
    output_dir: Path = option("new directory for what is in it, mode 0700")
    sender: Path | None = option("NAME.pub of the sender that you expect; any other is refused", None)


@takes(OpenOptions)
def open_(options: OpenOptions) -> None:
    """Open a file that is sealed to you: all of it is verified, or nothing is written."""
    from obfuscatune.parties.identity import Identity, PublicIdentity
    from obfuscatune.parties.sealed.archive import SealedArchive
    from obfuscatune.parties.sealed.extract import extract
    from obfuscatune.parties.sealed.reader import SealedReader

    check_place(options.output_dir, f"--output_dir {options.output_dir}")
    expected = PublicIdentity.load(options.sender) if options.sender is not None else None
    with SealedReader(options.file, Identity.load(options.identity)) as reader:
        sender = reader.sender
        if expected is not None and sender != expected:
            got = f"{sender.name} ({sender.fingerprint[:16]}...)"
            raise SealError("sealed by somebody else", got=got, expected=f"{expected.name}, {expected.fingerprint}")
        archive = SealedArchive(reader)
        extract(archive, options.output_dir, progress=sys.stderr.isatty())
        print(f"{options.output_dir}: {reader.header.kind}, {', '.join(archive.names())}")
    print(f"sealed by {sender.name}  {sender.fingerprint}", file=sys.stderr)
    if expected is None:
        print("compare this fingerprint: anybody can seal a file to you, under any name", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of ``obfuscatune sealed bench``."""

    size_mb: int = option("megabytes to seal", 1024, min=1, max=1_000_000)
    repetitions: int = option("passes", 5, min=1)


@takes(BenchOptions)
def bench(options: BenchOptions) -> None:
    """Measure sealing and opening on one thread, with files in the directory for temporary ones."""
    from obfuscatune.parties.sealed.measure import measure

    with tempfile.TemporaryDirectory() as directory:
        passes = list(measure(Path(directory), options.size_mb * 1_000_000, options.repetitions))
    rows = []
    for what in ("seal", "open"):
        own = [one for one in passes if one.what == what]
        rates = [one.megabytes_per_second for one in own]
        cpu = statistics.median(one.cpu_megabytes_per_second for one in own)
        figures = [f"{rate:.0f}" for rate in (statistics.median(rates), min(rates), max(rates), cpu)]
        rows.append((what, *figures, f"{max(one.peak_growth_bytes for one in own) / 1e6:.1f} MB"))
    title = f"{options.size_mb} MB, {options.repetitions} passes, one thread; MB/s of payload"
    print_table(title, ("", "median", "slowest", "fastest", "median of CPU time", "peak memory added"), rows)


def _facts(path: Path) -> dict[str, Any]:
    from obfuscatune.parties.sealed.fields import FORMAT
    from obfuscatune.parties.sealed.header import read_header

    signed = read_header(path)
    header = signed.header
    return {
        "format": FORMAT,
        "kind": header.kind,
        "digest": signed.digest,
        "signature": "valid",  # anything else is an error
        "sender": {"name": header.sender.name, "fingerprint": header.sender.fingerprint},
        "created": header.created,
        "payload_bytes": header.payload_bytes,
        "chunk_bytes": header.chunk_bytes,
        "file_bytes": signed.file_bytes,
        "recipients": [recipient.fingerprint for recipient in header.recipients],
        "terms": header.terms,
    }


COMMANDS = {
    "inspect": (inspect, "Examples:\n\nobfuscatune sealed inspect model.sealed --json"),
    "open": (
        open_,
        "Examples:\n\nobfuscatune sealed open adapter.sealed --identity clinic.key --sender enclave.pub "
        "--output_dir adapter",
    ),
    "bench": (bench, "Examples:\n\nobfuscatune sealed bench --size_mb 1024"),
}
