"""``deploy/cvm/build.sh`` with a stand-in for mkosi: what it hands over, and what it takes out of the image."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
MIRROR = "http://archive.example/debian/20260101T000000Z"
# A unified image is a file with sections; the command line may end in a zero byte.
MKOSI = """#!/usr/bin/env bash
set -euo pipefail
printf %s "$*" > "$CALLED"
cd "$2"
printf x > mkosi.output/empty
printf 'a kernel' > mkosi.output/k
printf 'an initrd' > mkosi.output/i
printf 'roothash=00 quiet\\0' > mkosi.output/c
objcopy -I binary -O elf64-x86-64 --add-section .linux=mkosi.output/k --add-section .initrd=mkosi.output/i \\
  --add-section .cmdline=mkosi.output/c mkosi.output/empty mkosi.output/obfuscatune-enclave.efi
"""
# As that of binutils 2.44, which cannot write to a device.
OBJCOPY = f"""#!/usr/bin/env bash
[ "${{@: -1}}" != /dev/null ] || exit 1
exec {shutil.which("objcopy")} "$@"
"""


@pytest.mark.skipif(shutil.which("objcopy") is None, reason="objcopy is not installed")
def test_the_parts_of_the_image_are_those_that_are_measured(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    folder, wheels, tools = tmp_path / "deploy" / "cvm", tmp_path / "wheels", tmp_path / "bin"
    for path in (wheels, tools):
        path.mkdir()
    (wheels / "a.whl").write_bytes(b"wheel")
    for name, text in (("mkosi", MKOSI), ("objcopy", OBJCOPY)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    given = {"WHEELS": str(wheels), "MIRROR": MIRROR, "SOURCE_DATE_EPOCH": "1767225600", "PYTHON": sys.executable}
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called"), **given}
    command = ["bash", str(folder / "build.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "called").read_text().split() == [
        *("--directory", str(folder), "--mirror", MIRROR, "--source-date-epoch", "1767225600", "--force", "build")
    ]
    output = folder / "mkosi.output"
    assert [(output / name).read_bytes() for name in ("linux", "initrd", "cmdline.txt")] == [
        *(b"a kernel", b"an initrd", b"roothash=00 quiet")
    ]
    assert "wheels/a.whl" in (output / "inputs.sha256").read_text() and "  cmdline.txt" in done.stdout
    # One archive, as it was given, and none of updates or of debugging, which mkosi would add at places of its own.
    sources = (folder / "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources").read_text().splitlines()
    assert f"URIs: {MIRROR}" in sources and "Suites: trixie" in sources and len(sources) == 5
