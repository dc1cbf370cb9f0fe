"""The audit log: what an entry may hold, what a restart keeps, and what a party's check refuses."""

import base64
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune import durable
from obfuscatune.errors import FormatError, ObfuscatuneError, RollbackError, SealError, UsageError
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity
from obfuscatune.service.entries import NO_ENTRIES, Chain, Entry
from obfuscatune.service.log import FORMAT, AuditLog, check, check_lines, join_copy, open_copy, split_copy

JOB, PARTY = "ab" * 32, "cd" * 32
ENCLAVE = Identity.generate("enclave")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def new_log(path: Path, entries: int = 3, *, event: str = "step") -> AuditLog:
    log = AuditLog.open(path, NO_ENTRIES, 0)
    for number in range(entries):
        log.append(event, job=JOB, party=PARTY, step=number, profile="balanced")
    return log


def test_a_log_goes_on_after_a_restart(path: Path) -> None:
    log = new_log(path)
    log.close()
    log = AuditLog.open(path, log.head, log.length)
    log.append("stopped")
    checked = check(log.lines(0), log.signed_head(ENCLAVE), ENCLAVE.public)
    assert [entry.event for entry in checked.entries] == ["step"] * 3 + ["stopped"]
    assert [entry.seq for entry in checked.entries] == [0, 1, 2, 3]
    assert checked.entries[1].details == {"step": 1, "profile": "balanced"}
    assert (checked.entries[1].job, checked.entries[3].job) == (JOB, None)
    assert (checked.signer, checked.new_entries, log.dropped_bytes) == (ENCLAVE.public, 4, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_empty_log_is_one(path: Path) -> None:
    log = new_log(path, 0)
    assert check(log.lines(0), log.signed_head(ENCLAVE), ENCLAVE.public).entries == ()


def test_lines_come_in_whole_entries_of_at_most_a_mebibyte(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.service.log._REPLY_BYTES", 700)
    log, got, rounds = new_log(path, 9), b"", 0
    while got.count(b"\n") < log.length:
        part = log.lines(got.count(b"\n"))
        assert 0 < len(part) <= 700 and part.endswith(b"\n")
        got, rounds = got + part, rounds + 1
    assert got == path.read_bytes() and rounds > 2 and log.lines(9) == b""
    for start in (-1, 10):
        with pytest.raises(UsageError):
            log.lines(start)


@pytest.mark.parametrize(
    "bad",
    [
        {"event": "a sentence of a prompt"},
        {"event": ""},
        {"event": "Step"},
        {"event": "step", "job": "ab"},
        {"event": "step", "job": "AB" * 32},
        {"event": "step", "party": "../" * 21 + "a"},
        {"event": "step", "reason": "the patient has a fever"},
        {"event": "step", "reason": "x" * 81},
        {"event": "step", "reason": ""},
        {"event": "step", "reason": "two\nlines"},
        {"event": "step", "loss": 0.25},
        {"event": "step", "done": True},
        {"event": "step", "what": None},
        {"event": "step", "what": ["a"]},
        {"event": "step", "a b": 1},
        {"event": "step", **{f"n{number}": 0 for number in range(17)}},
        {"event": "step", "big": 1 << 64},
    ],
)
def test_what_could_be_content_is_refused_and_not_repeated(path: Path, bad: dict[str, Any]) -> None:
    log = new_log(path)
    before, head = path.read_bytes(), log.head
    with pytest.raises(FormatError) as caught:
        log.append(**bad)
    assert "fever" not in str(caught.value) and "sentence" not in str(caught.value)
    assert path.read_bytes() == before and log.head == head


def test_an_append_that_failed_leaves_no_trace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = new_log(path)
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", _full)
        with pytest.raises(ObfuscatuneError, match="cannot write the audit log"):
            log.append("lost")
    log.append("kept")
    assert [entry.event for entry in checked_entries(log)] == ["step", "step", "step", "kept"]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def checked_entries(log: AuditLog) -> tuple[Entry, ...]:
    return check(log.lines(0), log.signed_head(ENCLAVE), ENCLAVE.public).entries


def test_threads_append_in_turn(path: Path) -> None:
    log = new_log(path, 0)
    threads = [threading.Thread(target=lambda: [log.append("step") for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checked_entries(log)) == 20


# Restart. The state has head and length; the file is the operator's.


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_what_the_state_does_not_know_is_dropped(path: Path, cut: int) -> None:
    log = new_log(path, 5)
    known, length, head = path.read_bytes().splitlines(keepends=True)[:3], 3, None
    head = Entry.from_bytes(path.read_bytes().splitlines()[3]).previous
    log.close()
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])  # torn
    size = path.stat().st_size
    log = AuditLog.open(path, head, length)
    assert path.read_bytes() == b"".join(known) and log.dropped_bytes == size - sum(map(len, known)) > 0
    log.append("started")
    assert len(checked_entries(log)) == 4


def test_an_entry_that_the_operator_wrote_is_not_adopted(path: Path) -> None:
    log = new_log(path)
    forged = Entry(3, 0, "released", JOB, PARTY, {}, log.head).to_bytes() + b"\n"
    log.close()
    with path.open("ab") as file:
        file.write(forged)
    log = AuditLog.open(path, log.head, log.length)
    assert log.dropped_bytes == len(forged)
    assert "released" not in [entry.event for entry in checked_entries(log)]


def test_a_cut_log_is_refused(path: Path) -> None:
    log = new_log(path)
    log.close()
    good = path.read_bytes()
    path.write_bytes(b"".join(good.splitlines(keepends=True)[:2]))
    with pytest.raises(RollbackError, match=r"got 2 entries, expected 3"):
        AuditLog.open(path, log.head, log.length)
    path.unlink()
    with pytest.raises(RollbackError, match="cut"):
        AuditLog.open(path, log.head, log.length)


def test_another_log_of_the_same_length_is_refused(path: Path) -> None:
    log = new_log(path)
    log.close()
    path.unlink()
    new_log(path, event="other").close()
    with pytest.raises(RollbackError, match="not the one"):
        AuditLog.open(path, log.head, log.length)


def test_a_thousand_corruptions_are_refused(path: Path) -> None:
    log = new_log(path, 4)
    log.close()
    good, head = path.read_bytes(), log.signed_head(ENCLAVE)
    generator = random.Random(4)
    for _ in range(1000):
        bad = corrupt(good, generator)
        path.write_bytes(bad)
        with pytest.raises((FormatError, RollbackError)):
            AuditLog.open(path, log.head, log.length)
        assert path.read_bytes() == bad  # evidence is left as it was
        with pytest.raises((FormatError, RollbackError)):
            check(bad, head, ENCLAVE.public)
    path.write_bytes(good)
    AuditLog.open(path, log.head, log.length).close()


def corrupt(good: bytes, generator: random.Random) -> bytes:
    data, at = bytearray(good), generator.randrange(len(good))
    match generator.randrange(6):
        case 0:
            data[at] ^= 1 << generator.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = generator.choice([b"\n", b" ", b"{}\n", generator.randbytes(3)])
        case 3:
            del data[at : at + generator.randrange(1, 9)]
        case 4:
            lines = good.splitlines(keepends=True)
            one, two = generator.sample(range(len(lines)), 2)
            lines[one], lines[two] = lines[two], lines[one]
            data = bytearray(b"".join(lines))
        case 5:
            lines = good.splitlines(keepends=True)
            del lines[generator.randrange(len(lines))]
            data = bytearray(b"".join(lines))
    return bytes(data) if bytes(data) != good else good[:-1]


@given(st.binary(max_size=300))
def test_any_line_is_an_entry_or_refused(data: bytes) -> None:
    try:
        entry = Entry.from_bytes(data)
    except FormatError:
        return
    assert entry.to_bytes() == data


words = st.from_regex(r"\A[A-Za-z0-9._:+-]{1,80}\Z")
names = st.from_regex(r"\A[a-z][a-z0-9_-]{0,39}\Z")


@given(
    st.builds(
        Entry,
        seq=st.integers(0, 1 << 30),
        time=st.integers(0, 1 << 33),
        event=names,
        job=st.none() | st.just(JOB),
        party=st.none() | st.just(PARTY),
        details=st.dictionaries(names, words | st.integers(-(1 << 63), (1 << 64) - 1), max_size=16),
        previous=st.just(NO_ENTRIES),
    )
)
def test_an_entry_reads_back_and_fits_in_a_line(entry: Entry) -> None:
    assert Entry.from_bytes(entry.to_bytes()) == entry


# A party's check.


def test_a_head_that_somebody_else_signed_is_refused(path: Path) -> None:
    log, other = new_log(path), Identity.generate("enclave")
    with pytest.raises(SealError, match="not signed by this enclave"):
        check(log.lines(0), log.signed_head(other), ENCLAVE.public)
    assert check(log.lines(0), log.signed_head(other), None).signer is None


@pytest.mark.parametrize("name", ["format", "head", "length", "time", "signature"])
def test_a_head_with_a_changed_field_is_refused(path: Path, name: str) -> None:
    log = new_log(path)
    head = log.signed_head(ENCLAVE)
    wrong = {"format": ["x", 1], "head": [NO_ENTRIES, "x", None], "length": [2, 4, True, -1, "3"]}
    wrong |= {"time": [1, 1 << 60, None], "signature": ["", None, "AA==", base64.b64encode(bytes(64)).decode(), "é"]}
    for value in wrong[name]:
        with pytest.raises((FormatError, RollbackError)):
            check(log.lines(0), {**head, name: value}, ENCLAVE.public)
    with pytest.raises(FormatError):
        check(log.lines(0), {key: value for key, value in head.items() if key != name}, ENCLAVE.public)
    with pytest.raises(FormatError):
        check(log.lines(0), {**head, "more": 1}, ENCLAVE.public)


def test_fewer_or_more_entries_than_signed_are_refused(path: Path) -> None:
    log = new_log(path)
    two = b"".join(log.lines(0).splitlines(keepends=True)[:2])
    with pytest.raises(RollbackError, match="cut"):
        check(two, log.signed_head(ENCLAVE), ENCLAVE.public)
    head = log.signed_head(ENCLAVE)
    log.append("more")
    with pytest.raises(RollbackError, match="another log"):
        check(log.lines(0), head, ENCLAVE.public)


def test_a_log_that_goes_on_from_the_earlier_copy_holds(path: Path) -> None:
    log = new_log(path)
    earlier = log.lines(0)
    log.append("more")
    checked = check(log.lines(0), log.signed_head(ENCLAVE), ENCLAVE.public, earlier)
    assert checked.new_entries == 1


def test_a_fork_is_seen_against_the_earlier_copy(path: Path) -> None:
    log = new_log(path)
    head, length = log.head, log.length
    log.append("used-up", job=JOB)
    earlier = log.lines(0)
    log.close()
    log = AuditLog.open(path, head, length)  # an older state was put back
    with pytest.raises(RollbackError, match="shorter than your earlier copy"):
        check(log.lines(0), log.signed_head(ENCLAVE), ENCLAVE.public, earlier)
    log.append("started")
    log.append("accepted", job=JOB)
    with pytest.raises(RollbackError, match="entry 3"):
        check(log.lines(0), log.signed_head(ENCLAVE), ENCLAVE.public, earlier)
    checked_entries(log)  # the control: alone, the fork looks right


def test_a_copy_reads_back(path: Path) -> None:
    log = new_log(path)
    head = log.signed_head(ENCLAVE)
    assert split_copy(join_copy(log.lines(0), head)) == (log.lines(0), head)


@given(st.binary(max_size=200))
def test_any_copy_is_refused_as_a_format(data: bytes) -> None:
    with pytest.raises((FormatError, RollbackError)):
        check(*split_copy(data), ENCLAVE.public)


def test_a_log_longer_than_memory_is_checked_line_by_line(tmp_path: Path) -> None:
    """Some MB of it in less than one: there is no length at which a party's check stops."""
    enclave = Identity.generate("enclave")
    path, chain = tmp_path / "copy", Chain()
    body = tmp_path / "body"
    with body.open("wb") as file:
        for number in range(8000):
            entry = Entry(number, 1, "step", "ab" * 32, "cd" * 32, {"step": number}, chain.head)
            line = entry.to_bytes() + b"\n"
            chain.take(line)
            file.write(line)
    fields = {"format": FORMAT, "head": chain.head, "length": chain.length, "time": 1}
    signature = base64.b64encode(enclave.sign("log head", encode(fields))).decode()
    path.write_bytes(join_copy(b"", {**fields, "signature": signature}) + body.read_bytes())
    tracemalloc.start()
    try:
        with open_copy(path) as (head, lines), open_copy(path) as (_, earlier):
            checked = check_lines(lines, head, enclave.public, earlier)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (checked.length, checked.new_entries, checked.entries) == (8000, 0, ())
    assert path.stat().st_size > 2_000_000 and peak < 500_000
