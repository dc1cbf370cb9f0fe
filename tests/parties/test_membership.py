"""Who may connect: a chain of changes that its members have signed, and no other chain, place or signature will do."""

import base64
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune import durable
from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, SealError
from obfuscatune.parties import known
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.change import MAX_MEMBERS, Change, Member, SignedChange
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.membership import MAX_SUCCESSIONS, Membership, begin, begin_after, follow, found, founded
from obfuscatune.parties.succession import succeed

HERE, ELSEWHERE = "ee" * 32, "dd" * 32
LAB, CLINIC, THIRD, OPERATOR, STRANGER, NEW = (
    Identity.generate(name, "x25519") for name in ("lab", "clinic", "third", "operator", "stranger", "clinic-2")
)


def begun(*parties: Identity, operator: Identity | None = None, enclave: str = HERE) -> Membership:
    members = [Member(each.public) for each in parties]
    members += [] if operator is None else [Member(operator.public, "operator")]
    return founded(found(enclave, members), enclave)


def signed(now: Membership, act: Any, subject: Any, *by: Identity) -> SignedChange:
    change = SignedChange(now.next(act, subject))
    for identity in by:
        change = change.sign(identity)
    return SignedChange.from_bytes(change.to_bytes())


def names(now: Membership) -> list[str]:
    return sorted(member.identity.name for member in now.members)


def test_more_than_half_admit_and_one_leaves_alone() -> None:
    now = begun(LAB, CLINIC)
    for by in ((), (LAB,), (CLINIC,)):
        with pytest.raises(ConsentError, match="lacks signatures"):
            now.after(signed(now, "admit", Member(THIRD.public), *by))
    three = now.after(signed(now, "admit", Member(THIRD.public), LAB, CLINIC))
    assert names(three) == ["clinic", "lab", "third"] and three.number == 1
    with pytest.raises(ConsentError, match="2 of 3"):
        three.after(signed(three, "remove", CLINIC.public.fingerprint, LAB))
    for by in ((CLINIC,), (LAB, THIRD)):
        left = three.after(signed(three, "remove", CLINIC.public.fingerprint, *by))
        assert names(left) == ["lab", "third"]
        assert left.gone == left.left == {CLINIC.public.fingerprint}
    # Of two, neither can put the other out.
    with pytest.raises(ConsentError, match="2 of 2"):
        now.after(signed(now, "remove", CLINIC.public.fingerprint, LAB))


def test_the_operator_admits_nobody_alone_and_nobody_is_admitted_without_it() -> None:
    admission = ("admit", Member(STRANGER.public))
    now = begun(LAB, CLINIC, operator=OPERATOR)
    with pytest.raises(ConsentError, match="2 of 3"):
        now.after(signed(now, *admission, OPERATOR))
    with pytest.raises(ConsentError, match="the operator"):
        now.after(signed(now, *admission, LAB, CLINIC))
    assert "stranger" in names(now.after(signed(now, *admission, LAB, OPERATOR)))
    two = founded(found(HERE, [Member(OPERATOR.public, "operator"), Member(NEW.public, "operator")]), HERE)
    two = two.after(signed(two, "admit", Member(LAB.public), OPERATOR, NEW))
    with pytest.raises(ConsentError, match="a party"):  # more than half, and no party
        two.after(signed(two, *admission, OPERATOR, NEW))
    # An operator who has lost its key can be replaced.
    gone = now.after(signed(now, "remove", OPERATOR.public.fingerprint, LAB, CLINIC))
    assert names(gone.after(signed(gone, "admit", Member(NEW.public, "operator"), LAB, CLINIC)))[1] == "clinic-2"


def test_replays_forks_and_signatures_for_others_are_refused() -> None:
    now = begun(LAB, CLINIC)
    admission = signed(now, "admit", Member(THIRD.public), LAB, CLINIC)
    after = now.after(admission)
    with pytest.raises(ConsentError, match="not the next change"):
        after.after(admission)
    left = after.after(signed(after, "remove", THIRD.public.fingerprint, THIRD))
    with pytest.raises(ConsentError, match="not the next change"):  # who left is not brought back by the old paper
        left.after(admission)
    other = now.after(signed(now, "admit", Member(STRANGER.public), LAB, CLINIC))
    with pytest.raises(ConsentError, match="not the next change"):  # a fork: the same number after something else
        other.after(signed(after, "remove", LAB.public.fingerprint, LAB))
    elsewhere = begun(LAB, CLINIC, enclave=ELSEWHERE)
    with pytest.raises(ConsentError, match="another enclave"):
        now.after(signed(elsewhere, "admit", Member(THIRD.public), LAB, CLINIC))
    for by in (STRANGER, THIRD):
        with pytest.raises(SealError, match="no member's"):
            now.after(signed(now, "admit", Member(THIRD.public), LAB, CLINIC, by))
    moved = replace(admission, change=replace(admission.change, subject=Member(STRANGER.public)))
    with pytest.raises(SealError, match="not of this change"):
        now.after(moved)
    with pytest.raises(ConsentError, match="founded once"):
        now.after(SignedChange(Change(HERE, 1, now.digest, "found", ())))


def test_who_is_admitted_is_new_and_has_not_ended() -> None:
    now = begun(LAB, CLINIC)
    again = replace(CLINIC.public, name="another-name")  # the same key twice would be two signatures
    for public in (CLINIC.public, again):
        with pytest.raises(ConsentError, match="already a member"):
            now.after(signed(now, "admit", Member(public), LAB, CLINIC))
    with pytest.raises(ConsentError, match="not a member"):
        now.after(signed(now, "remove", STRANGER.public.fingerprint, LAB, CLINIC))
    now = now.after(signed(now, "succession", succeed(CLINIC, None)))
    for public in (CLINIC.public, again):  # who has stolen the key can give it any name
        with pytest.raises(ConsentError, match="has ended"):
            now.after(signed(now, "admit", Member(public), LAB))
    with pytest.raises(ConsentError, match="identity that has ended"):
        now.after(signed(now, "succession", succeed(LAB, replace(CLINIC, public=again))))
    with pytest.raises(FormatError, match="twice"):
        found(HERE, [Member(CLINIC.public), Member(again)])
    with pytest.raises(FormatError, match="at most"):
        found(HERE, [Member(Identity.generate("x", "x25519").public) for _ in range(MAX_MEMBERS + 1)])


def test_a_member_is_succeeded_by_its_own_word() -> None:
    now = begun(LAB, CLINIC)
    after = now.after(signed(now, "succession", succeed(CLINIC, NEW)))
    assert names(after) == ["clinic-2", "lab"]
    assert after.gone == {CLINIC.public.fingerprint} and after.left == frozenset()
    three = after.after(signed(after, "admit", Member(THIRD.public), LAB, NEW))
    for statement in (succeed(CLINIC, NEW), succeed(STRANGER, NEW), succeed(STRANGER, None)):
        with pytest.raises(ConsentError, match="changes nothing"):
            three.after(signed(three, "succession", statement))
    with pytest.raises(ConsentError, match="time has not come"):
        now.after(signed(now, "succession", succeed(CLINIC, NEW, now=1 << 40)))
    with pytest.raises(ConsentError, match="successor is a member already"):
        now.after(signed(now, "succession", succeed(CLINIC, LAB)))
    alias = replace(LAB, public=replace(LAB.public, name="lab-too"))  # LAB's signing key under another fingerprint
    with pytest.raises(ConsentError, match="another name of one: got lab-too"):
        now.after(signed(now, "succession", succeed(CLINIC, alias)))
    with pytest.raises(ConsentError, match="successor is a member already"):  # by way of one that NEW has succeeded
        three.after(signed(three, "succession", succeed(THIRD, CLINIC)))
    removed = after.after(signed(after, "remove", NEW.public.fingerprint, NEW))
    assert names(removed) == ["lab"] and removed.left == {CLINIC.public.fingerprint, NEW.public.fingerprint}


def test_who_was_robbed_ends_what_a_thief_has_made_and_cannot_be_flooded_out() -> None:
    now = begun(LAB, CLINIC)
    now = now.after(signed(now, "succession", succeed(CLINIC, STRANGER)))
    now = now.after(signed(now, "succession", succeed(CLINIC, None)))
    assert names(now) == ["lab"]
    heir, now = CLINIC, begun(LAB, CLINIC)
    with pytest.raises(FormatError, match="too many successions"):
        for number in range(MAX_SUCCESSIONS + 1):
            heirs_heir = Identity.generate(f"clinic-{number}", "x25519")
            now = now.after(signed(now, "succession", succeed(heir, heirs_heir)))
            heir = heirs_heir
    assert now.number == MAX_SUCCESSIONS
    assert names(now.after(signed(now, "admit", Member(THIRD.public), LAB, heir)))[-1] == "third"


def test_an_enclave_that_goes_on_knows_what_was_stated() -> None:
    lines = [found(HERE, [Member(LAB.public), Member(CLINIC.public), Member(OPERATOR.public, "operator")]).to_bytes()]
    later, thief = (Identity.generate(name, "x25519") for name in ("third-2", "thief"))
    for act, subject, by in (
        ("admit", Member(THIRD.public), (LAB, OPERATOR)),
        ("succession", succeed(THIRD, later), ()),
        ("remove", later.public.fingerprint, (later,)),
        ("admit", Member(later.public), (LAB, OPERATOR)),  # not as who it was
        ("succession", succeed(CLINIC, NEW), ()),
        ("succession", succeed(NEW, thief), ()),
        ("succession", succeed(OPERATOR, None), ()),
    ):
        now = follow(lines, HERE)
        assert now is not None
        lines.append(signed(now, act, subject, *by).to_bytes())
    before = follow(lines, HERE)
    assert before is not None
    chain = [each.to_bytes() for each in begin_after(ELSEWHERE, lines, before)]
    here = follow(chain, ELSEWHERE)  # as the parties do, who are given nothing else
    assert here is not None and here.members == before.members and names(here) == ["lab", "thief", "third-2"]
    assert sum(map(len, chain)) <= sum(map(len, lines))  # so it is never too long for a chain
    by = (LAB, thief)
    for ended in (CLINIC, NEW, THIRD, OPERATOR):
        again = replace(ended.public, name="another-name")
        for public in (ended.public, again):
            with pytest.raises(ConsentError, match="has ended"):
                here.after(signed(here, "admit", Member(public), *by))
        with pytest.raises(ConsentError, match="identity that has ended"):
            here.after(signed(here, "succession", succeed(LAB, replace(ended, public=again))))
    assert names(here.after(signed(here, "succession", succeed(CLINIC, None)))) == ["lab", "third-2"]
    third = begin_after(HERE, chain, here)  # and the one after that
    assert [each.change.subject for each in third] == [SignedChange.from_bytes(line).change.subject for line in chain]


def test_only_at_its_beginning_a_chain_takes_what_is_of_nobody_in_it() -> None:
    now = begin(HERE, [Member(LAB.public), Member(CLINIC.public)], [(succeed(STRANGER, NEW), 1 << 40)])[1]
    with pytest.raises(ConsentError, match="changes nothing"):
        now.after(signed(now, "succession", succeed(STRANGER, NEW, now=5)))  # which it knows
    later = now.after(signed(now, "admit", Member(THIRD.public), LAB, CLINIC))
    for statement in (succeed(STRANGER, None), succeed(OPERATOR, None)):
        now.after(signed(now, "succession", statement))
        with pytest.raises(ConsentError, match="changes nothing"):
            later.after(signed(later, "succession", statement))
    with pytest.raises(ConsentError, match="time has not come"):
        begin(HERE, [Member(LAB.public)], [(succeed(STRANGER, NEW, now=1 << 40), 0)])


PEOPLE = [Identity.generate(name, "x25519") for name in "abcdef"]
PEOPLE += [replace(each, public=replace(each.public, name=f"{each.public.name}-too")) for each in PEOPLE[:2]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["admit", "remove", "succession"]), *[st.integers(0, 7)] * 2), max_size=14))
def test_whatever_came_before_an_enclave_goes_on_with_the_same_members(steps: list[tuple[Any, int, int]]) -> None:
    lines = [found(HERE, [Member(each.public) for each in PEOPLE[:3]]).to_bytes()]
    for act, one, other in steps:
        now = follow(lines, HERE)
        assert now is not None
        who, heir = PEOPLE[one], PEOPLE[other] if other != one else None
        subject: dict[str, Any] = {"admit": Member(who.public), "remove": who.public.fingerprint}
        subject["succession"] = succeed(who, heir, now=9)
        here = [each for each in PEOPLE if now.member(each.public.fingerprint)]
        with contextlib.suppress(ObfuscatuneError):
            change = signed(now, act, subject[act], *(() if act == "succession" else here))
            now.after(change)
            lines.append(change.to_bytes())
    before = follow(lines, HERE)
    assert before is not None
    after = follow([each.to_bytes() for each in begin_after(ELSEWHERE, lines, before)], ELSEWHERE)
    assert after is not None and set(after.members) == set(before.members) and after.ends == before.ends


def chain() -> list[bytes]:
    first = found(HERE, [Member(LAB.public), Member(CLINIC.public)])
    now = founded(first, HERE)
    second = signed(now, "admit", Member(THIRD.public), LAB, CLINIC)
    now = now.after(second)
    third = signed(now, "succession", succeed(CLINIC, NEW))
    now = now.after(third)
    return [each.to_bytes() for each in (first, second, third, signed(now, "remove", THIRD.public.fingerprint, THIRD))]


CHAIN = chain()


def test_a_chain_is_followed_whole_or_from_where_one_was() -> None:
    whole = follow(CHAIN, HERE)
    assert whole is not None and names(whole) == ["clinic-2", "lab"] and whole.number == 3
    half = follow(CHAIN[:2], HERE)
    assert follow(CHAIN[2:], HERE, half) == whole and follow([], HERE) is None
    for broken in (CHAIN[1:], [CHAIN[0], *CHAIN[2:]], [*CHAIN, CHAIN[3]], [CHAIN[0], CHAIN[0]]):
        with pytest.raises(ConsentError):
            follow(broken, HERE)
    with pytest.raises(ConsentError, match="another enclave"):
        follow(CHAIN, ELSEWHERE)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 33) | st.text(max_size=5) | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


NAMES = ["act", "enclave", "format", "number", "previous", "subject", "time"]


@settings(max_examples=80, deadline=None)
@given(line=st.integers(0, 3), name=st.sampled_from(NAMES), value=VALUES, top=st.booleans())
def test_no_field_of_a_change_can_be_another(line: int, name: str, value: Any, top: bool) -> None:
    fields = json.loads(CHAIN[line])
    before = json.loads(CHAIN[line])
    fields["change" if top else "signatures"] = value if top and name == "format" else fields["change"] | {name: value}
    altered = [*CHAIN[:line], encode(fields), *CHAIN[line + 1 :]]
    if fields == before:
        return
    with pytest.raises(ObfuscatuneError):
        follow(altered, HERE)


@settings(max_examples=300, deadline=None)
@given(line=st.integers(0, 3), at=st.integers(0, 1 << 16), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(line: int, at: int, bit: int) -> None:
    data = bytearray(CHAIN[line])
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(ObfuscatuneError):
        follow([*CHAIN[:line], bytes(data), *CHAIN[line + 1 :]], HERE)


@pytest.mark.parametrize(
    "signatures",
    [{"ab" * 32: "AA=="}, {"x": base64.b64encode(bytes(64)).decode()}, [], {"ab" * 32: None}],
)
def test_signatures_of_a_wrong_form(signatures: Any) -> None:
    with pytest.raises(FormatError):
        SignedChange.from_bytes(encode({"change": json.loads(CHAIN[1])["change"], "signatures": signatures}))


def test_commands_that_run_at_once_keep_the_same_membership(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`job run` and `connect` of one folder see a change at the same moment: neither fails, and nothing half stays."""
    enclave = Identity.generate("enclave", "x25519").public
    begin = found(enclave.fingerprint, [Member(LAB.public), Member(CLINIC.public)])
    reply = {"changes": 1, "open": 0}, begin.to_bytes() + b"\n"
    channel: Any = SimpleNamespace(enclave=enclave, members=(0, begin.change.digest), request=lambda fields: reply)

    def rename(source: Path, target: Path) -> None:
        monkeypatch.setattr(known, "rename", durable.rename)
        known._compare(channel, tmp_path)  # another process, whom no lock of this one keeps out
        durable.rename(source, target)

    monkeypatch.setattr(known, "rename", rename)
    known.compare(channel, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == reply[1] and kept.name == f"members-{enclave.fingerprint[:16]}.jsonl"

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    kept.unlink()
    monkeypatch.setattr(known, "rename", full)
    with pytest.raises(ObfuscatuneError, match="cannot keep the membership"):
        known.compare(channel, tmp_path)
    assert not list(tmp_path.iterdir())
