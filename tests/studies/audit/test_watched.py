"""Several workers under keys: one has its blocks and nothing else, all together have what one worker would have."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import UsageError
from obfuscatune.studies.audit.controls import coalition, control_cells, known_key
from obfuscatune.studies.audit.lab import Recorded
from obfuscatune.studies.audit.runner import attack_profile
from obfuscatune.studies.audit.study import make_plan
from obfuscatune.studies.audit.verdict import judge
from obfuscatune.studies.audit.watched import Watched, pool
from obfuscatune.studies.reproduce.cells import Cell

Recorder = Callable[[str], Recorded]


def test_a_profile_alone_is_one_worker() -> None:
    watched = Watched.parse("balanced+mlp=enclave")
    assert (watched.together, watched.workers, watched.profile.mlp) == (1, 1, "enclave")
    assert list(watched.run([4], operator=7)) == [0, 1, 2, 3]


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=9), together=st.integers(1, 9), operator=st.integers(0, 99)
)
def test_those_who_pool_are_neighbours_and_so_are_their_blocks(counts: list[int], together: int, operator: int) -> None:
    together = min(together, len(counts))
    watched = Watched.parse(f"balanced@{together}of{len(counts)}")
    chosen, run = watched.chosen(operator), watched.run(counts, operator)
    assert len(chosen) == together and chosen.stop <= len(counts)
    assert len(run) == sum(counts[i] for i in chosen) and run.start == sum(counts[: chosen.start])
    assert {watched.chosen(i).start for i in range(9)} == set(range(len(counts) - together + 1))


@pytest.mark.parametrize("who", ["", "1", "2of1", "0of2", "1of2of3", "1of10", "aofb", "tls"])
def test_another_form_is_refused(who: str) -> None:
    with pytest.raises(UsageError, match="whose recordings") as caught:
        Watched.parse(f"balanced@{who}")
    assert "balanced@1of2" in str(caught.value)


def test_shares_have_their_workers_by_themselves() -> None:
    with pytest.raises(UsageError, match="whose recordings: got 1of3"):
        Watched.parse("shared@1of3")


def test_what_is_claimed_of_all_blocks_is_claimed_of_some() -> None:
    claimed = {
        name: judge(name, "A11", [], fires=True, silent=True).claimed
        for name in ("strict", "strict@1of2", "strict+key_block=8@1of2", "balanced@1of2")
    }
    assert claimed == {"strict": True, "strict@1of2": True, "strict+key_block=8@1of2": False, "balanced@1of2": False}


def test_a_plan_with_several_workers_has_the_control_of_each() -> None:
    profiles = ["balanced@1of2", "balanced@2of2", "balanced", "shared"]
    plan = make_plan(model="tiny", profiles=profiles, knowledge=["N"], attacks=["A24"], tokens="d", seeds=1)
    like = Cell(label="", compute=attack_profile, inputs={"settings": asdict(plan.settings), "seed": 0})
    pooled = [cell.inputs["profile"] for cell in control_cells(plan, like) if cell.compute is coalition]
    assert pooled == ["balanced@1of2", "balanced@2of2", "shared"]


@pytest.mark.slow
def test_one_of_two_has_its_block_and_both_have_all(recorded: Recorder) -> None:
    one, both = recorded("balanced@1of2"), recorded("balanced@2of2")
    assert (list(one.blocks), list(both.blocks)) == ([0], [0, 1])
    assert (one.sample.view.blocks, both.sample.view.blocks) == (1, 2)
    assert known_key(one) > 0.999 and known_key(both) > 0.999
    for session in ("view", "target", "training"):
        parts, whole = getattr(one.sample, session).passes, getattr(both.sample, session).passes
        assert [2 * len(calls) for calls in parts] == [len(calls) for calls in whole]
    forward, backward = ([call.segment.block for call in calls] for calls in both.sample.training.passes[:2])
    assert (forward, backward) == ([0, 0, 1, 1], [1, 1, 0, 0])
    for found in (one, both):
        assert {block for block, _ in found.truth.streams} == set(range(len(found.blocks)))
        for (block, stream), rows in found.truth.streams.items():
            assert found.sample.view.rows(block, stream).shape == rows.shape
    with pytest.raises(ValueError, match=r"shorter|longer"):  # recordings of two sessions are not pooled
        pool([one.sample.view, one.sample.view.only(slice(1, None))])


@pytest.mark.slow
def test_two_bodies_have_a_rotation_each(recorded: Recorder) -> None:
    found = recorded("stream@2of2")
    assert known_key(found) > 0.999
    keys = [found.truth.keys[block, "attention in"] for block in range(2)]
    assert (keys[0] - keys[1]).norm() > 1
