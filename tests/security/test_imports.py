"""What the worker's process loads: itself, the protocol, and torch; so nothing of keys, models or the enclave.

And that no part of the package imports one that stands above it.
"""

import ast
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


def test_what_stands_around_a_worker_needs_no_torch() -> None:
    """It stays as long as the worker, in a process of its own: torch would take 250 MB of memory there."""
    assert "torch" not in loaded_after(["obfuscatune.worker.__main__", "obfuscatune.worker.outside"])


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


# The house of docs/design.md, from the ground up: each part imports those of rows below its own, and none beside it.
ROOT = Path(obfuscatune.__file__).parent
HOUSE = (
    ("errors", "durable"),
    ("protocol", "profiles", "settings"),
    ("worker", "parties"),
    ("enclave",),
    ("training",),
    ("serving", "studies"),
    ("service",),
    ("cli",),
)
ROW = {part: row for row, parts in enumerate(HOUSE) for part in parts}


def imported(path: Path) -> Iterator[str]:
    """Parts of the package that a file imports anywhere in it, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (
            name.split(".")[1] for name in names if name.startswith("obfuscatune.") and name.split(".")[1] in ROW
        )


def upward(part: str, imports: set[str]) -> set[str]:
    """Those of the imports that are not below the part."""
    return {other for other in imports if other != part and ROW[other] >= ROW[part]}


def test_no_part_imports_one_that_stands_above_or_beside_it() -> None:
    entries = {path.stem for path in ROOT.iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")}
    assert entries == set(ROW)
    paths = 0
    for part in ROW:
        files = sorted((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]
        found = {name: str(path.relative_to(ROOT)) for path in files for name in imported(path)}
        paths += len(found)
        assert not {name: found[name] for name in upward(part, set(found))}, part
    assert paths > 40
    assert upward("parties", {"errors", "enclave", "worker"}) == {"enclave", "worker"}  # the control
