"""Each use of transformers and PEFT is equal to the plain model, or refused with what, where and a hint."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from obfuscatune import UsageError

from .families import twins_of, wide
from .models import error
from .uses import ALL, CHANGING, READING, REFUSED, logits

EXACT = 1e-9  # float64, relative; measured 3e-13
SHARES = 1e-3  # of `shared`, whose products are off by rounding
FAST = ("balanced", "paper")
# Of the plain model, what is too much for it as well.
SMALL_BLOCKS = {"key_block": 4}
SWITCHES = {"balanced": SMALL_BLOCKS, "stream": SMALL_BLOCKS, "strict": SMALL_BLOCKS}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def cases(uses: dict[str, Any]) -> list[Any]:
    every = [("gpt2", profile) for profile in sorted(ALL - {"naive", "shared"})]
    every += [("llama", profile) for profile in ("balanced", "stream")]
    return [
        pytest.param(family, profile, name, id=f"{family}-{profile}-{name}", marks=_marks(family, profile))
        for family, profile in every
        for name in uses
    ]


def _marks(family: str, profile: str) -> list[Any]:
    return [] if family == "gpt2" and profile in FAST else [pytest.mark.slow]


class Pairs:
    """A plain and a protected model, one pair at a time: the worker's sessions follow one another."""

    def __init__(self, protect: Callable[..., Any]) -> None:
        self._protect = protect
        self._last: tuple[Any, Any] | None = None
        self._of: tuple[str, str] | None = None

    def of(self, family: str, profile: str) -> Any:
        """For uses that leave both as they were."""
        if self._of != (family, profile):
            self.new(family, profile)
            self._of = (family, profile)
        return self._last

    def new(self, family: str, profile: str) -> Any:
        """For uses that do not."""
        self.close()
        reference, model = twins_of(family)
        protected = self._protect(model, profile=profile, timeout=20.0, **SWITCHES.get(profile, {}))
        self._last = reference, protected
        return self._last

    def close(self) -> None:
        if self._last is not None:
            self._last[1].close()
        self._last = self._of = None


@pytest.fixture(scope="module")
def pairs(protect: Callable[..., Any]) -> Iterator[Pairs]:
    found = Pairs(protect)
    yield found
    found.close()


def check(use: Any, refused: bool, reference: Any, protected: Any) -> None:
    if refused:
        with pytest.raises(UsageError) as caught:
            use(protected.model)
        assert caught.value.hint and (caught.value.where or caught.value.got)
        return
    expected, got = use(reference), use(protected.model)
    assert got.shape == expected.shape
    assert error(got, expected) < EXACT


@pytest.mark.parametrize(("family", "profile", "name"), cases(READING))
def test_a_use_that_changes_nothing(pairs: Pairs, family: str, profile: str, name: str) -> None:
    with wide():
        reference, protected = pairs.of(family, profile)
        check(READING[name], profile in REFUSED[name], reference, protected)
        assert error(logits(protected.model), logits(reference)) < EXACT  # the session goes on


@pytest.mark.parametrize(("family", "profile", "name"), cases(CHANGING))
def test_a_use_that_changes_the_model(pairs: Pairs, family: str, profile: str, name: str) -> None:
    with wide():
        reference, protected = pairs.new(family, profile)
        check(CHANGING[name], profile in REFUSED[name], reference, protected)
        assert not protected.session.has_ended
