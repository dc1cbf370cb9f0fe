"""The book: a job's life, what is logged of it and when, and that it lives once."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import ConsentError, ObfuscatuneError, UsageError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.service import book as book_module
from obfuscatune.service import questions as questions_module
from obfuscatune.service import room as room_module
from obfuscatune.service.book import MAX_STARTS, Book
from obfuscatune.service.consent import LackingError
from obfuscatune.service.log import check
from obfuscatune.service.records import RECORD_BYTES, Record
from obfuscatune.service.state import MAX_BYTES as MAX_STATE_BYTES

from .jobs import CANARY, CLINIC, LAB, STRANGER, Enclave, open_enclave, sign, terms_of
from .platforms import new_platform

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OWNER = CLINIC.public.fingerprint


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    with open_enclave(tmp_path) as opened:
        yield opened


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the book's clock forward."""

    class Clock:
        ahead = 0.0

        def time(self) -> float:
            return time.time() + self.ahead

    clock = Clock()
    for module in (book_module, room_module, questions_module):
        monkeypatch.setattr(module, "time", clock)

    def put(seconds: float) -> None:
        clock.ahead = seconds

    return put


def test_a_life(enclave: Enclave) -> None:
    signed = enclave.signed_job(stored=False)
    digest = enclave.submit(signed)
    assert enclave.book.record(digest).status == "waiting" and enclave.book.next() is None
    assert enclave.book.missing(digest) == signed.job.inputs
    assert enclave.book.submit(signed, OWNER) == digest  # the other party's submission finds it
    for path in enclave.directory.glob("*-*.sealed"):
        assert not enclave.book.has_queued()
        enclave.store(path_digest(path), path)
        enclave.book.review()
    assert enclave.book.has_queued() and enclave.book.next() == digest and enclave.book.next() is None
    enclave.book.progress(digest, 3, 10)
    enclave.book.checkpointed(digest, 3, enclave.result("checkpoint"))
    results = {"adapter": enclave.result("adapter"), "output": enclave.result("output")}
    enclave.book.finished(digest, results)
    record = enclave.book.record(digest)
    assert (record.status, record.results, record.checkpoint, record.step) == ("done", results, None, 3)
    assert enclave.told() == ["submitted", "queued", "started", "checkpoint", "done"]
    assert all(entry.job == digest for entry in enclave.events())
    done = enclave.events()[-1].details
    assert done == {"adapter-file": results["adapter"], "output-file": results["output"]}


def path_digest(path: Path) -> str:
    return read_header(path).digest


def test_the_log_holds_no_content_and_a_party_can_check_it(enclave: Enclave) -> None:
    digest = enclave.done_job()
    enclave.book.questions.count(digest, OWNER, 2, 3, "a")
    enclave.book.note("fetched", digest, OWNER)
    head, lines = enclave.book.committed_log(0)
    assert check(lines, head, enclave.state.identity.public).new_entries == enclave.log.length
    for word in CANARY.split():
        assert word.encode() not in lines
    assert enclave.events()[-2].details == {"prompts": 2} and enclave.events()[-2].party == OWNER


def test_every_entry_is_committed_when_it_is_there(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry before the state, and both before the book says so."""
    order: list[tuple[int, int]] = []
    commit = enclave.state.commit

    def watched() -> None:
        commit()
        order.append((enclave.log.length, enclave.state.log_length))

    monkeypatch.setattr(enclave.state, "commit", watched)
    enclave.done_job()
    assert order == [(n, n) for n in range(1, 5)]


@pytest.mark.parametrize("broken", ["log", "state"])
def test_nothing_is_acted_upon_that_is_not_committed(
    enclave: Enclave, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    digest = enclave.submit(enclave.signed_job())

    def fail(*_: Any, **__: Any) -> None:
        raise ObfuscatuneError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(*((enclave.log, "append", fail) if broken == "log" else (enclave.state, "commit", fail)))
        with pytest.raises(ObfuscatuneError, match="disk is full"):
            enclave.book.next()
        assert enclave.book.record(digest).status == "queued"
        with pytest.raises(ObfuscatuneError, match="disk is full"):
            enclave.submit(enclave.signed_job(stored=False))
        assert len(enclave.book.records) == 1
    assert enclave.book.committed_log(0)[0]["length"] == enclave.state.log_length
    assert enclave.book.next() == digest


def test_a_quota_of_jobs_is_counted_by_the_sealed_file_and_for_ever(tmp_path: Path, later: Any) -> None:
    """A race of two jobs, a crash, a deletion, a forgotten line, a clock put forth and back: none begins anew."""
    platform, until = new_platform(), int(time.time()) + 3 * 3600
    with open_enclave(tmp_path, platform) as enclave:
        file, path = enclave.seal("data", terms=terms_of(max_jobs=2, expires=until))
        enclave.store(file, path)
        first = enclave.signed_job(data=file)
        digests = [enclave.submit(first)]
        assert enclave.book.next() == digests[0]
        enclave.book.finished(digests[0], {})
        enclave.book.delete(digests[0], OWNER)
        enclave.store(file, path)
        digests += [enclave.submit(enclave.signed_job(data=file)) for _ in range(2)]  # both are queued, and one is left
        assert enclave.book.next() == digests[1] and enclave.book.next() is None
        assert enclave.book.record(digests[2]).status == "refused"
        assert "max_jobs of the data's terms: got 3" in enclave.book.record(digests[2]).reason
    with open_enclave(tmp_path, platform) as enclave:  # killed while the second ran
        assert enclave.book.next() == digests[1], "going on with a job is no further use"
        enclave.book.failed(digests[1], ObfuscatuneError("x"))
        enclave.submit(enclave.book.signed(digests[1]))
        assert enclave.book.next() == digests[1]
        enclave.book.finished(digests[1], {})
        with enclave.state.lock:
            for digest in digests:
                enclave.book.room.retire(digest)
        later(2 * 3600)
        enclave.book.room.drop_expired()
        assert not enclave.book.records and enclave.book.uses.count_of(file) == 2
        later(0)
        with pytest.raises(ConsentError, match="job has expired"):  # though by the clock it has not
            enclave.submit(first)
        enclave.book.uses.forget(until - 1, set())
        assert file in enclave.state.uses
        enclave.book.uses.forget(until, set())
        assert file not in enclave.state.uses and enclave.state.forgotten == until
        later(0)
        enclave.store(file, path)
        again = enclave.submit(enclave.signed_job(data=file, expires=until + 3600))
        assert enclave.book.record(again).status == "refused"


def test_a_use_that_is_not_committed_is_not_counted(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = enclave.submit(enclave.signed_job())
    with monkeypatch.context() as patch:
        patch.setattr(enclave.state, "commit", lambda: (_ for _ in ()).throw(ObfuscatuneError("the disk is full")))
        with pytest.raises(ObfuscatuneError, match="disk is full"):
            enclave.book.next()
    assert not enclave.state.uses
    assert enclave.book.next() == digest and len(enclave.state.uses) == 3


def test_counts_of_jobs_fill_no_more_than_a_partys_share(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    until = int(time.time()) + 60
    enclave.state.uses |= {f"{number:064x}": f"1 {until} {OWNER}" for number in range(16)}
    monkeypatch.setattr(room_module, "MAX_BYTES", 17 * 192)
    with pytest.raises(UsageError, match="no room"):
        enclave.submit(enclave.signed_job())
    assert len(enclave.state.uses) == 16


@pytest.mark.parametrize("status", ["done", "refused"])
def test_a_used_up_job_is_refused_for_ever(enclave: Enclave, status: str) -> None:
    signed = enclave.signed_job({"data": terms_of("enclave")} if status == "refused" else None)
    digest = enclave.submit(signed)
    if status == "done":
        enclave.book.next()
        enclave.book.finished(digest, {})
    assert enclave.book.record(digest).status == status
    for _ in range(3):
        with pytest.raises(ConsentError, match=f"job is used up: got {status}"):
            enclave.submit(signed)
    assert enclave.book.next() is None
    assert enclave.told().count("refused") == 1 + (status == "refused")  # noted once: the log is not to be flooded
    enclave.book.review()
    book = Book(enclave.state, enclave.log, enclave.book.store)  # and after a restart
    with pytest.raises(ConsentError, match="used up"):
        book.submit(signed, OWNER)


@pytest.mark.parametrize("signer", [LAB, CLINIC])
def test_a_job_without_consent_is_not_taken_in(enclave: Enclave, signer: Any) -> None:
    job = enclave.signed_job().job
    with pytest.raises(ConsentError, match="not signed by both"):
        enclave.book.submit(sign(job, signer), OWNER)
    with pytest.raises(UsageError, match="no such job"):
        enclave.book.record(job.digest)
    assert enclave.told() == ["refused"] and enclave.events()[0].details == {"reason": "ConsentError"}


@pytest.mark.parametrize("kind", ["model", "data", "prompts"])
def test_an_input_of_somebody_else(enclave: Enclave, kind: str) -> None:
    digest, path = enclave.seal(kind, LAB if kind != "model" else CLINIC)
    enclave.store(digest, path)
    job = enclave.submit(enclave.signed_job(**{kind: digest}))
    record = enclave.book.record(job)
    assert record.status == "refused" and f"{kind} was not sealed by" in record.reason and enclave.book.next() is None
    assert enclave.events()[-1].details == {"cause": "ConsentError"}


def test_a_refusals_text_is_for_the_parties_and_not_for_the_log(enclave: Enclave) -> None:
    job = enclave.submit(enclave.signed_job({"model": terms_of(max_queries=1), "data": terms_of(adapter_to=[])}))
    assert "terms of the model do not allow: got 10 queries" in enclave.book.record(job).reason
    odd = enclave.submit(enclave.signed_job({"data": terms_of() | {"profiles": [CANARY]}}))
    assert enclave.book.record(odd).reason == "FormatError"
    assert "Zebediah" not in str(enclave.events())


def test_one_bad_job_does_not_hold_up_others(enclave: Enclave) -> None:
    switches = dict.fromkeys(("attention", "mlp"), "enclave") | {"keys": "conditioned", "inner_keys": "haar"}
    switches |= {"kappa": 12345.678, "enclave_blocks": 1}
    long = enclave.signed_job({k: terms_of(profiles=[], shows={}) for k in ("model", "data")}, switches=switches)
    assert len(long.job.profile_name) > 80  # more than a word of the log
    name = [long.job.profile_name]
    allowed = enclave.signed_job({k: terms_of(*name) for k in ("model", "data", "prompts")}, switches=switches)
    digests = [enclave.submit(signed) for signed in (long, allowed, enclave.signed_job())]
    assert [enclave.book.record(d).status for d in digests] == ["refused", "queued", "queued"]
    words = [e.details["profile"] for e in enclave.events() if e.event == "queued"]
    assert words[0] == f"{name[0][:77]}..." and words[1] == "balanced"


def test_a_profile_with_a_switch_is_a_word_of_the_log(enclave: Enclave) -> None:
    allowed = terms_of("balanced+mlp=enclave")
    enclave.submit(
        enclave.signed_job(dict.fromkeys(("model", "data", "prompts"), allowed), switches={"mlp": "enclave"})
    )
    assert enclave.events()[-1].details == {"profile": "balanced+mlp=enclave"}


def test_expiry(enclave: Enclave, later: Any) -> None:
    queued, waiting = enclave.submit(enclave.signed_job()), enclave.signed_job(stored=False)
    digest = enclave.submit(waiting)
    new = enclave.signed_job()
    later(4000)
    with pytest.raises(ConsentError, match="expired"):
        enclave.submit(new)
    for path in enclave.directory.glob("*-*.sealed"):
        if not enclave.book.store.has(path_digest(path)):
            enclave.store(path_digest(path), path)
    enclave.book.review()
    assert enclave.book.record(digest).status == "refused" and "expired" in enclave.book.record(digest).reason
    assert enclave.book.next() is None and enclave.book.record(queued).status == "refused"


def test_terms_hold_when_a_job_starts_and_not_only_when_it_is_queued(enclave: Enclave, later: Any) -> None:
    signed = enclave.signed_job({"data": terms_of(expires=int(time.time()) + 100)})
    digest = enclave.submit(signed)
    assert enclave.book.record(digest).status == "queued"
    later(200)
    assert time.time() + 200 < signed.job.expires
    assert enclave.book.next() is None and "the date" in enclave.book.record(digest).reason


def test_an_input_that_the_disk_lost_fails_and_is_owed_again(enclave: Enclave) -> None:
    signed = enclave.signed_job()
    digest = enclave.submit(signed)
    enclave.book.store.remove(signed.job.data)
    assert enclave.book.next() is None and enclave.book.record(digest).status == "failed"
    enclave.submit(signed)
    assert enclave.book.record(digest).status == "waiting" and enclave.book.missing(digest) == {"data": signed.job.data}


def test_a_failed_job_goes_to_the_end_of_the_queue_with_its_checkpoint(enclave: Enclave) -> None:
    first, second = enclave.signed_job(), enclave.signed_job()
    digests = [enclave.submit(first), enclave.submit(second)]
    assert enclave.book.next() == digests[0]
    checkpoint = enclave.result("checkpoint")
    enclave.book.checkpointed(digests[0], 2, checkpoint)
    enclave.book.failed(digests[0], ValueError(CANARY))
    assert enclave.book.record(digests[0]).reason == "ValueError"
    assert enclave.events()[-1].details == {"cause": "ValueError"}
    enclave.submit(first)
    assert enclave.told()[-2:] == ["submitted-again", "queued"]
    assert enclave.book.record(digests[0]).checkpoint == checkpoint
    assert [enclave.book.next(), enclave.book.next()] == [digests[1], digests[0]]


def test_jobs_queue_in_order(enclave: Enclave) -> None:
    digests = [enclave.submit(enclave.signed_job()) for _ in range(5)]
    assert [enclave.book.next() for _ in range(6)] == [*digests, None]


def test_a_job_goes_on_after_a_kill(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        running, queued = enclave.submit(enclave.signed_job()), enclave.submit(enclave.signed_job())
        enclave.book.next()
        old = enclave.result("checkpoint")
        enclave.book.checkpointed(running, 1, old)
        checkpoint = enclave.result("checkpoint")
        enclave.book.checkpointed(running, 2, checkpoint)
        assert not enclave.book.store.has(old) and enclave.book.store.has(checkpoint)
        enclave.book.progress(running, 3, 4)  # not committed: gone
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        record = enclave.book.record(running)
        assert (record.status, record.checkpoint, record.step) == ("queued", checkpoint, 2)
        assert enclave.told()[-1] == "resumed"
        assert [enclave.book.next(), enclave.book.next()] == [running, queued]
        enclave.book.finished(running, {})
        assert not enclave.book.store.has(checkpoint)


def test_a_job_that_brings_the_enclave_down_fails_in_the_end(tmp_path: Path) -> None:
    platform = None
    for _ in range(MAX_STARTS):
        with open_enclave(tmp_path, platform) as enclave:
            if platform is None:
                signed = enclave.signed_job()
                enclave.submit(signed)
            assert enclave.book.next() == signed.job.digest
            platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        record = enclave.book.record(signed.job.digest)
        assert (record.status, record.reason) == ("failed", "Interrupted") and enclave.book.next() is None
        enclave.submit(signed)
        assert enclave.book.next() == signed.job.digest


def test_an_upload_whose_entry_the_crash_took_is_found(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        digest = enclave.submit(enclave.signed_job(stored=False))
        for path in tmp_path.glob("*-*.sealed"):
            enclave.store(path_digest(path), path)
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        assert enclave.book.record(digest).status == "queued"


def test_queries_are_counted_before_they_are_answered(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        digest = enclave.done_job(max_queries=10)
        enclave.book.questions.count(digest, OWNER, 9, 32, "b")
        with pytest.raises(ConsentError, match="used up"):
            enclave.book.questions.count(digest, OWNER, 2, 32, "c")
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        assert enclave.book.record(digest).queries == 9
        enclave.book.questions.count(digest, OWNER, 1, 32, "d")
        with pytest.raises(ConsentError, match="used up"):
            enclave.book.questions.count(digest, OWNER, 1, 32, "e")


def test_a_number_that_the_state_cannot_hold(enclave: Enclave) -> None:
    digest = enclave.submit(enclave.signed_job())
    enclave.book.next()
    enclave.book.progress(digest, 1, 10**300)
    enclave.book.commit()
    assert enclave.book.record(digest).status == "running"


def test_one_party_cannot_fill_the_book(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing that has ended: the other two parties' shares are kept, whatever it submits."""
    monkeypatch.setattr(room_module, "MAX_BYTES", 12 * RECORD_BYTES)
    other = STRANGER.public.fingerprint
    enclave.book.room.parties = lambda: [LAB.public.fingerprint, OWNER, other]
    for _ in range(10):
        enclave.submit(enclave.signed_job(stored=False))
    with pytest.raises(UsageError, match="no room for another job of this party"):
        enclave.submit(enclave.signed_job(stored=False))
    assert enclave.told().count("submitted") == len(enclave.book.records) == 10
    assert enclave.book.room.of(other) == 2 * RECORD_BYTES


def test_jobs_that_have_ended_make_room(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "USE_BYTES", 0)
    monkeypatch.setattr(room_module, "MAX_BYTES", 4 * RECORD_BYTES)
    fetched, kept = enclave.done_job(adapter_to=("owner",), queries_by=()), enclave.done_job(adapter_to=("owner",))
    files = [*enclave.book.signed(fetched).job.inputs.values(), *enclave.book.record(fetched).results.values()]
    for kind in "adapter", "output":
        enclave.book.fetched(fetched, OWNER, kind)
        enclave.book.fetched(fetched, OWNER, kind)
    signed = [enclave.signed_job(queries_by=()) for _ in range(4)]
    first, refused = enclave.submit(signed[0]), enclave.submit(enclave.signed_job({"data": {"profiles": ["enclave"]}}))
    assert enclave.told().count("retired") == 0 and all(map(enclave.book.store.has, files))
    enclave.submit(signed[1])  # takes the place of both of those that nobody wants any more: one is not enough
    assert [enclave.book.record(d).retired for d in (fetched, kept, first, refused)] == [True, False, False, True]
    assert not any(map(enclave.book.store.has, files))
    assert enclave.book.record(fetched).status == "done" and enclave.book.results_for(fetched, OWNER) == {}
    with pytest.raises(UsageError, match="no room"):  # results that nobody has fetched are kept for a week
        enclave.submit(signed[2])
    assert enclave.book.results_for(kept, OWNER)


def retire(enclave: Enclave, digest: str) -> None:
    with enclave.state.lock:
        enclave.book.room.retire(digest)


def test_a_retired_job_stays_used_up_and_is_forgotten_when_it_has_expired(tmp_path: Path, later: Any) -> None:
    with open_enclave(tmp_path) as enclave:
        signed = enclave.signed_job()
        digest = enclave.submit(signed)
        enclave.book.next()
        enclave.book.finished(digest, {})
        retire(enclave, digest)
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        with pytest.raises(ConsentError, match="used up"):
            enclave.submit(signed)
        assert enclave.book.job_of(digest, OWNER)[1].retired
        later(signed.job.expires)
        enclave.book.room.drop_expired()
        with pytest.raises(ConsentError, match="expired"):
            enclave.submit(signed)
        with pytest.raises(UsageError, match="no such job"):
            enclave.book.record(digest)


@pytest.mark.parametrize("retired", [False, True])
@pytest.mark.parametrize("workers", [0, 13])
def test_a_full_book_fits_into_the_state(retired: bool, workers: int) -> None:
    """Whatever fills it: a state that cannot be written would end everything."""
    names, digest = ["provider adapter", "owner adapter", "provider output", "owner output"], "ab" * 32
    live = {"step": 9, "steps": 9, "checkpoint": digest, "checkpoint_step": 1, "starts": 5, "fetched": tuple(names)}
    live |= {"results": {"adapter": digest, "output": digest, "report": digest}, "cancelled": True, "named": workers}
    live |= {"workers": [{"worker": digest, "blocks": 99, "parameters": 1 << 40, "form": "keyed"}] * max(4, workers)}
    ended = {"status": "refused", "reason": "x" * 500, "queries": 7, "ended": 1, "retired": retired}
    record = Record(7, digest, digest, 1 << 50, **ended, **({} if retired else live))
    count = room_module.MAX_BYTES // record.bytes
    jobs = {f"{number:064x}": record.to_fields() for number in range(count)}
    assert Record.from_fields(record.to_fields()) == record
    assert len(encode({"jobs": jobs, "identity": "x" * 10_000})) < MAX_STATE_BYTES


def test_a_state_full_of_counts_can_be_written_and_read() -> None:
    digests = (f"{number:064x}" for number in range(room_module.MAX_BYTES // room_module.USE_BYTES))
    fields = {"uses": {digest: f"1000000 9007199254740992 {digest}" for digest in digests}}
    assert len(data := encode(fields)) < MAX_STATE_BYTES // 2  # and handed over
    assert decode(data, "state", max_bytes=MAX_STATE_BYTES) == fields


def test_what_fails_for_ever_does_not_fill_the_log(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book_module, "_MAX_NOTED", 2)
    monkeypatch.setattr(questions_module, "_MAX_GIVEN_BACK", 2)
    job = enclave.done_job(max_queries=5)
    for number in range(5):
        enclave.book.questions.count(job, OWNER, 1, 1, f"{number:064x}")
        enclave.book.questions.give_back(job, OWNER, 1, f"{number:064x}")
    assert enclave.told().count("query-failed") == 2 and enclave.book.record(job).queries == 3
    failing = enclave.signed_job()
    for _ in range(3):
        digest = enclave.submit(failing)
        assert enclave.book.next() == digest
        enclave.book.failed(digest, ObfuscatuneError("x"))
    with pytest.raises(UsageError, match="failed too often"):
        enclave.submit(failing)
    assert enclave.told().count("submitted-again") == 2


def test_a_file_that_another_job_needs_stays(enclave: Enclave) -> None:
    model = enclave.seal("model")
    enclave.store(*model)
    first, second = (enclave.done_job(model=model[0]) for _ in range(2))
    retire(enclave, first)
    assert enclave.book.store.has(model[0])
    retire(enclave, second)
    assert not enclave.book.store.has(model[0])


def test_a_job_whose_file_the_disk_lost(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        signed = enclave.signed_job()
        done, digest = enclave.done_job(), enclave.submit(signed)
        platform = enclave.platform
    for path in (tmp_path / "store" / "jobs").iterdir():
        path.unlink() if path.stem == digest else path.write_bytes(path.read_bytes()[:-1] + b"x")
    with open_enclave(tmp_path, platform) as enclave:
        assert enclave.book.record(digest).reason == "JobFileLost" and enclave.book.next() is None
        assert enclave.book.record(done).status == "done" and enclave.book.results_for(done, OWNER) == {}
        enclave.submit(signed)
        assert enclave.told()[-1] == "submitted-again" and enclave.book.missing(digest)


@pytest.mark.slow
def test_1000_jobs_in_a_row_by_one_party(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody fetches a thing; the last one is taken in as the first, and all are there after a restart."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nine tenths of the time, and nothing that it is about
    enclave.book.room.parties = lambda: [LAB.public.fingerprint, OWNER]
    model, data, prompts = (enclave.seal(kind) for kind in ("model", "data", "prompts"))
    for file in (model, data, prompts):
        enclave.store(*file)
    inputs = {"model": model[0], "data": data[0], "prompts": prompts[0]}
    digests = [enclave.done_job(**inputs) for _ in range(1000)]
    book = Book(enclave.state, enclave.log, enclave.book.store)
    assert all(len(book.results_for(digest, OWNER)) >= 1 for digest in digests)


def test_submissions_from_many_threads(enclave: Enclave) -> None:
    jobs = [enclave.signed_job() for _ in range(4)]
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for signed in jobs[number % 4 :] + jobs[: number % 4]:
                digest = enclave.book.submit(signed, OWNER)
                enclave.book.has_queued(), enclave.book.missing(digest), enclave.book.record(digest)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert enclave.told().count("submitted") == enclave.told().count("queued") == 4
    started = [enclave.book.next() for _ in range(5)]
    assert sorted(map(str, started)) == sorted([*[signed.job.digest for signed in jobs], "None"])
    head, lines = enclave.book.committed_log(0)
    check(lines, head, enclave.state.identity.public)


@pytest.mark.parametrize("party", [LAB, CLINIC])
def test_a_party_cancels_what_waits_or_is_queued(enclave: Enclave, party: Any) -> None:
    waiting, queued = enclave.submit(enclave.signed_job(stored=False)), enclave.submit(enclave.signed_job())
    for job in (waiting, queued):
        enclave.book.cancel(job, party.public.fingerprint)
        assert enclave.book.record(job).status == "cancelled"
        with pytest.raises(UsageError, match="has ended"):
            enclave.book.cancel(job, party.public.fingerprint)
        with pytest.raises(ConsentError, match="used up"):
            enclave.submit(enclave.book.signed(job))
    assert enclave.book.next() is None and enclave.told().count("cancelled") == enclave.told().count("cancel") == 2


def test_a_job_beyond_a_quota_is_refused_though_it_ran(enclave: Enclave) -> None:
    """It would be again, so nobody is told to submit it once more; what is not here now, the operator can mend."""
    signed = enclave.signed_job()
    job = enclave.submit(signed)
    enclave.book.next()
    enclave.book.failed(job, LackingError("the enclave has not the workers that the job names", got="none"))
    record = enclave.book.record(job)
    assert (record.status, record.reason) == ("failed", "the enclave has not the workers that the job names")
    enclave.submit(signed)
    enclave.book.next()
    enclave.book.failed(job, ConsentError("max_queries of the model's terms", got="3", expected="at most 2"))
    record = enclave.book.record(job)
    assert record.status == "refused" and record.reason == "max_queries of the model's terms"
    with pytest.raises(ConsentError, match="used up"):
        enclave.submit(signed)


def test_a_running_job_that_is_cancelled_ends_at_its_next_step(enclave: Enclave) -> None:
    job = enclave.submit(enclave.signed_job())
    enclave.book.next()
    enclave.book.checkpointed(job, 1, enclave.result("checkpoint"))
    assert not enclave.book.is_cancelled(job)
    for _ in range(2):  # asked twice, noted once
        enclave.book.cancel(job, OWNER)
    assert enclave.book.is_cancelled(job)
    enclave.book.failed(job, ConsentError("a party has cancelled the job"))
    assert enclave.book.record(job).status == "cancelled" and enclave.book.record(job).checkpoint is None
    assert enclave.told()[-2:] == ["cancel", "cancelled"]


def test_a_running_job_that_was_cancelled_is_not_resumed_after_a_kill(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        job = enclave.submit(enclave.signed_job())
        enclave.book.next()
        enclave.book.cancel(job, OWNER)
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        assert enclave.book.record(job).status == "cancelled" and enclave.book.next() is None


def test_a_checkpoint_that_a_crash_kept_from_the_book_is_removed(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        job = enclave.submit(enclave.signed_job())
        enclave.book.next()
        enclave.book.checkpointed(job, 1, known := enclave.result("checkpoint"))
        orphan, platform = enclave.result("checkpoint"), enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        assert enclave.book.store.has(known) and not enclave.book.store.has(orphan)
        assert enclave.book.missing(job) == {}


def test_what_is_deleted_leaves_no_sealed_file(enclave: Enclave) -> None:
    data, path = enclave.seal("data")
    enclave.store(data, path)
    first, second = enclave.done_job(data=data), enclave.submit(enclave.signed_job(data=data))
    with pytest.raises(UsageError, match="has not ended"):
        enclave.book.delete(second, OWNER)
    files = [*enclave.book.record(first).results.values(), *enclave.book.signed(first).job.inputs.values()]
    enclave.book.delete(first, OWNER)
    assert [file for file in files if enclave.book.store.has(file)] == [data]  # the other job needs it
    record = enclave.book.record(first)
    assert record.status == "deleted" and record.results == {}
    with pytest.raises(ConsentError, match="used up"):
        enclave.submit(enclave.book.signed(first))
    enclave.book.cancel(second, OWNER)
    enclave.book.delete(second, OWNER)
    enclave.book.delete(second, OWNER)
    assert not enclave.book.store.has(data) and enclave.told()[-1] == "deleted"


def test_the_parties_are_told_which_worker_has_what(enclave: Enclave) -> None:
    job = enclave.submit(enclave.signed_job())
    enclave.book.next()
    parts = [{"worker": "ab" * 32, "operator": "A cloud", "blocks": 2, "parameters": 100, "form": "keyed"}]
    enclave.book.placed(job, parts)
    kept = {"worker": "ab" * 32, "blocks": 2, "parameters": 100, "form": "keyed"}
    assert enclave.book.record(job).workers == [kept] and enclave.events()[-1].details == kept
