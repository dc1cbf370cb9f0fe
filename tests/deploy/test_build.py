"""``build.sh`` of the image and of Gramine with stand-ins for their tools: what they hand over, and refuse."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
MIRROR = "http://archive.example/debian/20260101T000000Z"
# A unified image is a file with sections; the command line may end in a zero byte.
MKOSI = """#!/usr/bin/env bash
set -euo pipefail
[ "$1" != --version ] || { echo "mkosi 25.3"; exit; }
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


WORKER = f"tls://192.0.2.2:7000#{'5d' * 32}"
GRAMINE_MANIFEST = """#!/usr/bin/env python
import sys
sys.path.insert(0, DEPLOY)
import manifest
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("-D"))
assert set(given) == set(manifest.EXAMPLE)
open(sys.argv[-1], "w").write(manifest.render_manifest(**given))
"""
GRAMINE_SIGN = """#!/usr/bin/env bash
cp "$4" "$6"
printf 'no signature' > "${6%.manifest.sgx}.sig"
"""


def run(script: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(script), *([] if script.parent.name == "cvm" else [str(script.parents[2] / "out")])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603


def place(tools: Path, **programs: str) -> None:
    tools.mkdir()
    for name, text in programs.items():
        (tools / name.replace("_", "-")).write_text(text)
        (tools / name.replace("_", "-")).chmod(0o755)


@pytest.mark.skipif(shutil.which("objcopy") is None, reason="objcopy is not installed")
def test_the_parts_of_the_image_are_those_that_are_measured(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    folder, wheels, tools = tmp_path / "deploy" / "cvm", tmp_path / "wheels", tmp_path / "bin"
    wheels.mkdir()
    (wheels / "a.whl").write_bytes(b"wheel")
    place(tools, mkosi=MKOSI, objcopy=OBJCOPY)
    given = {"WHEELS": str(wheels), "MIRROR": MIRROR, "SOURCE_DATE_EPOCH": "1767225600", "PYTHON": sys.executable}
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLED": str(tmp_path / "called"), **given}
    environment |= {"WORKER": WORKER, "PLATFORM": "tpm", "ARGUMENTS": "--max_store_gb 20"}
    done = run(folder / "build.sh", environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "called").read_text().split() == [
        *("--directory", str(folder), "--mirror", MIRROR, "--source-date-epoch", "1767225600", "--force", "build")
    ]
    output = folder / "mkosi.output"
    assert [(output / name).read_bytes() for name in ("linux", "initrd", "cmdline.txt")] == [
        *(b"a kernel", b"an initrd", b"roothash=00 quiet")
    ]
    hashed = {line.split()[1] for line in (output / "inputs.sha256").read_text().splitlines()}
    recipe = {"build.sh", "mkosi.conf", "mkosi.postinst.chroot", "mkosi.repart/10-root.conf", "mkosi.extra/etc/fstab"}
    assert {"inputs/wheels/a.whl", "inputs/image.conf"} | recipe <= hashed
    assert "mkosi: mkosi 25.3\nsystemd-repart: " in done.stdout and "  cmdline.txt" in done.stdout
    assert (folder / "inputs" / "image.conf").read_text().splitlines() == [
        "[Service]",
        f'Environment="OBFUSCATUNE_WORKER={WORKER}" OBFUSCATUNE_PLATFORM=tpm "OBFUSCATUNE_ARGUMENTS=--max_store_gb 20"',
        "DeviceAllow=/dev/tpmrm0 rw",
    ]
    # One archive, as it was given, and none of updates or of debugging, which mkosi would add at places of its own.
    sources = (folder / "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources").read_text().splitlines()
    assert f"URIs: {MIRROR}" in sources and "Suites: trixie" in sources and len(sources) == 5


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"WORKER": "tls://10.0.2.2:7000#FINGERPRINT"}, "WORKER: "),
        ({"WORKER": "tls://10.0.2.2:7000"}, "WORKER: "),
        ({"WORKER": ""}, "WORKER: "),
        ({"PLATFORM": "simulation:/state/platform"}, "PLATFORM: "),
        *(({"ARGUMENTS": f"--gpu {mark}"}, "ARGUMENTS: ") for mark in "\"'\\%\n"),
    ],
)
def test_an_image_with_a_placeholder_is_not_built(tmp_path: Path, changed: dict[str, str], named: str) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    given = {"WHEELS": str(tmp_path), "MIRROR": MIRROR, "SOURCE_DATE_EPOCH": "1767225600", "WORKER": WORKER, **changed}
    done = run(tmp_path / "deploy" / "cvm" / "build.sh", {"PATH": os.environ["PATH"], **given})
    assert done.returncode != 0 and named in done.stderr
    assert not (tmp_path / "deploy" / "cvm" / "inputs").exists()


def gramine(tmp_path: Path, **changed: str) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "packages").mkdir(exist_ok=True)
    if not (tmp_path / "packages" / "obfuscatune").exists():
        (tmp_path / "packages" / "obfuscatune").symlink_to(DEPLOY.parent / "src" / "obfuscatune")
        shutil.copytree(DEPLOY, tmp_path / "deploy")
        stand_in = GRAMINE_MANIFEST.replace("python", sys.executable, 1).replace("DEPLOY", repr(str(DEPLOY)))
        stand_in = stand_in.replace("/usr/bin/env ", "")
        place(tmp_path / "bin", gramine_manifest=stand_in, gramine_sgx_sign=GRAMINE_SIGN)
    given = {"SITE_PACKAGES": str(tmp_path / "packages"), "PARTIES": "/etc/obfuscatune/parties/", "SIGNING_KEY": "key"}
    given |= {"WORKER": "tcp://127.0.0.1:7000", "PYTHON": sys.executable, **changed}
    given["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return run(tmp_path / "deploy" / "gramine" / "build.sh", given)


def test_the_enclave_of_gramine_gets_its_arguments_and_no_byte_code(tmp_path: Path) -> None:
    done = gramine(tmp_path, ARGUMENTS="--escrow --max_store_gb 20")
    assert "no SIGSTRUCT" in done.stderr, done.stderr  # all went well as far as a stand-in can sign
    argv = tomllib.loads((tmp_path / "out" / "obfuscatune.manifest").read_text())["loader"]["argv"]
    assert argv[-3:] == ["--escrow", "--max_store_gb", "20"]
    assert not list((tmp_path / "deploy").rglob("__pycache__"))
    (tmp_path / "packages" / "torch" / "__pycache__").mkdir(parents=True)
    done = gramine(tmp_path)
    assert done.returncode == 1 and "SITE_PACKAGES has byte code" in done.stderr


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"WORKER": "tcp://10.0.2.2:7000"}, "WORKER: "),
        ({"WORKER": "tls://10.0.2.2:7000#FINGERPRINT"}, "WORKER: "),
        *(({"ARGUMENTS": f"--gpu {mark}"}, "ARGUMENTS: ") for mark in "\"'\\\n"),
    ],
)
def test_an_enclave_of_gramine_with_a_placeholder_is_not_built(
    tmp_path: Path, changed: dict[str, str], named: str
) -> None:
    done = gramine(tmp_path, **changed)
    assert done.returncode == 2 and named in done.stderr
    assert not (tmp_path / "out").exists()
