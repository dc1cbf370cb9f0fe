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
OPTIONS = {("worker",): WorkerOptions, ("enclave", "serve"): ServeOptions}


def commands(manifest: ModuleType) -> dict[str, list[str]]:
    """All of them, by file, from the verb on."""
    argv = tomllib.loads(manifest.render_manifest())["loader"]["argv"]
    found = {"manifest": argv[argv.index("obfuscatune") + 1 :]}
    for path in sorted([*DEPLOY.glob("systemd/*.service"), *DEPLOY.glob("systemd/drop-ins/*.conf")]):
        for line in re.findall(r"^ExecStart=(\S.*)$", path.read_text(), re.MULTILINE):
            found[path.name] = shlex.split(line)[1:]
    for path in sorted(DEPLOY.glob("docker/Dockerfile*")):
        entry, words = (
            json.loads(line) for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", path.read_text(), re.MULTILINE)
        )
        found[path.name] = entry[1:] + words
    return found


def test_every_option_exists_and_every_required_one_is_given(scripts: dict[str, ModuleType]) -> None:
    found = commands(scripts["manifest"])
    assert len(found) >= 9
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


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("systemd/*.service")), ids=lambda path: path.name)
def test_no_unit_names_the_simulation(path: Path) -> None:
    assert "simulation" not in path.read_text()
    simulation = (DEPLOY / "systemd" / "drop-ins" / "enclave-simulation.conf").read_text()
    assert "PROTECTS NOTHING" in simulation
