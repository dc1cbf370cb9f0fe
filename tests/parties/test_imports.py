"""What the parties' programs load: nothing of the enclave, of the worker, or of training."""

import json
import pkgutil
import subprocess
import sys

import pytest

import obfuscatune.parties

OTHERS = tuple(
    f"obfuscatune.{name}" for name in ("enclave", "worker", "training", "service", "serving", "studies", "cli")
)


def others_after(modules: list[str]) -> list[str]:
    """Which modules of other parts a fresh interpreter has loaded after importing the given ones."""
    script = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(name) for name in {modules!r}]\n"
        f"print(json.dumps(sorted(m for m in sys.modules for o in {OTHERS!r} if m == o or m.startswith(o + '.'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    return list(json.loads(done.stdout))


def test_the_parties_load_nothing_of_the_enclave() -> None:
    modules = [module.name for module in pkgutil.walk_packages(obfuscatune.parties.__path__, "obfuscatune.parties.")]
    assert {"obfuscatune.parties.job", "obfuscatune.parties.sealed.reader"} <= set(modules)
    loaded = others_after(modules)
    assert not loaded, (
        f"importing obfuscatune.parties loads {', '.join(loaded)}. A party signs, seals and verifies: what it "
        "shares with the enclave belongs in obfuscatune.parties, or in a small module at the root."
    )


@pytest.mark.parametrize("module", ["obfuscatune.enclave.keys", "obfuscatune.training.arguments"])
def test_the_check_sees_what_is_loaded(module: str) -> None:
    assert module in others_after([module])
