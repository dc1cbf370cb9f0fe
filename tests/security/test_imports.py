"""What the worker's process loads: nothing that knows of keys, of models, or of the enclave."""

import json
import subprocess
import sys

import pytest

FORBIDDEN = ("obfuscatune.keys", "obfuscatune.families", "obfuscatune.folding", "obfuscatune.enclave",
             "obfuscatune.profiles", "transformers", "peft", "cryptography")  # fmt: skip
WORKER = ("obfuscatune.worker", "obfuscatune.worker.__main__", "obfuscatune.worker.adapters", "obfuscatune.worker.optimizer",
          "obfuscatune.worker.segments", "obfuscatune.worker.server", "obfuscatune.worker.session", "obfuscatune.protocol",
          "obfuscatune.errors")  # fmt: skip


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
        f"importing the worker loads {', '.join(loaded)}. Whatever the worker imports an attacker on its machine can use: "
        "import only obfuscatune.protocol, obfuscatune.errors and torch in obfuscatune/worker, and keep the names in "
        "obfuscatune/__init__.py lazy."
    )


@pytest.mark.parametrize("module", ["obfuscatune.keys", "obfuscatune.profiles", "obfuscatune.folding"])
def test_the_check_sees_what_is_loaded(module: str) -> None:
    assert module in forbidden_after((*WORKER[:1], module))


def test_every_module_of_the_worker_is_in_the_list() -> None:
    from pathlib import Path

    import obfuscatune.worker

    found = {path.stem for path in Path(str(obfuscatune.worker.__file__)).parent.glob("*.py")} - {"__init__"}
    assert found == {name.rsplit(".", 1)[1] for name in WORKER if name.startswith("obfuscatune.worker.")}
