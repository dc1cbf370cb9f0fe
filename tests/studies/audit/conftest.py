"""Sessions of the tiny fixtures, recorded once for all tests of the audit."""

import argparse
import inspect
import typing
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from obfuscatune.studies.audit.fixtures import SETTINGS, Fixtures, build, load_text
from obfuscatune.studies.audit.lab import Recorded, record

BUDGETS = (16, 64, 256)  # d/4, d and 4d


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which trained models are kept, by what they were trained as."""
    return tmp_path_factory.mktemp("fixtures")


@pytest.fixture(scope="session")
def fixtures(trained: Path) -> Fixtures:
    return build(SETTINGS["tiny"], 0, trained, load_text())


@pytest.fixture(scope="session")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    """Models of a few steps and little text: for what holds of any model, at a quarter of the time of the others."""
    text = inspect.getsource(typing) + inspect.getsource(argparse)
    settings = replace(SETTINGS["tiny"], base_steps=15, private_steps=5)
    return build(settings, 0, tmp_path_factory.mktemp("untaught"), text)


@pytest.fixture(scope="session")
def recorded(fixtures: Fixtures) -> Callable[[str], Recorded]:
    """A session of the private model under a profile, by the profile's name."""
    return cache(lambda profile: record(fixtures, profile, 0, BUDGETS))
