"""What ``make check-deploy`` says of the units, the images and the recipe, and that it can say no."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

Scripts = dict[str, ModuleType]
DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
IMAGES = sorted((DEPLOY / "docker").glob("Dockerfile*"))
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    bare = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=bare, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.fixture
def check(scripts: Scripts) -> ModuleType:
    return scripts["check"]


def test_the_script_that_users_run_finds_nothing() -> None:
    done = run(sys.executable, "-B", str(DEPLOY / "check.py"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok: gramine manifest" in done.stdout


@needs_systemd
def test_systemd_finds_no_fault_in_any_unit_and_drop_in(check: ModuleType) -> None:
    assert list(check.systemd_faults(DEPLOY / "systemd")) == []


@needs_systemd
def test_systemd_finds_a_unit_with_less_protection(check: ModuleType, tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "obfuscatune-worker.service").read_text()
    for line in ("User=obfuscatune-worker", "PrivateNetwork=yes", "PrivateUsers=yes"):
        assert f"\n{line}\n" in text
        text = text.replace(f"\n{line}\n", "\n")
    (tmp_path / "obfuscatune-worker.service").write_text(text)
    (fault,) = check.systemd_faults(tmp_path)
    assert "exposure level" in fault


@needs_systemd
def test_systemd_finds_a_line_that_it_does_not_know(check: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "systemd", tmp_path / "units")
    drop_in = tmp_path / "units" / "drop-ins" / "worker-tcp.conf"
    drop_in.write_text(drop_in.read_text() + "ProtectEverything=yes\n")
    (fault,) = check.systemd_faults(tmp_path / "units")
    assert "worker-tcp.conf" in fault
    assert "ProtectEverything" in fault


def test_a_drop_in_that_undoes_another_is_found(check: ModuleType, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "systemd", tmp_path / "units")
    assert check.drop_in_faults(tmp_path / "units") == []
    drop_in = tmp_path / "units" / "drop-ins" / "worker-tcp.conf"
    drop_in.write_text(drop_in.read_text().replace(" --device ${OBFUSCATUNE_DEVICE}", ""))
    fault = "worker-tcp.conf: the command leaves out OBFUSCATUNE_DEVICE"
    assert check.drop_in_faults(tmp_path / "units") == [fault]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_each_hardening_line_is_missed(check: ModuleType, unit: Path) -> None:
    text = unit.read_text()
    assert check.unit_faults(unit.name, text) == []
    for line in check.UNIT_LINES:
        assert check.unit_faults(unit.name, text.replace(f"\n{line}\n", "\n")) == [f"{unit.name}: {line} is missing"]


def test_the_worker_has_neither_network_nor_root() -> None:
    lines = (DEPLOY / "systemd" / "obfuscatune-worker.service").read_text().splitlines()
    for line in (
        "PrivateNetwork=yes",
        "RestrictAddressFamilies=AF_UNIX",
        "User=obfuscatune-worker",
        "PrivateDevices=yes",
    ):
        assert line in lines


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_not_run_by_root(check: ModuleType, image: Path) -> None:
    text = image.read_text()
    assert check.dockerfile_faults(text) == []
    assert "\nARG PYTHON_DIGEST\n" in text, "a digest that nobody looked up is no default"


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("@sha256:${PYTHON_DIGEST}", ":latest", "no digest"),
        ("@sha256:${PYTHON_DIGEST}", "", "no digest"),
        ("ARG PYTHON_DIGEST\n", f"ARG PYTHON_DIGEST={'0' * 64}\n", "no digest, or one with a default"),
        ("USER 65532:65532\n", "", "USER: root"),
        ("USER 65532:65532", "USER 0", "USER: root"),
        ("RUN install -d -m 0700 -o 65532 -g 65532 /state\n", "", "belongs to root"),
        ("COPY src src", "ADD src src", "ADD: not one of"),
        ("COPY src src", "COPY . .", "COPY .: takes"),
        ("COPY src src", "COPY clinic.key /state/", "looks like a secret"),
        ("ENV OMP", "ENV API_TOKEN=x OMP", "looks like a secret"),
        ('ENTRYPOINT ["/opt', "ENTRYPOINT /opt/obfuscatune/bin/x #", "a shell"),
    ],
)
def test_a_worse_image_is_refused(check: ModuleType, old: str, new: str, names: str) -> None:
    text = IMAGES[0].read_text()
    assert old in text
    assert any(names in fault for fault in check.dockerfile_faults(text.replace(old, new)))


def test_the_build_context_holds_no_state() -> None:
    lines = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    copied = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    # What `make setup` leaves in src/ is of another interpreter, or older than the sources.
    assert {"**/*.so", "**/*.egg-info", "**/__pycache__"} <= set(lines[lines.index("!src") :])


def test_what_the_image_is_built_from_stays_out_of_git_and_of_the_sdist() -> None:
    build = (DEPLOY / "cvm" / "build.sh").read_text()
    ignored = set((DEPLOY / "cvm" / ".gitignore").read_text().split())
    pruned = set((DEPLOY.parent / "MANIFEST.in").read_text().splitlines())
    for name in ("inputs", "mkosi.output", "mkosi.sandbox"):
        assert name in build and f"{name}/" in ignored and f"prune deploy/cvm/{name}" in pruned


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("    systemd.gpt_auto=no\n", "", "gpt_auto"),
        ("    systemd.import_credentials=no\n", "", "import_credentials"),
        ("    quiet\n", "    console=ttyS0\n", "opens a console"),
        ("Ssh=no", "Ssh=yes", "Ssh must be no"),
        ("    udev\n", "    udev\n    openssh-server\n", "openssh-server"),
        ("    /var/log/*.log\n", "", "two builds differ"),
    ],
)
def test_a_worse_recipe_is_refused(check: ModuleType, tmp_path: Path, old: str, new: str, names: str) -> None:
    folder = tmp_path / "cvm"
    shutil.copytree(DEPLOY / "cvm", folder, ignore=shutil.ignore_patterns("inputs", "mkosi.output"))
    assert check.image_faults(folder) == []
    text = (folder / "mkosi.conf").read_text()
    assert old in text
    (folder / "mkosi.conf").write_text(text.replace(old, new))
    (fault,) = check.image_faults(folder)
    assert names in fault


def test_a_root_without_verity_is_refused(check: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "cvm"
    shutil.copytree(DEPLOY / "cvm", folder, ignore=shutil.ignore_patterns("inputs", "mkosi.output"))
    path = folder / "mkosi.repart" / "10-root.conf"
    path.write_text(path.read_text().replace("Verity=data", "Verity=off"))
    assert check.image_faults(folder) == ["10-root: not the data side of verity"]


@pytest.mark.parametrize(
    "script", [*sorted(DEPLOY.glob("*/*.sh")), DEPLOY / "cvm" / "mkosi.postinst.chroot"], ids=lambda path: path.name
)
def test_a_script_is_bash_and_stops_at_a_missing_input(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111
    if script.name == "build.sh":
        done = run("bash", str(script))
        assert done.returncode != 0
        assert ": directory" in done.stderr, "the first missing input, by name"
