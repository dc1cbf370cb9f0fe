"""Sessions of the tiny fixtures, recorded once for all tests of the audit."""

from collections.abc import Callable
from functools import cache

import pytest

from obfuscatune.studies.audit.fixtures import SETTINGS, Fixtures, build, load_text
from obfuscatune.studies.audit.lab import Recorded, record

BUDGETS = (16, 64, 256)  # d/4, d and 4d


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    return build(SETTINGS["tiny"], 0, tmp_path_factory.mktemp("fixtures"), load_text())


@pytest.fixture(scope="session")
def recorded(fixtures: Fixtures) -> Callable[[str], Recorded]:
    """A session of the private model under a profile, by the profile's name."""
    return cache(lambda profile: record(fixtures, profile, 0, BUDGETS))
