"""One attack on one recorded session."""

from collections.abc import Callable

import pytest
import torch

from obfuscatune.studies.audit.attack import Attack, Score
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.lab import Recorded, knowledge, record

Attacked = Callable[..., Score]


@pytest.fixture(scope="session")
def attacked(recorded: Callable[[str], Recorded], fixtures: Fixtures) -> Attacked:
    """``attacked(attack, profile)``: its score on the tiny model's session with 4d tokens, under what it needs.

    ``tokens``: another budget. ``truth_of``: a session whose truth it is scored against instead. ``sham``: run that.
    """

    def run(
        attack: Attack, profile: str, tokens: int = 256, truth_of: Recorded | None = None, *, sham: bool = False
    ) -> Score:
        session = recorded(profile)
        sample, truth = session.cut(tokens)
        told = knowledge(session, attack.needs, fixtures.base, fixtures.text["corpus"][-64:], {}, truth)
        runner = attack.sham if sham and attack.sham is not None else attack.run
        return attack.score(runner(sample, told), truth if truth_of is None else truth_of.cut(tokens)[1])

    return run


@pytest.fixture(scope="session")
def stranger(fixtures: Fixtures) -> Recorded:
    """A session of other text under other keys."""
    torch.set_num_threads(1)
    return record(fixtures, "balanced", 1, (16, 64, 256))
