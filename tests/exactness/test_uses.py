"""Each use of transformers and PEFT is equal to the plain model, or refused with what, where and a hint."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from obfuscatune import UsageError

from .conftest import listening
from .families import twins_of, wide
from .models import error
from .uses import ALL, CHANGING, READING, REFUSED, logits

EXACT = 1e-9  # float64, relative
SHARES = 1e-3  # of `shared`, whose products are off by rounding
SMALL_BLOCKS = {"key_block": 4}
SWITCHES = {"balanced": SMALL_BLOCKS, "stream": SMALL_BLOCKS, "strict": SMALL_BLOCKS}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def cases(uses: dict[str, Any]) -> list[Any]:
    every = [("gpt2", profile) for profile in sorted(ALL - {"naive"})]  # which is `paper` with other keys
    every.append(("llama", "stream"))
    return [
        pytest.param(family, profile, name, id=f"{family}-{profile}-{name}", marks=_marks(family, profile, name))
        for family, profile in every
        for name in uses
    ]


def _marks(family: str, profile: str, name: str) -> list[Any]:
    """Fast are `balanced`, and `paper` where it differs; torch's compiler and four trainings take seconds."""
    refused = REFUSED[name]
    fast = profile == "balanced" or (profile == "paper" and ("paper" in refused) != ("balanced" in refused))
    return (
        []
        if fast and family == "gpt2" and name not in ("compiled", "resumed_and_the_best_loaded")
        else [pytest.mark.slow]
    )


class Pairs:
    """A plain and a protected model, one pair at a time: the worker's sessions follow one another."""

    def __init__(self, protect: Callable[..., Any], three: Callable[[], list[str]]) -> None:
        self._protect, self._three = protect, three
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
        switches: dict[str, Any] = {"worker": self._three()} if profile == "shared" else SWITCHES.get(profile, {})
        protected = self._protect(model, profile=profile, timeout=20.0, **switches)
        self._last = reference, protected
        return self._last

    def close(self) -> None:
        if self._last is not None:
            self._last[1].close()
        self._last = self._of = None


@pytest.fixture(scope="module")
def pairs(
    protect: Callable[..., Any], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pairs]:
    with contextlib.ExitStack() as stack:
        third: list[str] = []

        def three() -> list[str]:
            third[:] = third or [stack.enter_context(listening(tmp_path_factory.mktemp("worker")))]
            return [request.getfixturevalue("worker"), request.getfixturevalue("second_worker"), *third]

        found = Pairs(protect, three)
        yield found
        found.close()


def check(name: str, profile: str, reference: Any, protected: Any) -> None:
    use = {**READING, **CHANGING}[name]
    if profile in REFUSED[name]:
        with pytest.raises(UsageError) as caught:
            use(protected.model)
        assert caught.value.hint and (caught.value.where or caught.value.got)
        return
    expected, got = use(reference), use(protected.model)
    assert got.shape == expected.shape
    assert error(got, expected) < bound(profile)


def bound(profile: str) -> float:
    return SHARES if profile == "shared" else EXACT


@pytest.mark.parametrize(("family", "profile", "name"), cases(READING))
def test_a_use_that_changes_nothing(pairs: Pairs, family: str, profile: str, name: str) -> None:
    with wide():
        reference, protected = pairs.of(family, profile)
        check(name, profile, reference, protected)
        assert error(logits(protected.model), logits(reference)) < bound(profile)  # the session goes on


@pytest.mark.parametrize(("family", "profile", "name"), cases(CHANGING))
def test_a_use_that_changes_the_model(pairs: Pairs, family: str, profile: str, name: str) -> None:
    with wide():
        reference, protected = pairs.new(family, profile)
        check(name, profile, reference, protected)
        assert not protected.session.has_ended
