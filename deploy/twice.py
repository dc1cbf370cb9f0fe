"""Build twice what goes into the image, in two places, and compare: ``make image-twice``.

    python deploy/twice.py              the wheel of this package: source, compiled part and all
    python deploy/twice.py --image      the image too, by cvm/build.sh with mkosi; its variables come from outside

Two builders who compare measurements need the same bytes from the same inputs. The second build runs in another folder,
in another time zone and language. The umask is 022 in both: a wheel holds the modes of its files. Prints one line a
file, and of a zip that differs which members do; exits with 1 where something differs, with 2 where a build fails.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EPOCH = "1767225600"  # where SOURCE_DATE_EPOCH is not set
# What a build may not depend on.
SURROUNDINGS = (
    {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"},
    {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "2"},
)
UMASK = 0o022
# What build.sh leaves for people to compare; the disk image itself is among them.
IMAGE_FILES = ("inputs.sha256", "obfuscatune-enclave.efi", "obfuscatune-enclave.raw", "linux", "initrd", "cmdline.txt")


def build_wheel(tree: Path, surroundings: dict[str, str]) -> Path:
    """Build the wheel of a source tree and return its path; raises CalledProcessError."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    _run(command, tree, surroundings)
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


def differences(first: Path, second: Path) -> list[str]:
    """Return what differs between two files: nothing, the members of two zips, or only that they differ."""
    if digest(first.read_bytes()) == digest(second.read_bytes()):
        return []
    if not (zipfile.is_zipfile(first) and zipfile.is_zipfile(second)):
        return [first.name]
    told: list[dict[str, tuple[str, ...]]] = []
    for path in (first, second):
        with zipfile.ZipFile(path) as archive:
            told.append(
                {
                    item.filename: (digest(archive.read(item)), str(item.date_time), oct(item.external_attr))
                    for item in archive.infolist()
                }
            )
    names = [name for name in {**told[0], **told[1]} if told[0].get(name) != told[1].get(name)]
    return sorted(names) or ["order or form of the zip"]


def digest(data: bytes) -> str:
    """Return SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def copy_tree(target: Path) -> Path:
    """Copy what git tracks into ``target`` and return it; a change that is not committed yet comes along."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)  # noqa: S607
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def compare(pairs: Iterator[tuple[Path, Path]]) -> bool:
    """Print one line a pair; return whether all are the same."""
    same = True
    for first, second in pairs:
        found = differences(first, second)
        print(f"{'DIFFER' if found else 'same  '}  {digest(first.read_bytes())}  {first.name}")
        for name in found:
            print(f"        {name}")
        same = same and not found
    return same


def make_absolute() -> None:
    """Make the paths among build.sh's variables absolute: the builds run in folders of their own."""
    for name in ("WHEELS", "OVMF", "PYTHON"):
        value = os.environ.get(name)
        if value and (name != "PYTHON" or os.sep in value):  # a bare name of a program is looked for in PATH
            os.environ[name] = os.path.abspath(value)  # not resolved: a virtual environment's python is a link


def _run(command: list[str], folder: Path, surroundings: dict[str, str]) -> None:
    environment = {"SOURCE_DATE_EPOCH": EPOCH, **os.environ, **surroundings}
    subprocess.run(command, cwd=folder, env=environment, umask=UMASK, check=True, stdout=subprocess.DEVNULL)  # noqa: S603


def main(arguments: list[str]) -> int:
    """Build and compare; 0: the same, 1: not, 2: a build failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--image", action="store_true", help="build the whole image too, which needs mkosi")
    image = parser.parse_args(arguments).image
    if image and shutil.which("mkosi") is None:
        print("mkosi is not installed: the image was not built", file=sys.stderr)
        return 2
    make_absolute()
    with tempfile.TemporaryDirectory() as name:
        try:
            trees = [copy_tree(Path(name) / folder) for folder in ("first", "the/second")]
            wheels = [build_wheel(*each) for each in zip(trees, SURROUNDINGS, strict=True)]
            same = compare(iter([(wheels[0], wheels[1])]))
            if image:
                for tree, surroundings in zip(trees, SURROUNDINGS, strict=True):
                    _run(["bash", str(tree / "deploy/cvm/build.sh")], tree, surroundings)
                outputs = [tree / "deploy/cvm/mkosi.output" for tree in trees]
                same = compare((outputs[0] / file, outputs[1] / file) for file in IMAGE_FILES) and same
        except subprocess.CalledProcessError as error:
            print(f"a build failed: {' '.join(map(str, error.cmd[:4]))} ... with {error.returncode}", file=sys.stderr)
            return 2
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
