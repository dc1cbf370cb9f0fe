"""The state goes to one enclave of other code, if all who must have signed it; wherever it crashes, one has it."""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import (
    AttestationError,
    BusyError,
    ConsentError,
    FormatError,
    ObfuscatuneError,
    ProtocolError,
    SealError,
    StorageError,
    UsageError,
)
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.change import Member
from obfuscatune.parties.channel.certificate import fresh_evidence
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.reached import NotTakenError
from obfuscatune.parties.succession import succeed
from obfuscatune.parties.upgrade import Upgrade, certify, goes_on, read_certificate
from obfuscatune.service import takeover
from obfuscatune.service.handover import give, open_bundle, seal_bundle
from obfuscatune.service.membership import MemberRequests
from obfuscatune.service.runner import Runner
from obfuscatune.service.serve import Service
from obfuscatune.service.takeover import TakeOver, wait_for_hand_over

from .jobs import CLINIC, LAB, STRANGER, Enclave, open_enclave
from .platforms import MemoryPlatform
from .test_members import changed, members_of, names, put, serve

NEW_CODE = bytes(range(48))


@dataclass
class Hardware:
    """What runs the new code: ``policy`` accepts it and nothing else."""

    platform: SimulatedPlatform
    policy: Path

    def evidence(self, enclave: Enclave) -> bytes:
        return fresh_evidence(enclave.state.identity.public, self.platform.attester, "ab" * 32, "").to_bytes()


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    directory = tmp_path_factory.mktemp("hardware")
    SimulatedPlatform.create(directory)
    platform, policy = SimulatedPlatform(directory, measurement=NEW_CODE), directory / "new-policy.toml"
    policy.write_text(
        f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{NEW_CODE.hex()}"]\n'
        '[simulation]\nallow = true\nroot = "simulation-root.pem"\n'
    )
    return Hardware(platform, policy)


@dataclass
class Pair:
    """The old enclave, with a job that waits for the clinic and one that is done; and where the new one will be."""

    old: Enclave
    directory: Path
    hardware: Hardware
    done: str
    waiting: str

    @property
    def upgrade(self) -> Upgrade:
        return Upgrade.make(self.old.fingerprint, self.hardware.policy)

    def give(self, new: Enclave, upgrade: Upgrade | None = None, *, simulated: bool = True) -> bytes:
        statement = self.upgrade.sign(LAB).sign(CLINIC) if upgrade is None else upgrade
        return give(self.old.book, statement.to_bytes(), self.hardware.evidence(new), simulated=simulated)

    def copy(self) -> None:
        """What the operator does between the two."""
        shutil.copytree(self.old.directory / "store", self.directory / "store", dirs_exist_ok=True)
        shutil.copy(self.old.directory / "log.jsonl", self.directory)

    def take(self, new: Enclave, bundle: bytes) -> None:
        """Bring the bundle in two pieces."""
        taking, half = TakeOver(new.state, self.directory, self.old.fingerprint), len(bundle) // 2
        for offset, piece in ((0, bundle[:half]), (half, bundle[half:])):
            fields = {"op": "take_over", "offset": offset, "size": len(bundle)}
            taking.handle(LAB.public, fields, piece)
        assert taking.taken.is_set()


@pytest.fixture
def pair(tmp_path: Path, hardware: Hardware) -> Iterator[Pair]:
    put(tmp_path / "parties", LAB, CLINIC)
    with open_enclave(tmp_path / "old") as old:
        members = members_of(old, tmp_path / "parties")
        members.found()
        done = old.done_job()
        waiting = old.submit(old.signed_job(stored=False))
        yield Pair(old, tmp_path / "new", hardware, done, waiting)


def test_the_new_one_goes_on_and_the_old_one_does_not(pair: Pair, tmp_path: Path) -> None:
    with open_enclave(pair.directory) as new:
        platform = new.platform
        bundle, old = pair.give(new), pair.old
        for attempt in (
            lambda: old.submit(old.signed_job()),
            lambda: old.book.note("anything"),
            lambda: old.book.questions.check(pair.done, CLINIC.public.fingerprint, 1, 1),
            lambda: old.book.commit(),
        ):
            with pytest.raises(ConsentError, match="handed over"):
                attempt()
        assert old.book.next() is None and not old.book.has_queued() and old.told()[-1] == "handed-over"
        old.book.committed_log(0)  # what it did until then, it still tells
        pair.copy()
        pair.take(new, bundle)
        first = new.state.identity.public
    with open_enclave(pair.directory, platform) as new:
        assert new.state.identity.public == first != old.state.identity.public
        members = members_of(new, tmp_path / "nobody")
        assert [m.identity.name for m in members.current] == ["clinic", "lab"]
        assert [new.book.record(job).status for job in (pair.done, pair.waiting)] == ["done", "waiting"]
        assert new.told() == old.told()
        new.submit(old.signed_job(stored=False))  # a job that names the old enclave
        # What was sealed to the old one is opened by the new one, and what is sealed now is sealed to the new one.
        runner = Runner(new.state.identity, new.book.store, workers=None, former=new.state.former_identities)  # type: ignore[arg-type]
        model = new.book.signed(pair.done).job.model
        with runner._inputs.open(model, "model") as reader:
            assert reader.read(0, 10)
        certificates = [each["certificate"].encode() for each in new.state.former]
        assert goes_on(certificates, old.fingerprint, new.fingerprint)
        assert not goes_on(certificates, new.fingerprint, old.fingerprint)


def test_who_must_sign(pair: Pair, tmp_path: Path, hardware: Hardware) -> None:
    """Whoever was ever in it: the key that goes over opens what they have sealed, wherever a copy of it is."""
    old, upgrade = pair.old, pair.upgrade
    members = members_of(old, tmp_path / "parties")
    members.change(changed(members, "admit", Member(STRANGER.public), LAB, CLINIC).to_bytes(), LAB.public)
    members.change(changed(members, "remove", STRANGER.public.fingerprint, STRANGER).to_bytes(), LAB.public)
    heir = Identity.generate("clinic-2", "x25519")
    members.succeed(succeed(CLINIC, heir))
    with open_enclave(pair.directory) as new:
        for signers, lacking in (((), "lab"), ((LAB, CLINIC, STRANGER), ""), ((LAB, heir), "stranger")):
            statement = upgrade
            for signer in signers:
                statement = statement.sign(signer)
            with pytest.raises((ConsentError, SealError), match=lacking or "no party's"):
                pair.give(new, statement)
        assert not old.state.handed
        pair.give(new, upgrade.sign(LAB).sign(heir).sign(STRANGER))
        assert old.state.handed["to"] == new.fingerprint


def test_what_was_stated_of_ended_identities_goes_along(pair: Pair, tmp_path: Path) -> None:
    """Else who was robbed could not end any more what a thief has made, and an ended key came back by another name."""
    members = members_of(pair.old, tmp_path / "parties")
    thief, later = (Identity.generate(name, "x25519") for name in ("thief", "stranger-2"))
    members.change(changed(members, "admit", Member(STRANGER.public), LAB, CLINIC).to_bytes(), LAB.public)
    members.succeed(succeed(STRANGER, later))
    members.change(changed(members, "remove", later.public.fingerprint, later).to_bytes(), LAB.public)
    members.succeed(succeed(CLINIC, thief))
    with open_enclave(pair.directory) as new:
        bundle = pair.give(new, pair.upgrade.sign(LAB).sign(thief).sign(later))
        pair.copy()
        pair.take(new, bundle)
        platform = new.platform
    with open_enclave(pair.directory, platform) as new:
        members = members_of(new, tmp_path / "nobody")
        assert names(members) == ["lab", "thief"]
        for ended in (CLINIC, STRANGER):
            alias = replace(ended, public=replace(ended.public, name="new-name"))
            with pytest.raises(ConsentError, match="this identity has ended"):
                members.change(changed(members, "admit", Member(alias.public), LAB, thief).to_bytes(), LAB.public)
            with pytest.raises(ConsentError, match="has ended, under another name"):
                members.succeed(succeed(LAB, alias))
        mine, his = CLINIC.public.fingerprint, thief.public.fingerprint
        assert members.names(his) == {mine, his} and not new.book.is_gone(pair.done)
        members.succeed(succeed(CLINIC, None))  # prepared by its owner
        assert names(members) == ["lab"] and members.names(his) == {his} and new.book.is_gone(pair.done)


def test_what_is_refused_hands_nothing_over(pair: Pair, hardware: Hardware, tmp_path: Path) -> None:
    signed = pair.upgrade.sign(LAB).sign(CLINIC)
    fields = json.loads(signed.to_bytes())
    other = Upgrade.make("ab" * 32, hardware.policy).sign(LAB).sign(CLINIC)
    late = {**fields, "upgrade": {**fields["upgrade"], "expires": fields["upgrade"]["expires"] + 1}}
    over = Upgrade.from_bytes(encode({**fields, "upgrade": {**fields["upgrade"], "expires": 2, "created": 1}}))
    over = over.sign(LAB).sign(CLINIC)
    with open_enclave(pair.directory) as new:
        for statement, error, match in (
            (other, ConsentError, "another enclave"),
            (Upgrade.from_bytes(encode(late)), SealError, "not of this upgrade"),
            (over, ConsentError, "expired"),
            (pair.upgrade.sign(LAB), ConsentError, "clinic"),
        ):
            with pytest.raises(error, match=match):
                pair.give(new, statement)
        with pytest.raises(ConsentError, match="simulator"):  # a real enclave never goes to a simulated one
            pair.give(new, signed, simulated=False)
        old_code = Hardware(SimulatedPlatform(hardware.policy.parent, measurement=bytes(48)), hardware.policy)
        with pytest.raises(AttestationError):
            give(pair.old.book, signed.to_bytes(), old_code.evidence(new), simulated=True)
        with pytest.raises(AttestationError):  # the identity of another is not in the quote
            evidence = json.loads(hardware.evidence(new))
            evidence["claims"]["identity"] = STRANGER.public.to_dict()
            give(pair.old.book, signed.to_bytes(), encode(evidence), simulated=True)
        assert not pair.old.state.handed
        pair.old.submit(pair.old.signed_job(stored=False))  # it goes on


def test_what_was_handed_over_is_given_again_after_the_statements_end(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new enclave may lack the log or the store until then, and no other statement fits any more."""
    signed = pair.upgrade.sign(LAB).sign(CLINIC)
    with open_enclave(pair.directory) as new, open_enclave(pair.directory.with_name("other")) as other:
        pair.give(new, signed)
        monkeypatch.setattr("obfuscatune.service.handover.time", Mock(time=lambda: signed.expires + 1.0))
        with pytest.raises(ConsentError, match="expired"):
            pair.give(other, signed)
        again = pair.give(new, signed)
        pair.copy()
        pair.take(new, again)


def test_no_file_of_a_statement_takes_the_place_of_its_policy(hardware: Hardware) -> None:
    """What people read and sign is what the enclave judges by."""
    upgrade = Upgrade.make("ab" * 32, hardware.policy)
    other = hardware.policy.read_bytes().replace(NEW_CODE.hex().encode(), b"ee" * 48)
    for name in ("policy.toml", "new-policy.toml"):
        read = Upgrade.from_bytes(replace(upgrade, files={**upgrade.files, name: other}).to_bytes())
        assert read.load_policy().measurements == {"mrtd": frozenset({NEW_CODE.hex()})}
    with pytest.raises(FormatError, match="plain names"):
        Upgrade.from_bytes(replace(upgrade, files={**upgrade.files, ".policy.toml": other}).to_bytes())


_TDX = '[platform]\nkinds = ["tdx"]\n'
POLICIES = ["", "[platform", _TDX, f'{_TDX}collateral = "/etc/passwd"\n[measurements]\nmrtd = ["{NEW_CODE.hex()}"]\n']


@pytest.mark.parametrize("text", POLICIES)
def test_policies_that_are_none(text: str, tmp_path: Path, hardware: Hardware) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(UsageError):
        Upgrade.make("ab" * 32, path)
    with pytest.raises(UsageError):
        Upgrade("ab" * 32, text, {}, 1, 2).load_policy()
    any_code = hardware.policy.read_text().replace(f'mrtd = ["{NEW_CODE.hex()}"]', "any_measurement = true")
    root = (hardware.policy.parent / "simulation-root.pem").read_bytes()
    with pytest.raises(FormatError, match="any code"):
        Upgrade("ab" * 32, any_code, {"simulation-root.pem": root}, 1, 2).load_policy()


def test_it_goes_to_one_only_and_to_that_again_and_again(pair: Pair, tmp_path: Path) -> None:
    with open_enclave(pair.directory) as new, open_enclave(tmp_path / "third") as third:
        first = pair.give(new)
        with pytest.raises(ConsentError, match="already"):
            pair.give(third)
        again = Upgrade.make(pair.old.fingerprint, pair.hardware.policy, days=3).sign(LAB).sign(CLINIC)
        with pytest.raises(ConsentError, match="already"):  # another statement
            pair.give(new, again)
        with pytest.raises(SealError, match="another enclave"):
            open_bundle(first, third.state.identity)
        open_bundle(first, new.state.identity)


def test_a_statement_may_name_the_one_enclave_that_may_have_it(pair: Pair, tmp_path: Path) -> None:
    """Else a party with such hardware of its own takes the state there, and shuts the others out."""
    with open_enclave(pair.directory) as new, open_enclave(tmp_path / "elsewhere") as elsewhere:
        named = Upgrade.make(pair.old.fingerprint, pair.hardware.policy, to=new.fingerprint).sign(LAB).sign(CLINIC)
        assert Upgrade.from_bytes(named.to_bytes()) == named
        for statement, refused in (
            (named, pytest.raises(ConsentError, match="another enclave of that code")),
            (replace(named, to=elsewhere.fingerprint), pytest.raises(SealError, match="not of this upgrade")),
            (replace(named, to=None), pytest.raises(SealError, match="not of this upgrade")),
        ):
            with refused:
                pair.give(elsewhere, statement)
        assert not pair.old.state.handed
        pair.give(new, named)
        assert pair.old.state.handed["to"] == new.fingerprint


def test_who_asks_again_spoils_nothing_that_another_fetches(pair: Pair, tmp_path: Path) -> None:
    members = members_of(pair.old, tmp_path / "parties")
    requests = MemberRequests(members, pair.old.book, lambda *_: ({}, b""), simulated=True)
    statement = pair.upgrade.sign(LAB).sign(CLINIC).to_bytes()
    pieces = []
    with open_enclave(pair.directory) as new:
        for party in (LAB, CLINIC):
            fields = {"op": "hand_over", "statement": len(statement)}
            requests.handle(party.public, fields, statement + pair.hardware.evidence(new))
            pieces.append(requests.handle(LAB.public, {"op": "bundle", "offset": 0}, b""))
        assert pieces[0] == pieces[1]


def test_what_one_party_brings_no_other_spoils(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a piece in between, nor by so much that there is no room: the longest file goes first."""
    with open_enclave(pair.directory) as new:
        bundle = pair.give(new)
        pair.copy()
        monkeypatch.setattr(takeover, "_MAX_PARTS_BYTES", 2 * len(bundle))
        taking, half = TakeOver(new.state, pair.directory, pair.old.fingerprint), len(bundle) // 2

        def bring(party: Identity, offset: int, data: bytes, size: int = len(bundle)) -> None:
            taking.handle(party.public, {"op": "take_over", "offset": offset, "size": size}, data)

        bring(LAB, 0, bundle[:half])
        bring(STRANGER, 0, bundle[:9])
        bring(STRANGER, 0, bytes(len(bundle)), 9 * len(bundle))
        with pytest.raises(BusyError):
            bring(STRANGER, len(bundle), bytes(len(bundle)), 9 * len(bundle))
        for offset, size in ((half, len(bundle) + 1), (half - 1, len(bundle))):
            with pytest.raises(ProtocolError, match="does not follow"):
                bring(LAB, offset, bundle[half:], size)
        bring(LAB, half, bundle[half:])
        assert taking.taken.is_set()


def test_an_old_enclave_that_starts_again_stays_at_its_end(pair: Pair) -> None:
    old = pair.old
    with open_enclave(pair.directory) as new:
        pair.give(new, (statement := pair.upgrade.sign(LAB).sign(CLINIC)))
        old.state.close()
        with open_enclave(old.directory, old.platform) as started:
            assert started.state.handed["to"] == new.fingerprint
            with pytest.raises(ConsentError, match="handed over"):
                started.book.note("enclave-started")
            bundle = give(started.book, statement.to_bytes(), pair.hardware.evidence(new), simulated=True)
            pair.copy()
            pair.take(new, bundle)


def test_before_its_commit_the_old_one_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise StorageError("the disk is full")

    with open_enclave(pair.directory) as new:
        with monkeypatch.context() as patch:
            patch.setattr(pair.old.state, "commit", full)
            with pytest.raises(StorageError):
                pair.give(new)
        assert not pair.old.state.handed
        pair.old.book.note("alive")


def test_the_new_one_takes_nothing_that_it_could_not_go_on_with(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On hardware without a sealing key there is no second try, so all is looked at before."""
    memory = MemoryPlatform(key=None)
    with pytest.warns(UserWarning, match="no sealing key"), open_enclave(pair.directory, memory) as new:
        bundle = pair.give(new)
        (pair.directory / "log.jsonl").unlink()
        with pytest.raises(UsageError, match="log of the old enclave is not here"):
            pair.take(new, bundle)
        shutil.copy(pair.old.directory / "log.jsonl", pair.directory)
        with pytest.raises(UsageError, match="sealed files of the old enclave are not here"):
            pair.take(new, bundle)
        pair.copy()
        log = pair.directory / "log.jsonl"
        log.write_bytes(log.read_bytes().replace(b'"submitted"', b'"Submitted"', 1))
        with pytest.raises(UsageError):
            pair.take(new, bundle)
        pair.copy()

        def full() -> None:
            raise StorageError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(new.state, "commit", full)
            with pytest.raises(StorageError):
                pair.take(new, bundle)
        assert not new.state.former and not new.state.jobs
        pair.take(new, bundle)
        assert set(new.state.jobs) == {pair.done, pair.waiting}
        with pytest.raises(ConsentError, match="state of its own"):
            open_bundle(bundle, new.state.identity).adopt(new.state)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_bundle_is_refused(data: Any) -> None:
    bundle = bytearray(BUNDLE[0])
    bundle[data.draw(st.integers(0, len(bundle) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ObfuscatuneError):
        open_bundle(bytes(bundle), BUNDLE[1])


def _made_up() -> tuple[bytes, Identity]:
    """A bundle of somebody who is no enclave, for one: it opens, and makes nobody go on for anybody else."""
    here = Identity.generate("enclave", "x25519")
    fields = {"former": [], "jobs": {}, "log_head": "0" * 64, "log_length": 0, "members": []}
    return seal_bundle(fields, STRANGER, here.public, "ab" * 32), here


BUNDLE = _made_up()


def test_a_state_of_somebodys_own_making_makes_nobody_go_on_for_another() -> None:
    taken = open_bundle(*BUNDLE)
    assert taken.old.public == STRANGER.public
    certificate = certify(STRANGER, BUNDLE[1].public, "ab" * 32)
    assert goes_on([certificate], STRANGER.public.fingerprint, BUNDLE[1].public.fingerprint)
    assert not goes_on([certificate], LAB.public.fingerprint, BUNDLE[1].public.fingerprint)
    forged = json.loads(certificate) | {"from": LAB.public.to_dict()}
    with pytest.raises(SealError):
        read_certificate(encode(forged))
    for data in (b"{}", b"x", encode({**forged, "to": 1})):
        with pytest.raises(FormatError):
            read_certificate(data)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["created", "enclave", "expires", "files", "format", "policy", "to", "signatures"]),
    value=st.none() | st.integers(-2, 1 << 60) | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2)
    | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)  # fmt: skip
def test_statements_of_another_form(name: str, value: Any) -> None:
    fields: dict[str, Any] = {
        "created": 1, "enclave": "ab" * 32, "expires": 2, "files": {}, "format": "obfuscatune upgrade 1", "policy": "",
    }  # fmt: skip
    signatures = value if name == "signatures" else {}
    with contextlib.suppress(FormatError):  # and nothing else
        Upgrade.from_bytes(
            encode({"signatures": signatures, "upgrade": fields | ({name: value} if name != "signatures" else {})})
        )


def test_policy_is_the_one_that_was_signed(hardware: Hardware) -> None:
    loaded = Upgrade.make("ab" * 32, hardware.policy).load_policy()
    assert loaded == Policy.load(hardware.policy)


def test_the_state_of_another_enclave_takes_nobodys_place(pair: Pair) -> None:
    """One that a member has made, sealed to the new enclave as it should be, and of an enclave that never was."""
    own = {"former": [], "jobs": {}, "log_head": "0" * 64, "log_length": 0, "members": pair.old.state.members}
    with open_enclave(pair.directory) as new:
        bundle = pair.give(new)
        pair.copy()
        log = (pair.directory / "log.jsonl").read_bytes()
        forged = seal_bundle(own, STRANGER, new.state.identity.public, "0" * 64)
        with pytest.raises(ConsentError, match="another one's state"):
            pair.take(new, forged)
        assert (pair.directory / "log.jsonl").read_bytes() == log and not new.state.jobs
        pair.take(new, bundle)


def test_a_party_brings_it_over(pair: Pair, tmp_path: Path, simulated: tuple[SimulatedPlatform, Policy]) -> None:
    """Over the channel, to an enclave that has no sealing key: asked again until it is done, and after that."""
    memory = MemoryPlatform(key=None)
    memory.attester = pair.hardware.platform.attester
    members, addresses = members_of(pair.old, tmp_path / "parties"), []
    statement, where = pair.upgrade.sign(LAB).sign(CLINIC), threading.Event()

    def waiting(address: str) -> None:
        addresses.append(address)
        where.set()

    with (
        serve(pair.old, members, simulated) as serving,
        pytest.warns(UserWarning, match="no sealing key"),
        open_enclave(pair.directory, memory) as new,
    ):
        (pair.directory / "log.jsonl").unlink()
        thread = threading.Thread(
            target=wait_for_hand_over,
            args=(new.state, pair.directory, memory),
            kwargs={
                "listen": "tls://127.0.0.1:0",
                "parties": tmp_path / "parties",
                "operator": None,
                "old": pair.old.state.identity.public,
                "waiting": waiting,
            },
        )
        thread.start()
        assert where.wait(30)
        by_lab, by_stranger = serving.client(LAB), serving.client(STRANGER)
        with pytest.raises(ConsentError, match="not known"):
            by_stranger.hand_over(statement, addresses[0])
        with pytest.raises(ConsentError, match="clinic"):
            by_lab.hand_over(pair.upgrade.sign(LAB), addresses[0])
        with pytest.raises(NotTakenError, match="log of the old enclave"):
            by_lab.hand_over(statement, addresses[0])
        with pytest.raises(ConsentError, match="handed over"), by_lab.connect() as channel:
            channel.request({"op": "echo"})
        assert by_lab.members().membership.number == 0  # it tells what was
        pair.copy()
        assert by_lab.hand_over(statement, addresses[0])
        thread.join(30)
        assert not thread.is_alive() and set(new.state.jobs) == {pair.done, pair.waiting}
        # The new one, as it serves after that.
        now = members_of(new, tmp_path / "nobody")
        with serve(new, now, (pair.hardware.platform, Policy.load(pair.hardware.policy))) as going_on:
            assert not by_lab.hand_over(statement, going_on.server.address)  # it was done before
            client = going_on.client(CLINIC, tmp_path)
            client.connect(pair.old.fingerprint).close()
            with pytest.raises(AttestationError, match="another enclave"):
                client.connect(STRANGER.public.fingerprint)


def test_a_job_that_runs_meanwhile_goes_on_in_the_new_one(pair: Pair) -> None:
    old = pair.old
    job = old.submit(old.signed_job())

    class Server:
        address = "tls://nowhere:1"

        def serve_forever(self) -> None:
            return

        def close(self) -> None:
            return

    class Stepping:
        kept: str | None = None
        closed = 0

        def run(self, signed: Any, checkpoint: Any, hooks: Any) -> dict[str, str]:
            hooks.checkpoint(1, old.result("checkpoint"))
            bundles.append(pair.give(new))
            serving.stop()
            hooks.progress(2, 10)
            raise AssertionError("it went on")

        def close(self) -> None:
            self.closed += 1

    with open_enclave(pair.directory) as new:
        bundles: list[bytes] = []
        serving = Service(old.book, Stepping(), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
        serving.work()
        assert old.book.record(job).status == "running" and old.told()[-1] == "handed-over"
        pair.copy()
        pair.take(new, bundles[0])
        platform = new.platform
    with open_enclave(pair.directory, platform) as new:
        assert new.book.record(job).status == "queued" and new.book.record(job).checkpoint_step == 1
