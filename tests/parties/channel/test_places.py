"""Shares: nobody loses a place to one who holds as many, and a turn waits for one turn of another, not for all."""

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import BusyError
from obfuscatune.parties.channel.places import Places, Turns
from obfuscatune.protocol.hostport import source_of


class Holder:
    def __init__(self, owner: str, *, idle: bool = True) -> None:
        self.owner, self.idle, self.left = owner, idle, False

    def leave(self) -> None:
        self.left = True


@given(
    st.lists(st.sampled_from("aaaabbc"), max_size=60),
    st.integers(1, 9),
    st.booleans(),
)
def test_shares(owners: list[str], total: int, newest_first: bool) -> None:
    places, there, busy = Places(total, newest_first=newest_first), [], Counter[str]()
    for owner in owners:
        holder = Holder(owner)
        before = Counter(one.owner for one in there)
        try:
            places.enter(owner, holder)
            there.append(holder)
        except BusyError:
            busy[owner] += 1
            assert not newest_first and len(there) == total
            assert before[owner] + 1 >= max(before.values())  # it has its share
        lost = [one for one in there if one.left]
        there = [one for one in there if not one.left]
        assert len(lost) <= 1 and len(there) <= total
        for one in lost:
            assert before[one.owner] == max(before.values())
            assert newest_first or before[one.owner] > before[owner] + 1


def test_the_oldest_idle_one_goes_and_a_place_is_given_back_once() -> None:
    places = Places(3, newest_first=False)
    busy, idle, later = Holder("a", idle=False), Holder("a"), Holder("a")
    for holder in (busy, idle, later):
        places.enter("a", holder)
    with pytest.raises(BusyError):
        places.enter("a", Holder("a"))
    places.enter("b", Holder("b"))
    assert [one.left for one in (busy, idle, later)] == [False, True, False]
    places.exit("a", idle)  # its own end, after it has lost its place, frees no other
    with pytest.raises(BusyError):
        places.enter("a", Holder("a"))
    places.exit("a", busy)
    places.enter("a", Holder("a"))


def test_turns_of_owners() -> None:
    """A thousand wait of one source: another's turn is the next but one."""
    turns, order, threads = Turns(), [], []

    def take(owner: str) -> None:
        with turns.turn(owner):
            order.append(owner)

    with turns.turn("first"):
        for owner in ["flood"] * 50 + ["honest", "other"]:
            waiting = sum(map(len, turns._waiting.values()))
            threads.append(threading.Thread(target=take, args=(owner,)))
            threads[-1].start()
            while sum(map(len, turns._waiting.values())) == waiting:
                threads[-1].join(0.001)
    for thread in threads:
        thread.join(20)
    assert order[:3] == ["flood", "honest", "other"] and len(order) == 52


def test_a_turn_ends_with_an_exception_too() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn("a"):
        _ = 1 / 0
    with turns.turn("b"):
        pass


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_sources(host: str, source: str) -> None:
    assert source_of(host) == source
