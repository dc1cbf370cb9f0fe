"""``python -m obfuscatune.studies.reproduce.gpu_check``: the equality checks and the cost with the worker on a GPU.

In under 8 minutes, float32 and bfloat16; exit code 0 if all is equal, 1 if something is not. Without CUDA it says so
and exits with 0: nothing was checked, and nothing failed.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.studies.reports.provenance import describe
from obfuscatune.studies.reports.tables import write_csv, write_markdown
from obfuscatune.studies.reproduce import cost
from obfuscatune.studies.reproduce.equality import CHECKED, FAILED, NOT_JUDGED, Row, check

DTYPES = ("float32", "bfloat16")
SECONDS = 420.0  # after which no measurement begins; the longest one takes a minute
SKIPPED = "skipped: no CUDA device here, so nothing was checked"


def run(
    output_dir: Path,
    *,
    device: str = "cuda",
    profiles: Sequence[str] = CHECKED,
    cost_preset: str | None = "gpu-check",
    seconds: float = SECONDS,
    command: Sequence[str] | None = None,
) -> int:
    """Check, print and keep the results, ``gpu-check.md`` and ``cost-DTYPE/``; return the exit code.

    Args:
        device: of the worker; ``cpu`` tries the check itself. cost_preset: of `cost`; None leaves the cost out.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print(SKIPPED)
        return 0
    end = time.monotonic() + seconds
    rows: list[Row] = []
    for dtype in DTYPES:
        for row in check(profiles, dtype=dtype, device=device):
            rows.append(row)
            print(f"{row['profile']}, {dtype}, {row['quantity']}: {row['error']:.2e} {row['verdict']}", flush=True)
    provenance = describe(["reproduce", "gpu-check"] if command is None else command, device=device)
    if torch.device(device).type == "cuda":
        provenance["device"] = f"{device}, {torch.cuda.get_device_name(device)}"
    write_csv(output_dir / "gpu-check.csv", rows)
    failed = [row for row in rows if row["verdict"] == FAILED]
    judged = [row for row in rows if row["verdict"] != NOT_JUDGED]
    counted = f"{len(failed)} of {len(judged)} comparisons failed, {len(rows) - len(judged)} are not judged"
    notes = [
        "error: of the protected model against the plain one in float64, relative to the largest entry. plain: that of "
        "the plain model in the same dtype on the same device.",
        "Losses of AdamW whose factors are on the worker: against a worker on the CPU under the same keys.",
        "naive is not judged: Gaussian keys lose digits, and a step in their coordinates is not one in plain ones.",
        f"{counted}.",
    ]
    write_markdown(output_dir / "gpu-check.md", "Equality with the worker on a device", rows, notes, provenance)
    if cost_preset is not None:
        for index, dtype in enumerate(DTYPES):
            left = (end - time.monotonic()) / (len(DTYPES) - index)
            path = cost.run(cost_preset, output_dir / f"cost-{dtype}", device=device, dtype=dtype, seconds=left)
            print(path)
    print(f"{counted}; results in {output_dir}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and run; 2 for misuse."""
    parser = argparse.ArgumentParser(prog="python -m obfuscatune.studies.reproduce.gpu_check", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("results/gpu-check"))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the check itself")
    parser.add_argument("--no_cost", action="store_true", help="equality only")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FutureWarning)  # of other packages, for their callers
    try:
        preset = None if options.no_cost else "gpu-check"
        return run(options.output_dir, device=options.device, cost_preset=preset)
    except ObfuscatuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
