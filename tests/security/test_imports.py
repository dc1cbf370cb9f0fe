"""What the worker's process loads: itself, the protocol, and torch; so nothing of keys, models or the enclave."""

import json
import pkgutil
import subprocess
import sys

import pytest

import obfuscatune.worker

OURS = ("obfuscatune.protocol", "obfuscatune.worker")  # with all modules in them
ALONE = ("obfuscatune", "obfuscatune.errors")
LIBRARIES = ("torch", "numpy", "msgpack")
WORKER = [
    "obfuscatune.worker",
    *(module.name for module in pkgutil.walk_packages(obfuscatune.worker.__path__, "obfuscatune.worker.")),
]


def loaded_after(modules: list[str]) -> list[str]:
    """All modules that a fresh interpreter has after importing the given ones."""
    script = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(name) for name in {modules!r}]\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def libraries() -> set[str]:
    """Packages of other people that the worker may load: those that its libraries load, and Python's own."""
    return {name.partition(".")[0] for name in loaded_after(list(LIBRARIES))} | sys.stdlib_module_names


def forbidden(loaded: list[str], libraries: set[str]) -> list[str]:
    """Those of the modules that are not on the list."""
    return [
        name
        for name in loaded
        if name.partition(".")[0] not in libraries
        and name not in ALONE
        and not any(name == ours or name.startswith(f"{ours}.") for ours in OURS)
    ]


def test_the_worker_loads_nothing_but_what_is_listed(libraries: set[str]) -> None:
    loaded = loaded_after(WORKER)
    assert set(WORKER) <= set(loaded)
    assert not forbidden(loaded, libraries), (
        f"importing the worker loads {', '.join(forbidden(loaded, libraries))}. In obfuscatune/worker import only "
        f"obfuscatune.protocol, obfuscatune.errors, {', '.join(LIBRARIES)} and Python itself, and keep the names "
        "in obfuscatune/__init__.py lazy."
    )


@pytest.mark.parametrize(
    "module",
    [
        *("obfuscatune.enclave.keys", "obfuscatune.profiles", "obfuscatune.settings", "obfuscatune.durable"),
        *("transformers", "cryptography.x509"),
    ],
)
def test_the_check_sees_what_is_loaded(module: str, libraries: set[str]) -> None:
    assert module in forbidden(loaded_after([WORKER[0], module]), libraries)


def test_what_the_libraries_load_is_nothing_of_ours(libraries: set[str]) -> None:
    assert not {"obfuscatune", "transformers", "peft", "cryptography"} & libraries
