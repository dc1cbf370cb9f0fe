"""The scripts of ``deploy/`` are no package: they are imported from their folder."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Yield check, manifest, measure and twice by name."""
    names = ("manifest", "check", "measure", "twice")
    monkeypatch.syspath_prepend(DEPLOY)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]
