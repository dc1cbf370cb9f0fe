"""What the worker's process loads: nothing that knows of keys, of models, or of the enclave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import obfuscatune.worker

FORBIDDEN = (
    *(f"obfuscatune.{name}" for name in ("keys", "families", "folding", "enclave", "profiles", "training", "cli")),
    *("transformers", "peft", "cryptography"),
)
MODULES = ("__main__", "adapters", "optimizer", "sandbox", "segments", "server", "session")
WORKER = (
    *("obfuscatune.worker", "obfuscatune.protocol", "obfuscatune.errors"),
    *(f"obfuscatune.worker.{name}" for name in MODULES),
)


def forbidden_after(modules: tuple[str, ...]) -> list[str]:
    """Which forbidden modules a fresh interpreter has loaded after importing the given ones."""
    script = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(name) for name in {modules!r}]\n"
        f"print(json.dumps([m for m in sys.modules for f in {FORBIDDEN!r} if m == f or m.startswith(f + '.')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    return list(json.loads(done.stdout))


def test_the_worker_loads_nothing_of_the_enclave() -> None:
    loaded = forbidden_after(WORKER)
    assert not loaded, (
        f"importing the worker loads {', '.join(loaded)}. In obfuscatune/worker import only obfuscatune.protocol, "
        "obfuscatune.errors and torch, and keep the names in obfuscatune/__init__.py lazy."
    )


@pytest.mark.parametrize("module", ["obfuscatune.enclave.keys", "obfuscatune.profiles", "obfuscatune.enclave.folding"])
def test_the_check_sees_what_is_loaded(module: str) -> None:
    assert module in forbidden_after((*WORKER[:1], module))


def test_every_module_of_the_worker_is_in_the_list() -> None:
    found = {path.stem for path in Path(str(obfuscatune.worker.__file__)).parent.glob("*.py")} - {"__init__"}
    assert found == set(MODULES)
