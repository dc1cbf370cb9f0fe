"""The C kernel takes a time that does not depend on secrets, except in lines that say so: asked of valgrind.

Valgrind knows no AVX-512, so this is about the functions for AVX2 and for any CPU.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import obfuscatune

_HERE, _PACKAGE = Path(__file__), Path(obfuscatune.__file__).parent
_KERNEL = _PACKAGE / "protocol" / "c" / "kernel.c"

pytestmark = pytest.mark.skipif(
    not (shutil.which("valgrind") and shutil.which("cc") and Path("/usr/include/valgrind/memcheck.h").exists()),
    reason="needs valgrind with its header, and a C compiler",
)


_KINDS = {"Conditional jump": "OPEN BRANCH", "Use of uninit": "OPEN PLACE"}


def lines_that_depend_on_secrets(source: str, tmp_path: Path) -> tuple[set[str], set[str]]:
    """Compile the kernel as the package is compiled, run it, and return the lines that do: marked, and not."""
    kernel, program = tmp_path / "kernel.c", tmp_path / "constant_time"
    kernel.write_text(source)
    project = tomllib.loads((_HERE.parents[2] / "pyproject.toml").read_text())
    flags = project["tool"]["setuptools"]["ext-modules"][0]["extra-compile-args"]
    harness = _HERE.with_name("constant_time.c")
    build = ["cc", *flags, "-g", f'-DKERNEL="{kernel}"', str(harness), "-o", str(program), "-lm"]
    subprocess.run(build, check=True)  # noqa: S603
    command = ["valgrind", "--error-limit=no", "--num-callers=6", str(program)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)  # noqa: S603
    assert run.returncode == 0, run.stderr[-1000:]
    lines, marked, unmarked = source.splitlines(), set(), set()
    _, *reports = re.split(f"({'|'.join(_KINDS)})", run.stderr)
    for kind, report in zip(reports[::2], reports[1::2], strict=True):
        # The innermost line of the kernel; above it there may be lines of the compiler's own headers.
        place = re.search(r"\(kernel\.c:(\d+)\)", report)
        assert place, report
        line = lines[int(place[1]) - 1]
        (marked if _KINDS[kind] in line else unmarked).add(f"{kind}: {line.strip()}")
    return marked, unmarked


def test_only_lines_that_say_so_depend_on_secrets(tmp_path: Path) -> None:
    marked, unmarked = lines_that_depend_on_secrets(_KERNEL.read_text(), tmp_path)
    assert len(marked) > 5  # such as that of a row that is not finite
    assert not unmarked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "other"),
    [
        # A branch that no compiler makes a conditional move of.
        ("(b - (prime & ((half - b) >> 31)))", '({ int32_t r = b; if (b > half) { __asm__(""); r -= prime; } r; })'),
        # And where factors are so large that a sum of residues takes two passes.
        ("own = part, w0 = 1,", "own = part, part[0] += table[part[1] & 255], w0 = 1,"),
        ("(r[j] + w0 * a[j]", "(r[j] + table[r[j] & 255] + w0 * a[j]"),
        ("int16_t c = (int16_t)(v - k * p - p / 2);", "int16_t c = (int16_t)(v - k * p - p / 2 + table[v & 255]);"),
    ],
)
def test_a_branch_and_a_table_that_depend_on_secrets_are_found(line: str, other: str, tmp_path: Path) -> None:
    source = _KERNEL.read_text()
    assert line in source
    source = source.replace(line, other).replace("#define TILE", "static volatile int8_t table[256];\n#define TILE", 1)
    _, unmarked = lines_that_depend_on_secrets(source, tmp_path)
    assert unmarked
