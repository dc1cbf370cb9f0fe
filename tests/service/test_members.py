"""Who may connect, at the enclave's end: founded once, changed by signatures, and out means out, at once."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import (
    BusyError,
    ConsentError,
    FormatError,
    ObfuscatuneError,
    ProtocolError,
    RollbackError,
    StorageError,
    UsageError,
)
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.change import Member, SignedChange
from obfuscatune.parties.channel import AttestedServer
from obfuscatune.parties.enclave import Enclave as Client
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.membership import follow
from obfuscatune.parties.succession import succeed
from obfuscatune.service.book import Book
from obfuscatune.service.members import Members
from obfuscatune.service.membership import MemberRequests
from obfuscatune.service.store import Store

from .jobs import CLINIC, LAB, STRANGER, Enclave, open_enclave

OPERATOR = Identity.generate("operator", "x25519")


def put(directory: Path, *identities: Identity) -> None:
    directory.mkdir(exist_ok=True)
    for identity in identities:
        (directory / f"{identity.public.name}.pub").write_bytes(encode(identity.public.to_dict()) + b"\n")


def members_of(enclave: Enclave, directory: Path, operator: Identity | None = None) -> Members:
    members = Members(enclave.state, directory, None if operator is None else operator.public)
    members.note = enclave.book.note
    enclave.book._ended, enclave.book.left = members.strangers, members.left
    return members


def names(members: Members) -> list[str]:
    return sorted(member.identity.name for member in members.current)


def changed(members: Members, act: Any, subject: Any, *by: Identity) -> SignedChange:
    assert members.founded is not None
    signed = SignedChange(members.founded.next(act, subject))
    for identity in by:
        signed = signed.sign(identity)
    return signed


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    with open_enclave(tmp_path) as opened:
        yield opened


@pytest.fixture
def members(enclave: Enclave, tmp_path: Path) -> Members:
    put(tmp_path / "parties", LAB, CLINIC)
    return members_of(enclave, tmp_path / "parties")


def test_the_first_job_closes_it_and_the_directory_gives_nothing_more(
    enclave: Enclave, members: Members, tmp_path: Path
) -> None:
    assert names(members) == ["clinic", "lab"] and members.told() is None
    put(tmp_path / "parties", STRANGER)
    assert members.allows(STRANGER.public)  # until then
    (tmp_path / "parties" / "stranger.pub").unlink()
    handler = MemberRequests(members, enclave.book, enclave.requests.handle)
    reply, page = handler.handle(LAB.public, {"op": "members", "start": 0}, b"")
    assert reply == {"changes": 1, "open": 1} and b'"found"' in page
    alone = SignedJob(enclave.signed_job().job).sign(LAB)
    over = enclave.signed_job(created=1, expires=2)
    for payload in (b"{}", alone.to_bytes(), over.to_bytes()):  # no job that is taken in
        with pytest.raises(ObfuscatuneError):
            handler.handle(LAB.public, {"op": "submit"}, payload)
    assert members.told() is None
    handler.handle(LAB.public, {"op": "submit"}, enclave.signed_job().to_bytes())
    put(tmp_path / "parties", STRANGER)
    (tmp_path / "parties" / "clinic.pub").unlink()
    assert names(members) == ["clinic", "lab"] and not members.allows(STRANGER.public)
    entry = next(entry for entry in enclave.events() if entry.event == "membership")
    assert members.told() == {"digest": entry.details["digest"], "number": 0}
    assert (entry.event, entry.details["act"], entry.details["members"]) == ("membership", "found", 2)


def test_a_party_that_nothing_can_be_sealed_to_is_not_let_in(
    enclave: Enclave, members: Members, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody could make its share of an escrow. It shuts nobody else out, and its tries are not in the log."""
    heir = Identity.generate("heir", "x25519")
    broken = replace(heir, public=replace(heir.public, sealing_key=bytes(32)))  # whose secret half can sign
    put(tmp_path / "parties", broken)
    assert names(members) == ["clinic", "lab"] and "sealing key that is none" in caplog.text
    members.found()
    before = len(enclave.events())
    admission = changed(members, "admit", Member(broken.public), LAB, CLINIC).to_bytes()
    for hand_in in (lambda: members.change(admission, LAB.public), lambda: members.succeed(succeed(CLINIC, broken))):
        with pytest.raises(FormatError, match="sealing key that is none"):
            hand_in()
    assert names(members) == ["clinic", "lab"] and len(enclave.events()) == before


@pytest.mark.parametrize("is_founded", [False, True])
def test_a_commit_and_an_upload_do_not_wait_for_each_other(
    enclave: Enclave, members: Members, is_founded: bool
) -> None:
    """A checkpoint takes the state's lock, then the store's; an upload with them the other way round froze all."""
    store = Store(enclave.directory / "shared", 1 << 26, members.parties)  # as `open_service` has it
    if is_founded:
        members.found()

    def upload() -> None:
        begun = store.begin("ab" * 32, 1 << 20, LAB.public.fingerprint)
        begun.write(0, bytes(1000))

    thread = threading.Thread(target=upload, daemon=True)
    with enclave.state.lock:
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        assert store.room(CLINIC.public.fingerprint) > 0


def test_broken_files_are_named_and_passed_over(
    enclave: Enclave, members: Members, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "parties"
    (directory / "broken.pub").write_text("{}")
    (directory / "other.key").write_bytes(STRANGER.to_bytes())
    (directory / "long.pub").write_bytes(b" " * 100_000)
    (directory / "cut.succession").write_bytes(succeed(CLINIC, None)[:-9])
    (directory / "folder.pub").mkdir()
    os.mkfifo(directory / "pipe.pub")  # to open it would wait for ever
    os.symlink("nowhere", directory / "dangling.pub")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert names(members) == ["clinic", "lab"]
    for name in ("broken.pub", "other.key", "long.pub", "cut.succession", "folder.pub", "pipe.pub", "dangling.pub"):
        assert len([record for record in caplog.records if name in record.message]) == 1, name
    with pytest.raises(UsageError, match="no such directory"):
        members_of(enclave, tmp_path / "nowhere").allows(LAB.public)


def test_a_change_is_logged_sealed_and_there_after_a_restart(tmp_path: Path) -> None:
    put(tmp_path / "parties", LAB, CLINIC)
    with open_enclave(tmp_path) as enclave:
        members = members_of(enclave, tmp_path / "parties", OPERATOR)
        members.found()
        assert names(members) == ["clinic", "lab", "operator"]
        assert sorted(members.parties()) == sorted(each.public.fingerprint for each in (LAB, CLINIC))
        admission = changed(members, "admit", Member(STRANGER.public), LAB, OPERATOR)
        told = members.change(admission.to_bytes(), LAB.public)
        assert members.change(admission.to_bytes(), LAB.public) == told  # the first reply was lost
        for act in ("found", "succession"):
            subject: Any = () if act == "found" else succeed(CLINIC, None)
            with pytest.raises(ConsentError, match="not made so"):
                members.change(changed(members, act, subject, LAB).to_bytes(), LAB.public)
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        members = members_of(enclave, tmp_path / "parties", OPERATOR)
        assert names(members) == ["clinic", "lab", "operator", "stranger"] and members.told() == told
        members.change(changed(members, "remove", LAB.public.fingerprint, LAB).to_bytes(), LAB.public)
        entries = [entry for entry in enclave.events() if entry.event == "membership"]
        assert [entry.details["act"] for entry in entries] == ["found", "admit", "remove"]
        assert entries[1].details["subject"] == STRANGER.public.fingerprint
        assert entries[1].party == LAB.public.fingerprint


def test_where_the_disk_refuses_it_is_as_it_was(
    enclave: Enclave, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    members.found()
    admission = changed(members, "admit", Member(STRANGER.public), LAB, CLINIC).to_bytes()

    def full() -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(enclave.state, "commit", full)
        with pytest.raises(StorageError):
            members.change(admission, LAB.public)
    assert names(members) == ["clinic", "lab"] and len(enclave.state.members) == 1
    members.change(admission, LAB.public)
    assert members.allows(STRANGER.public)


def test_a_statement_in_the_directory_holds_when_its_file_is_gone(members: Members, tmp_path: Path) -> None:
    members.found()
    path, heir = tmp_path / "parties" / "clinic.succession", Identity.generate("clinic-2", "x25519")
    path.write_bytes(succeed(CLINIC, heir))
    members.refresh()
    path.unlink()
    members.refresh()
    assert members.allows(heir.public) and not members.allows(CLINIC.public)
    who = {each.public.name: each.public.fingerprint in members.strangers() for each in (LAB, CLINIC, heir, STRANGER)}
    assert who == {"lab": False, "clinic": True, "clinic-2": False, "stranger": True} and members.left() == frozenset()
    path.write_bytes(succeed(STRANGER, None))
    members.refresh()  # of nobody here
    members.succeed(succeed(heir, None), LAB.public)
    assert names(members) == ["lab"]


def test_it_is_founded_with_what_the_directory_states(
    enclave: Enclave, members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or who was robbed before the first job could not end what a thief has made, once it is founded."""
    parties, thief, revoked = tmp_path / "parties", *(Identity.generate(name, "x25519") for name in ("thief", "gone"))
    put(parties, revoked)
    for name, statement in (("clinic", succeed(CLINIC, thief)), ("gone", succeed(revoked, None)), ("too", b"{}")):
        (parties / f"{name}.succession").write_bytes(statement)
    (parties / "once-more.succession").write_bytes(succeed(CLINIC, thief) + b"\n")
    (parties / "of-nobody.succession").write_bytes(succeed(STRANGER, None))
    reply, page = MemberRequests(members, enclave.book, enclave.requests.handle).handle(
        LAB.public, {"op": "members", "start": 0}, b""
    )
    shown = follow(page.splitlines(), enclave.fingerprint)
    assert reply == {"changes": 3, "open": 1} and shown is not None and shown.members == members.current

    def full() -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(enclave.state, "commit", full)
        with pytest.raises(StorageError):
            members.found()
    assert members.founded is None and not enclave.state.members
    members.found()
    entry = enclave.events()[-1]
    assert (entry.event, entry.details["act"]) == ("membership", "found")
    assert members.told() == {"number": 2, "digest": entry.details["digest"]} and names(members) == ["lab", "thief"]
    for ended in (CLINIC, revoked):
        alias = Member(replace(ended.public, name="new-name"))
        with pytest.raises(ConsentError, match="this identity has ended"):
            members.change(changed(members, "admit", alias, LAB, thief).to_bytes(), LAB.public)
    with pytest.raises(ConsentError, match="changes nothing"):
        members.succeed(succeed(STRANGER, None))
    (parties / "clinic.succession").write_bytes(succeed(CLINIC, None))
    members.refresh()
    assert names(members) == ["lab"]
    members.load()
    assert names(members) == ["lab"]


def test_who_is_in_by_itself_is_not_in_as_another(enclave: Enclave, members: Members, tmp_path: Path) -> None:
    put(tmp_path / "parties", STRANGER)
    (tmp_path / "parties" / "clinic.succession").write_bytes(succeed(CLINIC, STRANGER))
    members.found()
    assert names(members) == ["lab", "stranger"]
    with pytest.raises(ConsentError, match="changes nothing"):
        members.succeed(succeed(CLINIC, None))


def test_statements_that_no_chain_takes_keep_nobody_out(enclave: Enclave, tmp_path: Path) -> None:
    """The operator is in as who it says, though it has named a successor, who is a party."""
    put(tmp_path / "parties", LAB, OPERATOR)
    (tmp_path / "parties" / "operator.succession").write_bytes(succeed(OPERATOR, STRANGER))
    members = members_of(enclave, tmp_path / "parties", OPERATOR)
    before = members.current
    members.found()
    assert set(members.current) == set(before) and names(members) == ["lab", "operator", "stranger"]


def test_a_statement_that_no_chain_takes_costs_nobody_else_his_own(
    enclave: Enclave, members: Members, tmp_path: Path
) -> None:
    """A thief names a successor that is the stolen key again: that line is out; what all others stated holds."""
    parties = tmp_path / "parties"
    thief, heir = (Identity.generate(name, "x25519") for name in ("thief", "lab-2"))
    again = replace(CLINIC, public=replace(CLINIC.public, name="clinic-2"))
    statements = {"clinic": succeed(CLINIC, thief), "thief": succeed(thief, again), "lab": succeed(LAB, heir)}
    for name, data in statements.items():
        (parties / f"{name}.succession").write_bytes(data)
    put(parties, STRANGER)
    members.found()
    assert names(members) == ["lab-2", "stranger"]
    members.succeed(succeed(LAB, None))  # the owner was robbed before: what followed is out
    assert names(members) == ["stranger"]
    for ended in (CLINIC.public, again.public):
        with pytest.raises(ConsentError, match="this identity has ended"):
            members.change(changed(members, "admit", Member(ended), STRANGER).to_bytes(), STRANGER.public)


def test_the_jobs_of_who_leaves_end_and_its_inputs_go(enclave: Enclave, members: Members) -> None:
    members.found()
    members.removed = lambda gone: enclave.book.end_jobs_of_who_left()
    book = enclave.book
    done, running = enclave.done_job(), enclave.submit(enclave.signed_job())
    assert book.next() == running
    queued, waiting = enclave.submit(enclave.signed_job()), enclave.submit(enclave.signed_job(stored=False))
    inputs = {job: book.signed(job).job.inputs for job in (done, running, queued)}
    members.change(changed(members, "remove", CLINIC.public.fingerprint, CLINIC).to_bytes(), CLINIC.public)
    assert [book.record(job).status for job in (done, queued, waiting)] == ["done", "refused", "refused"]
    assert book.is_cancelled(running) and book.is_gone(done)
    for job in (done, queued):  # what was sealed by who left, and not what was sealed by the other
        assert [book.store.has(file) for file in inputs[job].values()] == [True, False, False]
    assert all(map(book.store.has, inputs[running].values()))
    book.failed(running, ConsentError("a party has cancelled the job"))
    assert [book.store.has(file) for file in inputs[running].values()] == [True, False, False]
    assert book.store.has(book.record(done).results["adapter"])  # the partner may fetch what the job gives it
    with pytest.raises(ConsentError, match="has left"):
        book.questions.check(done, LAB.public.fingerprint, 1, 1)
    with pytest.raises(ConsentError, match="or left"):
        enclave.submit(enclave.signed_job())


def test_the_jobs_of_an_identity_are_its_successors(enclave: Enclave, members: Members) -> None:
    members.found()
    enclave.book.names = members.names
    job = enclave.done_job(adapter_to=("owner",), queries_by=("owner",), max_queries=3)
    enclave.book.questions.count(job, CLINIC.public.fingerprint, 2, 1, "q")

    def ask(party: Identity, op: str, **more: Any) -> Any:
        return enclave.requests.handle(party.public, {"op": op, "job": job, **more}, b"")

    heir = CLINIC
    for name in ("clinic-2", "clinic-3"):
        before, heir = heir, Identity.generate(name, "x25519")
        with pytest.raises(UsageError, match="no such job of this party"):
            ask(heir, "status")
        members.succeed(succeed(before, heir))
    members.load()  # as at a restart
    party = heir.public.fingerprint
    assert sorted(ask(heir, "status")[0]["results"]) == ["adapter", "output"]
    assert ask(heir, "list")[1] == ask(CLINIC, "list")[1] and members.names(LAB.public.fingerprint) == {
        LAB.public.fingerprint
    }
    adapter = enclave.book.store.path(enclave.book.record(job).results["adapter"]).read_bytes()
    assert ask(heir, "download", kind="adapter", offset=0)[1] == adapter
    assert enclave.book.record(job).fetched == ("owner adapter",)
    assert enclave.book.questions.count(job, party, 1, 1, "r")
    with pytest.raises(ConsentError, match="used up"):  # what the one has asked the other has not left
        enclave.book.questions.check(job, party, 1, 1, "s")
    with pytest.raises(UsageError, match="no such job"):
        ask(STRANGER, "delete")
    assert ask(heir, "delete")[0]["status"] == "deleted"


def test_who_is_admitted_again_gets_no_job_back(enclave: Enclave, members: Members) -> None:
    members.found()
    members.removed = lambda gone: enclave.book.end_jobs_of_who_left()
    book, signed = enclave.book, enclave.signed_job()
    done, failed = enclave.done_job(queries_by=("owner",)), enclave.submit(signed)
    assert book.next() == failed
    book.failed(failed, MemoryError())
    book.questions.check(done, CLINIC.public.fingerprint, 1, 1)
    members.change(changed(members, "remove", CLINIC.public.fingerprint, CLINIC).to_bytes(), CLINIC.public)
    members.change(changed(members, "admit", Member(CLINIC.public), LAB).to_bytes(), LAB.public)
    again = Book(enclave.state, enclave.log, book.store, left=members.left)  # as after a restart
    for each in (book, again):
        assert members.left() == frozenset() and each.is_gone(done) and each.record(done).status == "done"
        with pytest.raises(ConsentError, match="has left"):
            each.questions.check(done, CLINIC.public.fingerprint, 1, 1)
        with pytest.raises(ConsentError, match="used up"):
            each.submit(signed, LAB.public.fingerprint)
    assert enclave.submit(enclave.signed_job())  # new ones are theirs to make


@pytest.mark.parametrize("fields", [{}, {"start": "0"}, {"start": -1}, {"start": 2}])
def test_hostile_requests(enclave: Enclave, members: Members, fields: dict[str, Any]) -> None:
    handle = MemberRequests(members, enclave.book, enclave.requests.handle).handle
    with pytest.raises((ProtocolError, UsageError)):
        handle(LAB.public, {"op": "members", **fields}, b"")
    for op in ("change_members", "succeed"):
        for payload in (b"", b"{}", b"[" * 1000, b"x" * 300_000):
            with pytest.raises((FormatError, ProtocolError, ConsentError)):
                handle(LAB.public, {"op": op}, payload)
    assert members.founded is None  # nothing of it has closed it


# Over the channel


@dataclass
class Serving:
    """An enclave's membership behind a real server; ``answer`` answers what is not about members."""

    enclave: Enclave
    members: Members
    server: AttestedServer
    policy: Policy
    root: Path
    answer: Callable[..., Any]

    def client(self, identity: Identity, folder: Path | None = None) -> Client:
        return Client(self.server.address, self.policy, identity, 30.0, folder)


@contextlib.contextmanager
def serve(enclave: Enclave, members: Members, simulated: tuple[SimulatedPlatform, Policy]) -> Iterator[Serving]:
    serving: Serving

    def others(client: Any, fields: dict[str, Any], payload: bytes) -> Any:
        return serving.answer(client, fields, payload)

    server = AttestedServer(
        "tls://127.0.0.1:0",
        identity=enclave.state.identity,
        attester=simulated[0].attester,
        allow=members.allows,
        handle=MemberRequests(members, enclave.book, others, simulated=True).handle,
        members=members.told,
    )
    platform, policy = simulated
    serving = Serving(enclave, members, server, policy, platform.root, lambda client, fields, payload: ({}, payload))

    def removed(gone: frozenset[str]) -> None:
        for party in gone:
            server.expel(party)

    members.removed = removed
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield serving
    finally:
        server.close()
        thread.join(20)


@pytest.fixture
def serving(enclave: Enclave, members: Members, simulated: tuple[SimulatedPlatform, Policy]) -> Iterator[Serving]:
    with serve(enclave, members, simulated) as opened:
        yield opened


def test_from_admission_to_removal(serving: Serving, tmp_path: Path) -> None:
    lab, clinic, stranger = (tmp_path / name for name in ("lab", "clinic", "stranger"))
    for folder in (lab, clinic, stranger):
        folder.mkdir()
    by_lab, by_clinic = serving.client(LAB, lab), serving.client(CLINIC, clinic)
    with pytest.raises(ConsentError, match="not closed yet"):
        by_lab.propose_change("admit", Member(STRANGER.public))
    serving.members.found()
    signed = by_lab.propose_change("admit", Member(STRANGER.public))
    assert "2 of 2" in by_lab.lacking(signed)
    with pytest.raises(ConsentError, match="lacks signatures"):
        by_lab.change(signed)
    with pytest.raises(ConsentError, match="not known"):
        serving.client(STRANGER).members()
    by_clinic.change(by_clinic.agree(signed))
    told = serving.client(STRANGER, stranger).members()
    assert [str(each.change).split()[0] for each in told.chain] == ["found", "admit"] and not told.is_open
    assert by_lab.members().membership == told.membership
    # The one who leaves learns it where it waits; on a new connection too.
    with serving.client(STRANGER, stranger).connect() as channel:
        assert channel.members == (1, told.membership.digest)
        leaving = serving.client(STRANGER)
        leaving.change(leaving.propose_change("remove", STRANGER.public.fingerprint))  # it gets its reply
        with pytest.raises(ConsentError, match="not known"):
            channel.request({"op": "echo"})
    with pytest.raises(ConsentError, match="not known"):
        serving.client(STRANGER, stranger).connect()
    assert len((lab / next(lab.iterdir()).name).read_text().splitlines()) == 2  # as of its last connection
    by_lab.members()
    assert len((lab / next(lab.iterdir()).name).read_text().splitlines()) == 3


def test_a_membership_put_back_or_forked_is_refused_by_who_knew_more(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, members = tmp_path / "lab", serving.members
    folder.mkdir()
    members.found()
    before = list(serving.enclave.state.members)
    members.change(changed(members, "admit", Member(STRANGER.public), LAB, CLINIC).to_bytes(), LAB.public)
    client = serving.client(LAB, folder)
    client.connect().close()

    def put_back(*changes: SignedChange) -> None:
        serving.enclave.state.members = list(before)
        members.load()
        for change in changes:
            members.change(change.to_bytes(), LAB.public)

    put_back()
    with pytest.raises(RollbackError, match="older membership"):
        client.connect()
    put_back(changed(members, "admit", Member(OPERATOR.public), LAB, CLINIC))
    with pytest.raises(RollbackError, match="another membership"):
        client.connect()
    members.change(changed(members, "remove", OPERATOR.public.fingerprint, OPERATOR).to_bytes(), LAB.public)
    with pytest.raises(RollbackError, match="no continuation"):
        client.connect()
    with monkeypatch.context() as patch:  # nor does what is no change at all, and no session goes on with that
        patch.setattr("obfuscatune.parties.known._fetch", lambda channel, start: ([b"{}"], False))
        with pytest.raises(RollbackError, match="no continuation"):
            client.connect()
    serving.enclave.state.members = []
    members.load()
    with pytest.raises(RollbackError, match="nobody was admitted"):
        client.connect()
    serving.client(LAB).connect().close()  # the control: who has seen nothing sees nothing


def test_a_change_that_another_thread_has_kept_meanwhile_is_no_alarm(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.members.found()
    alarms = [True, False, True, True]

    def compare(channel: Any, folder: Path) -> None:
        if alarms.pop(0):
            raise RollbackError("the enclave is under an older membership than the one that you know")

    monkeypatch.setattr("obfuscatune.parties.reached.compare", compare)
    with serving.client(LAB, tmp_path).connect():
        assert len(alarms) == 2  # asked anew, over another connection
    with pytest.raises(RollbackError, match="older membership"):
        serving.client(LAB, tmp_path).connect()
    assert not alarms


def test_changes_under_load_disturb_nobody_else(serving: Serving) -> None:
    """50 requests at a time of two parties, while a third is admitted and removed again and again."""
    serving.members.found()
    rounds, workers, going = 4, 25, threading.Event()
    counts: dict[str, int] = {"lab": 0, "clinic": 0}
    faults: list[BaseException] = []
    lock, finished = threading.Lock(), threading.Event()

    def ask(identity: Identity) -> None:
        name = identity.public.name
        try:
            with serving.client(identity).connect() as channel:
                going.wait(60)
                payload = os.urandom(2000)
                while not finished.is_set():
                    while True:
                        try:
                            assert channel.request({"op": "echo"}, payload)[1] == payload
                            break
                        except BusyError:  # eight of a party at once; the others wait
                            continue
                    with lock:
                        counts[name] += 1
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(identity,)) for identity in (LAB, CLINIC) for _ in range(workers)]
    for thread in threads:
        thread.start()
    going.set()
    started, held = threading.Event(), threading.Event()

    def slow(client: Any, fields: dict[str, Any], payload: bytes) -> Any:
        if fields["op"] == "wait":
            started.set()
            held.wait(30)
        return {}, payload

    serving.answer = slow
    by_lab, by_clinic = serving.client(LAB), serving.client(CLINIC)
    try:
        for _ in range(rounds):
            by_clinic.change(by_clinic.agree(by_lab.propose_change("admit", Member(STRANGER.public))))
            started.clear()
            held.clear()
            ended: list[BaseException] = []
            with serving.client(STRANGER).connect() as waiting, serving.client(STRANGER).connect() as working:

                def work(channel: Any = working, ended: list[BaseException] = ended) -> None:
                    try:
                        channel.request({"op": "wait"}, b"secret")
                    except ObfuscatuneError as error:
                        ended.append(error)

                thread = threading.Thread(target=work)
                thread.start()
                assert started.wait(30)
                leave = serving.client(STRANGER).propose_change("remove", STRANGER.public.fingerprint)
                by_lab.change(leave)
                thread.join(10)  # while its request is still being worked on: it does not wait for that
                assert not thread.is_alive() and len(ended) == 1 and not held.is_set()
                with pytest.raises((ConsentError, ProtocolError)):
                    waiting.request({"op": "echo"})
                held.set()
    finally:
        finished.set()
        held.set()
        for thread in threads:
            thread.join(30)
    assert not faults and min(counts.values()) >= workers
    assert serving.members.founded is not None and serving.members.founded.number == 2 * rounds
