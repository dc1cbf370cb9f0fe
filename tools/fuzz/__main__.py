"""Fuzz every parser with atheris: ``python tools/fuzz [--seconds N] [TARGET ...]``, or ``make fuzz``.

Each target runs in a process of its own, from a corpus in a temporary directory, guided by the coverage of the package.
An input that is a finding (target.py), takes more than 10 seconds or 4 GiB is kept in ``build/fuzz`` and printed.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FINDINGS = Path("build/fuzz")
SLOW_SECONDS, MEMORY_MIB = 10, 4096


def fuzz_one(name: str, seconds: int, scratch: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["obfuscatune"]):
        from mutate import mutate
        from targets import TARGETS

        target = TARGETS[name](scratch)
    corpus = scratch / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.inputs):
        (corpus / f"seed-{number}").write_bytes(seed)

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        choose = random.Random(seed)  # noqa: S311 - not for a key
        return bytes(atheris.Mutate(data, max_size) if choose.random() < 0.5 else mutate(data, choose)[:max_size])

    FINDINGS.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={2 * max(map(len, target.inputs)) + 1024}",
        f"-timeout={SLOW_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={FINDINGS}/{name}-",
        "-print_final_stats=1",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], target.run, custom_mutator=custom)
    atheris.Fuzz()


def fuzz_all(names: list[str], seconds: int) -> int:
    """Fuzz the targets one after another; 0 where nothing was found."""
    findings = 0
    for name in names:
        start = time.monotonic()
        command = [sys.executable, __file__, "--one", "--seconds", str(seconds), name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        runs = next((line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line), "?")
        print(f"{name:16} {runs:>9} inputs in {time.monotonic() - start:4.0f} s  ", end="")
        print("nothing found" if done.returncode == 0 else f"FOUND (exit code {done.returncode})", flush=True)
        if done.returncode:
            findings += 1
            lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(("#", "stat::"))]
            print("\n".join(lines[-40:]))
    return 1 if findings else 0


def main() -> int:
    """Parse the options; 0 where nothing was found, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python tools/fuzz", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", help="default: all")
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as scratch:
            fuzz_one(options.targets[0], options.seconds, Path(scratch))
        return 0
    from targets import TARGETS

    unknown = sorted(set(options.targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}: known are {', '.join(TARGETS)}")
    return fuzz_all(options.targets or list(TARGETS), options.seconds)


if __name__ == "__main__":
    sys.exit(main())
