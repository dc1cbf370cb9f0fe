"""Every parser of tools/fuzz on random bytes and on mutated valid inputs: taken, or a clear error of the package."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "fuzz"))
from mutate import mutate
from target import Finding, Target
from targets import TARGETS

from obfuscatune.errors import FormatError

sys.path.pop(0)


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    build: Callable[[Path], Target] = TARGETS[request.param]
    return build(tmp_path_factory.mktemp(request.param))


def test_the_valid_inputs_are_taken(target: Target) -> None:
    assert target.inputs
    for seed in target.seeds:
        assert target.run(seed)
    for other in target.refused:
        assert not target.run(other)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=600))
def test_random_bytes_get_a_clear_error(target: Target, data: bytes) -> None:
    target.run(data)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**64 - 1))
def test_mutated_inputs_get_a_clear_error(target: Target, seed: int) -> None:
    choose = random.Random(seed)
    data = choose.choice(target.inputs)
    for _ in range(choose.choice((1, 2, 5))):
        data = mutate(data, choose)
    target.run(data)


def test_no_corruption_of_what_is_signed_is_taken(target: Target) -> None:
    if not target.strict:
        return
    choose = random.Random(0)
    for _ in range(1000):
        seed = choose.choice(target.seeds)
        data = mutate(seed, choose)
        assert data in target.seeds or not target.run(data)


def test_the_harness_reports_what_it_must() -> None:
    def fail(data: bytes) -> None:
        raise ValueError("not of the package")

    class ForgedError(FormatError):
        def __str__(self) -> str:
            return "a line\r\x1b[2J and another"

    def forge(data: bytes) -> None:
        raise ForgedError("x")

    with pytest.raises(ValueError, match="not of the package"):
        Target(fail, ()).run(b"")
    with pytest.raises(Finding):
        Target(forge, ()).run(b"")


def test_no_error_shows_a_control_character_or_goes_on_for_pages() -> None:
    name = "\x1b[2J\nerror: forged\u202e\ud800" + "A" * 100_000
    text = str(FormatError(name, got=name, expected=name, where=name, hint=name))
    assert text.count("\n") == 1, "the one before the hint"
    assert text.replace("\n", "").isprintable()
    assert "\\x1b[2J\\nerror: forged\\u202e\\ud800" in text
    assert len(text) < 11_000
