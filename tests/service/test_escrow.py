"""The state of an enclave without a sealing key, after it has died: for all parties together, and for no fewer."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import ConsentError, FormatError, ObfuscatuneError, SealError, StorageError, UsageError
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.change import Member
from obfuscatune.parties.enclave import Enclave as Client
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.succession import succeed
from obfuscatune.parties.upgrade import SHARE_BYTES, goes_on, share_info
from obfuscatune.service.escrow import FILE, Escrow, Recovery
from obfuscatune.service.members import Members
from obfuscatune.service.serve import open_service
from obfuscatune.service.takeover import TakeOver, wait_for_hand_over

from .jobs import CLINIC, LAB, STRANGER, Enclave, open_enclave
from .platforms import MemoryPlatform
from .test_members import OPERATOR, changed, members_of, names, put

pytestmark = pytest.mark.filterwarnings("ignore:this platform has no sealing key")


def keep(enclave: Enclave, directory: Path) -> Any:
    """Found a membership of LAB, CLINIC and the operator, and keep the state from there on."""
    put(directory / "parties", LAB, CLINIC)
    members = members_of(enclave, directory / "parties", OPERATOR)
    enclave.book.committed = Escrow(enclave.state, enclave.directory).write
    members.found()
    return members


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Enclave]:
    with open_enclave(tmp_path / "old", MemoryPlatform(key=None)) as enclave:
        yield enclave


def share_of(directory: Path, party: Identity) -> bytes:
    record = json.loads((directory / FILE).read_bytes())
    wrapped = base64.b64decode(record["shares"][party.public.fingerprint])
    return party.unwrap(wrapped, share_info(record["enclave"], party.public.fingerprint))


def test_all_parties_together_bring_it_back(
    old: Enclave, tmp_path: Path, simulated: tuple[SimulatedPlatform, Policy]
) -> None:
    keep(old, tmp_path)
    done, waiting = old.done_job(), old.submit(old.signed_job(stored=False))
    shutil.copytree(old.directory, tmp_path / "new")  # what is on the disk when it is killed
    memory, where, addresses = MemoryPlatform(key=None), threading.Event(), []
    memory.attester = simulated[0].attester

    def say(address: str) -> None:
        addresses.append(address)
        where.set()

    with open_enclave(tmp_path / "empty", memory) as new:
        more = {"listen": "tls://127.0.0.1:0", "parties": tmp_path / "parties", "operator": None, "waiting": say}
        more["old"] = old.state.identity.public
        thread = threading.Thread(target=wait_for_hand_over, args=(new.state, tmp_path / "new", memory), kwargs=more)
        thread.start()
        assert where.wait(30)
        lab, clinic, stranger = (Client(addresses[0], simulated[1], who) for who in (LAB, CLINIC, STRANGER))
        with pytest.raises(ConsentError, match="not known"):
            stranger.share()
        shares = {}
        for who, client, lacking in ((LAB, lab, 1), (CLINIC, clinic, 0)):
            enclave, shares[who.public.name] = client.share()
            assert enclave == old.fingerprint
            assert client.release(shares[who.public.name]) == lacking
        thread.join(30)
        assert not thread.is_alive() and set(new.state.jobs) == {done, waiting}
        certificates = [each["certificate"].encode() for each in new.state.former]
        assert goes_on(certificates, old.fingerprint, new.state.identity.public.fingerprint)
        assert new.state.identity.public != old.state.identity.public  # nothing is sealed to the old keys any more


def test_a_restart_leaves_what_can_be_released(
    old: Enclave, tmp_path: Path, simulated: tuple[SimulatedPlatform, Policy]
) -> None:
    """A service manager starts the enclave again with the same command line, on the same directory."""
    keep(old, tmp_path)
    old.done_job()
    state, platform = tmp_path / "state", MemoryPlatform(key=None)
    shutil.copytree(old.directory, state)  # what is on the disk when it is killed
    platform.attester = simulated[0].attester

    def tree() -> dict[str, bytes]:
        files = [path for path in state.rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in files}

    def start(**more: Any) -> Any:
        return open_service(
            state, platform, listen="tls://127.0.0.1:0", parties=tmp_path / "parties", worker="spawn", **more
        )

    before = tree()
    for escrow in (True, False):
        with pytest.raises(UsageError, match="in escrow") as caught, start(escrow=escrow):
            pass
        assert "--take_over" in (caught.value.hint or "") and tree() == before
    with start(escrow=True, new=True):
        assert not (state / FILE).exists()  # or the next start would be refused for nothing
    with start(escrow=True):
        pass


def test_what_was_stated_of_ended_identities_is_brought_back_too(old: Enclave, tmp_path: Path) -> None:
    members, thief = keep(old, tmp_path), Identity.generate("thief", "x25519")
    members.succeed(succeed(CLINIC, thief))
    with open_enclave(tmp_path / "new", MemoryPlatform(key=None)) as new:
        recovery = Recovery(old.directory, new.state.identity)
        assert recovery.release(LAB.public, share_of(old.directory, LAB))[0] is None
        taken, _ = recovery.release(thief.public, share_of(old.directory, thief))
        assert taken is not None
        taken.adopt(new.state)
        members = Members(new.state, tmp_path / "nobody")
        assert names(members) == ["lab", "operator", "thief"]
        members.succeed(succeed(CLINIC, None))
        assert names(members) == ["lab", "operator"]


def test_fewer_than_all_have_nothing(old: Enclave, tmp_path: Path) -> None:
    keep(old, tmp_path)
    recovery = Recovery(old.directory, Identity.generate("enclave", "x25519"))
    with pytest.raises(ConsentError, match="no share"):
        recovery.share(STRANGER.public)
    mine = share_of(old.directory, LAB)
    assert recovery.release(LAB.public, mine) == (None, [CLINIC.public.fingerprint])
    with pytest.raises(ConsentError, match="no share"):
        recovery.release(CLINIC.public, mine[:-1])
    with pytest.raises(SealError, match="do not open"):  # guessed
        recovery.release(CLINIC.public, bytes(SHARE_BYTES))
    assert recovery.release(CLINIC.public, share_of(old.directory, CLINIC))[0] is None  # all again
    with pytest.raises(SealError):  # sealed to one party, for one enclave
        STRANGER.unwrap(recovery.share(LAB.public)[1], share_info(old.fingerprint, LAB.public.fingerprint))
    with pytest.raises(SealError):
        LAB.unwrap(recovery.share(LAB.public)[1], share_info("ab" * 32, LAB.public.fingerprint))


def test_the_key_is_another_after_each_change(old: Enclave, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = keep(old, tmp_path)
    first = [share_of(old.directory, each) for each in (LAB, CLINIC)]
    old.book.note("anything")
    assert [share_of(old.directory, each) for each in (LAB, CLINIC)] == first
    members.change(changed(members, "admit", Member(STRANGER.public), LAB, OPERATOR).to_bytes(), LAB.public)
    again = [share_of(old.directory, each) for each in (LAB, CLINIC, STRANGER)]
    assert len({*first, *again}) == 5
    members.change(changed(members, "remove", STRANGER.public.fingerprint, STRANGER).to_bytes(), LAB.public)
    share_of(old.directory, STRANGER)  # what it has sealed opens with the state, so it has a say still
    heir = Identity.generate("clinic-2", "x25519")
    members.succeed(succeed(CLINIC, heir))
    share_of(old.directory, heir)
    with pytest.raises(KeyError):
        share_of(old.directory, CLINIC)
    members.succeed(succeed(heir, None))
    assert not (old.directory / FILE).exists()  # revoked: nobody could release its share
    assert "kept in escrow no more" in caplog.text


def test_a_split_that_ends_half_way_lets_no_fewer_release(
    old: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that cannot be made: those that were made before it must not become all that there are."""
    members, wrap = keep(old, tmp_path), PublicIdentity.wrap
    admission = changed(members, "admit", Member(STRANGER.public), LAB, OPERATOR).to_bytes()

    def broken(self: PublicIdentity, data: bytes, info: bytes) -> bytes:
        if self == STRANGER.public:
            raise FormatError("a sealing key that is none")
        return wrap(self, data, info)

    monkeypatch.setattr(PublicIdentity, "wrap", broken)
    for _ in range(2):  # the second time the membership is the one that was split for
        with pytest.raises(FormatError, match="sealing key that is none"):
            members.change(admission, LAB.public)
        assert members.founded.number == 0
    old.book.note("anything")
    shares = json.loads((old.directory / FILE).read_bytes())["shares"]
    assert set(shares) == {LAB.public.fingerprint, CLINIC.public.fingerprint}


def test_nothing_is_there_while_open_and_once_handed_over(old: Enclave, tmp_path: Path) -> None:
    old.book.committed = Escrow(old.state, old.directory).write
    old.book.note("anything")
    assert not (old.directory / FILE).exists()
    keep(old, tmp_path)
    assert (old.directory / FILE).exists()
    old.book.hand_over("ab" * 32, "cd" * 32)
    assert not (old.directory / FILE).exists()
    with pytest.raises(UsageError, match="no state to be released"):
        Recovery(old.directory, LAB).share(LAB.public)


def test_where_the_disk_refuses_nothing_is_done(old: Enclave, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(old, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("obfuscatune.service.escrow.write_private", full)
        with pytest.raises(StorageError):
            old.submit(old.signed_job(stored=False))
    assert not old.state.jobs
    old.submit(old.signed_job(stored=False))


@pytest.mark.parametrize("name", ["box", "enclave", "format", "nonce", "shares"])
def test_a_file_of_another_form(old: Enclave, tmp_path: Path, name: str) -> None:
    keep(old, tmp_path)
    path = old.directory / FILE
    record = json.loads(path.read_bytes())
    for value in (None, 1, "x", [], {}, "ab" * 32, {"x": "AA=="}):
        path.write_bytes(encode({**record, name: value}))
        recovery = Recovery(old.directory, STRANGER)
        with pytest.raises(ObfuscatuneError):
            for party in (LAB, CLINIC):
                recovery.share(party.public)
                recovery.release(party.public, bytes(SHARE_BYTES))
    path.write_bytes(b"{}")
    with pytest.raises(FormatError):
        Recovery(old.directory, STRANGER).share(LAB.public)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_changed_file_is_refused(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("escrow")
    with open_enclave(directory / "old", MemoryPlatform(key=None)) as old:
        keep(old, directory)
        path = old.directory / FILE
        shares = [share_of(old.directory, each) for each in (LAB, CLINIC)]
        changed = bytearray(path.read_bytes())
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bytes(changed))
        recovery = Recovery(old.directory, STRANGER)
        with pytest.raises(ObfuscatuneError):
            for party, share in zip((LAB, CLINIC), shares, strict=True):
                recovery.release(party.public, share)


def test_who_released_need_not_again_once_the_operator_has_copied_the_rest(old: Enclave, tmp_path: Path) -> None:
    keep(old, tmp_path)
    done, new = old.done_job(), tmp_path / "new"
    new.mkdir()
    shutil.copy(old.directory / FILE, new)
    shares = {each: share_of(old.directory, each) for each in (LAB, CLINIC)}
    with open_enclave(tmp_path / "fresh", MemoryPlatform(key=None)) as fresh:
        taking = TakeOver(fresh.state, new, old.fingerprint)
        taking.handle(LAB.public, {"op": "release"}, shares[LAB])
        with pytest.raises(UsageError, match="audit log") as caught:
            taking.handle(CLINIC.public, {"op": "release"}, shares[CLINIC])
        assert "then ask again" in (caught.value.hint or "")
        shutil.copy(old.directory / "log.jsonl", new)
        with pytest.raises(UsageError, match="store of the old enclave"):
            taking.handle(CLINIC.public, {"op": "release"}, shares[CLINIC])
        shutil.copytree(old.directory / "store", new / "store")
        assert taking.handle(CLINIC.public, {"op": "release"}, shares[CLINIC])[0] == {"lacking": []}
        assert taking.taken.is_set() and set(fresh.state.jobs) == {done} and not taking._recovery._released


def test_shares_of_one_file_are_no_use_for_another_that_the_host_puts_there(old: Enclave, tmp_path: Path) -> None:
    keep(old, tmp_path)
    path, taking = old.directory / FILE, TakeOver(old.state, old.directory, old.fingerprint)
    shares, first = {each: share_of(old.directory, each) for each in (LAB, CLINIC)}, path.read_bytes()
    old.book.note("anything")
    taking.handle(LAB.public, {"op": "release"}, shares[LAB])
    path.write_bytes(first)
    reply, _ = taking.handle(CLINIC.public, {"op": "release"}, shares[CLINIC])
    assert reply == {"lacking": [LAB.public.fingerprint]}  # it would have to release anew
