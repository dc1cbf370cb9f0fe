"""The commands that the files of deploy/ start are commands of this version."""

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from obfuscatune.cli.enclave import ServeOptions
from obfuscatune.cli.worker import WorkerOptions

DEPLOY = Path(__file__).parents[2] / "deploy"
DROP_INS = DEPLOY / "systemd" / "drop-ins"
OPTIONS = {("worker",): WorkerOptions, ("enclave", "serve"): ServeOptions}


def started(*files: Path) -> list[str]:
    """What a unit with drop-ins starts, from the verb on, as systemd puts it together."""
    lines = "\n".join(path.read_text() for path in files)
    given = dict(
        word.split("=", 1)
        for line in re.findall(r"^Environment=(.*)$", lines, re.MULTILINE)
        for word in shlex.split(line)
    )
    command = re.findall(r"^ExecStart=(\S.*)$", lines, re.MULTILINE)[-1]
    whole = re.sub(r"\$\{(\w+)\}", lambda name: given[name[1]], command)
    return shlex.split(re.sub(r"\$(\w+)", lambda name: given[name[1]], whole))[1:]


def commands(manifest: ModuleType) -> dict[str, list[str]]:
    """All of them, by file, from the verb on."""
    argv = tomllib.loads(manifest.render_manifest())["loader"]["argv"]
    found = {"manifest": argv[argv.index("obfuscatune") + 1 :]}
    for unit in sorted(DEPLOY.glob("systemd/*.service")):
        found[unit.name] = started(unit)
        who = unit.stem.removeprefix("obfuscatune-")
        for path in DROP_INS.glob(f"{who}-*.conf"):
            found[path.name] = started(unit, path)
    for path in sorted(DEPLOY.glob("docker/Dockerfile*")):
        entry, words = (
            json.loads(line) for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", path.read_text(), re.MULTILINE)
        )
        found[path.name] = entry[1:] + words
    return found


def test_every_option_exists_and_every_required_one_is_given(scripts: dict[str, ModuleType]) -> None:
    found = commands(scripts["manifest"])
    assert len(found) >= 10
    for name, words in found.items():
        verb = tuple(words[:1]) if words[0] == "worker" else tuple(words[:2])
        fields = {field.name: field for field in dataclasses.fields(OPTIONS[verb])}
        given = words[len(verb) :]
        if given == ["--help"]:
            continue
        assert all(option.removeprefix("--") in fields for option in given[::2]), name
        required = {
            key for key, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING
        }
        assert required <= {option.removeprefix("--") for option in given[::2]}, name


@pytest.mark.parametrize("other", ["worker-tcp.conf", "worker-loopback.conf"])
def test_a_gpu_goes_with_each_address(other: str) -> None:
    unit, files = DEPLOY / "systemd" / "obfuscatune-worker.service", [DROP_INS / other, DROP_INS / "worker-cuda.conf"]
    for order in (files, files[::-1]):
        words = started(unit, *order)
        assert words[words.index("--device") + 1] == "cuda" and "unix:///run/obfuscatune/worker.sock" not in words


def test_the_worker_listens_where_the_enclave_of_gramine_looks_for_it(scripts: dict[str, ModuleType]) -> None:
    found = commands(scripts["manifest"])
    address = found["manifest"][found["manifest"].index("--worker") + 1]
    assert found["worker-loopback.conf"][:3] == ["worker", "--listen", address]


def test_the_worker_can_read_its_key() -> None:
    text = (DROP_INS / "worker-tcp.conf").read_text()
    assert "\nLoadCredential" not in text  # has mode 0440 since systemd 254
    key = started(DROP_INS / "worker-tcp.conf", DROP_INS / "worker-cuda.conf")[4]
    assert f"install -D -m 0600 -o obfuscatune-worker -g obfuscatune gpu1.key {key}\n" in text
    assert f"gpu1.key {key}\n" in (DEPLOY.parent / "docs" / "deployment.md").read_text()


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("systemd/*.service")), ids=lambda path: path.name)
def test_no_unit_names_the_simulation(path: Path) -> None:
    assert "simulation" not in path.read_text()
    simulation = (DEPLOY / "systemd" / "drop-ins" / "enclave-simulation.conf").read_text()
    assert "PROTECTS NOTHING" in simulation
