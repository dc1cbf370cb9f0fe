"""The verbs about members and upgrades, as a party types them, against a server in this process."""

import datetime
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from obfuscatune.cli import main
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.enclave import Enclave
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.succession import succeed
from obfuscatune.parties.upgrade import Upgrade
from obfuscatune.service.escrow import Escrow
from obfuscatune.service.takeover import wait_for_hand_over

from .jobs import CLINIC, LAB, STRANGER, open_enclave
from .platforms import MemoryPlatform
from .test_handover import NEW_CODE
from .test_members import OPERATOR, Serving, changed, members_of, put, serve

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def serving(tmp_path: Path, simulated: tuple[SimulatedPlatform, Policy]) -> Iterator[Serving]:
    put(tmp_path / "parties", LAB, CLINIC)
    with open_enclave(tmp_path / "state") as enclave:
        members = members_of(enclave, tmp_path / "parties", OPERATOR)
        with serve(enclave, members, simulated) as opened:
            yield opened


@pytest.fixture
def run(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb as somebody, who says ``answer`` when asked; return its exit code and all that it said."""
    monkeypatch.chdir(tmp_path)
    for identity in (LAB, CLINIC, STRANGER, OPERATOR):
        path = tmp_path / f"{identity.public.name}.key"
        path.write_bytes(identity.to_bytes())
        path.chmod(0o600)
        (tmp_path / f"{identity.public.name}.pub").write_bytes(encode(identity.public.to_dict()))
    mrtd, root = simulated_code(serving), serving.root
    (tmp_path / "simulation-root.pem").write_bytes(root.read_bytes())
    (tmp_path / "policy.toml").write_text(
        f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{mrtd}"]\n'
        '[simulation]\nallow = true\nroot = "simulation-root.pem"\n'
    )

    def run(identity: Identity, *words: object, answer: str = "y") -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
        who = ["--identity", f"{identity.public.name}.key"]
        who += [] if "--enclave" in words else ["--enclave", serving.server.address]
        code = main(["party", *map(str, words), *who, "--policy", "policy.toml", "--allow-simulation"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def simulated_code(serving: Serving) -> str:
    return next(iter(serving.policy.measurements["mrtd"]))


def test_members_come_and_go(serving: Serving, run: Run, tmp_path: Path) -> None:
    code, said = run(LAB, "members")
    assert code == 0 and "open:" in said and "operator operator" in said
    code, said = run(LAB, "admit", "stranger.pub")
    assert code == 1 and "not closed yet" in said
    serving.members.found()
    code, said = run(LAB, "admit", "stranger.pub")
    assert code == 0 and "2 of 3" in said and (tmp_path / "membership-1.change").exists()
    code, said = run(CLINIC, "agree", "membership-1.change", answer="n")
    assert code == 2 and "sign this? [y/N]" in said  # asked, and not signed
    code, said = run(CLINIC, "agree", "membership-1.change")
    assert code == 0 and "needs    a member who is the operator" in said
    code, said = run(OPERATOR, "agree", "membership-1.change")
    assert code == 0 and "done     membership 1" in said
    code, said = run(STRANGER, "members")
    assert code == 0 and "closed" in said and "signed by" in said and "admit stranger" in said
    code, said = run(OPERATOR, "agree", "membership-1.change")  # once more: it is not the next any more
    assert code == 1 and "not the next change" in said and "in force already" in said and "anew" not in said
    code, said = run(CLINIC, "remove", "lab")
    assert code == 0 and (tmp_path / "membership-2.change").exists()
    code, said = run(LAB, "remove", "nobody")
    assert code == 2 and "expected one of the members" in said
    code, said = run(STRANGER, "remove", "stranger")
    assert code == 0 and "done     membership 2" in said
    assert run(STRANGER, "members")[0] == 1
    code, said = run(LAB, "members")  # who has left is still told by name
    assert f"remove stranger ({STRANGER.public.fingerprint[:16]})  signed by stranger" in said
    code, said = run(OPERATOR, "agree", "membership-2.change")  # another change has come in between
    assert code == 1 and "not the next change" in said and "make the change anew" in said
    (tmp_path / "broken.change").write_text("{}")
    assert run(LAB, "agree", "broken.change")[0] == 2
    heir = Identity.generate("heir", "x25519")
    serving.members.succeed(succeed(CLINIC, heir))
    removal = changed(serving.members, "remove", heir.public.fingerprint, heir)
    serving.members.change(removal.to_bytes(), heir.public)
    assert f"remove heir ({heir.public.fingerprint[:16]})  signed by heir" in run(LAB, "members")[1]


def test_a_new_change_replaces_no_file(serving: Serving, run: Run, tmp_path: Path) -> None:
    serving.members.found()
    assert run(LAB, "admit", "stranger.pub")[0] == 0
    assert run(CLINIC, "agree", "membership-1.change")[0] == 0
    kept = {name: (tmp_path / name).read_bytes() for name in ("membership-1.change", "lab.key")}
    for words in (("admit", "stranger.pub"), ("remove", "clinic")):  # of the same number
        code, said = run(LAB, *words)
        assert code == 2 and "file is there already (at membership-1.change)" in said and "party agree" in said
        code, said = run(LAB, *words, "--output", "lab.key")
        assert code == 2 and "file is there already (at --output lab.key)" in said
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}
    assert run(OPERATOR, "agree", "membership-1.change")[0] == 0  # with all that were in it


def test_an_upgrade(serving: Serving, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.members.found()
    hardware = tmp_path / "new-hardware"
    SimulatedPlatform.create(hardware)
    policy = hardware / "new-policy.toml"
    policy.write_text((tmp_path / "policy.toml").read_text().replace(simulated_code(serving), NEW_CODE.hex()))
    memory = MemoryPlatform(key=None)
    memory.attester = SimulatedPlatform(hardware, measurement=NEW_CODE).attester
    code, said = run(LAB, "upgrade", policy, answer="")
    assert code == 2 and NEW_CODE.hex() in said and not (tmp_path / "enclave.upgrade").exists()
    code, said = run(LAB, "upgrade", policy)
    assert code == 0 and "needs signatures of clinic" in said
    other = hardware / "other-policy.toml"
    other.write_text(policy.read_text().replace(NEW_CODE.hex(), "ab" * 48))
    code, said = run(CLINIC, "upgrade", other)
    assert code == 1 and "another policy than yours" in said
    code, said = run(CLINIC, "upgrade", policy, "--to", serving.server.address)  # not the new code at all
    assert code == 1 and "refused" in said
    with monkeypatch.context() as elsewhere:
        accepted = SimpleNamespace(require=lambda: SimpleNamespace(identity=STRANGER.public))
        elsewhere.setattr(Enclave, "verify", lambda _: accepted)
        code, said = run(CLINIC, "upgrade", policy, "--to", "tls://127.0.0.1:1")
        assert code == 1 and "to another enclave" in said
    code, said = run(CLINIC, "upgrade", policy, "--days", 29)  # of the 30 that lab has signed
    assert code == 1 and "expires later than you want" in said
    statement = (tmp_path / "enclave.upgrade").read_bytes()
    term = json.loads(statement)["upgrade"]
    for change, fault in (
        ({"expires": 1 << 48}, "at most 3650 days"),
        ({"created": 1, "expires": 2}, "has expired"),
        ({"to": term["enclave"]}, "is the old one"),
    ):
        (tmp_path / "other.upgrade").write_bytes(encode({"signatures": {}, "upgrade": {**term, **change}}))
        code, said = run(CLINIC, "upgrade", policy, "--file", "other.upgrade", "--yes")
        assert code in (1, 2) and fault in said, said
    code, said = run(OPERATOR, "upgrade", policy)  # with this signature no enclave would take it
    assert code == 1 and "parties of the enclave alone: got operator" in said and "need not sign" in said
    code, said = run(OPERATOR, "upgrade", policy, "--file", "its.upgrade")
    assert code == 1 and not (tmp_path / "its.upgrade").exists()
    assert (tmp_path / "enclave.upgrade").read_bytes() == statement
    code, said = run(STRANGER, "upgrade", policy, "--file", "enclave.upgrade")  # no member: it is told nothing
    assert code == 0 and "who else must sign is not known" in said and "makes the statement void" in said
    (tmp_path / "enclave.upgrade").write_bytes(statement)
    assert "needs signatures of clinic" in run(LAB, "upgrade", policy)[1]  # once more, and told as at the first time
    code, said = run(CLINIC, "upgrade", policy)
    assert code == 0 and "needs signatures" not in said
    for name in ("created", "expires"):
        day = datetime.datetime.fromtimestamp(term[name], datetime.UTC)
        assert f"{name:12} {day:%Y-%m-%d %H:%M} UTC" in said.split("hand over")[0]
    same = Upgrade.make(serving.enclave.fingerprint, tmp_path / "policy.toml").sign(LAB).sign(CLINIC)
    (tmp_path / "same.upgrade").write_bytes(same.to_bytes())
    code, said = run(LAB, "hand-over", "--file", "same.upgrade", "--to", serving.server.address)
    assert code == 2 and "this is the old enclave's address" in said
    waits, addresses = threading.Event(), []

    def waiting(address: str) -> None:
        addresses.append(address)
        waits.set()

    with pytest.warns(UserWarning, match="no sealing key"), open_enclave(tmp_path / "new", memory) as new:
        (tmp_path / "new" / "log.jsonl").unlink()
        more = {"listen": "tls://127.0.0.1:0", "parties": tmp_path / "parties", "operator": None, "waiting": waiting}
        more["old"] = serving.enclave.state.identity.public
        thread = threading.Thread(target=wait_for_hand_over, args=(new.state, tmp_path / "new", memory), kwargs=more)
        thread.start()
        assert waits.wait(30)
        code, said = run(CLINIC, "hand-over", "--to", addresses[0])
        assert code == 1 and "not taken yet" in said and "copies store/ and log.jsonl" in said
        (tmp_path / "new" / "log.jsonl").write_bytes((tmp_path / "state" / "log.jsonl").read_bytes())
        code, said = run(LAB, "hand-over", "--to", addresses[0])
        assert (code, said.splitlines()[-1]) == (0, "handed over")
        thread.join(30)
        assert not thread.is_alive() and len(new.state.former) == 1
    code, said = run(LAB, "remove", "lab")
    assert code == 1 and "handed over" in said


def test_a_release(serving: Serving, run: Run, tmp_path: Path, simulated: tuple[SimulatedPlatform, Policy]) -> None:
    serving.enclave.book.committed = Escrow(serving.enclave.state, tmp_path / "state").write
    serving.members.found()
    memory, waits, addresses = MemoryPlatform(key=None), threading.Event(), []
    memory.attester = simulated[0].attester

    def waiting(address: str) -> None:
        addresses.append(address)
        waits.set()

    with pytest.warns(UserWarning, match="no sealing key"), open_enclave(tmp_path / "new", memory) as new:
        more = {"listen": "tls://127.0.0.1:0", "parties": tmp_path / "parties", "operator": None, "waiting": waiting}
        more["old"] = serving.enclave.state.identity.public
        thread = threading.Thread(target=wait_for_hand_over, args=(new.state, tmp_path / "new", memory), kwargs=more)
        thread.start()
        assert waits.wait(30)
        code, said = run(LAB, "members", "--enclave", addresses[0])
        assert code == 1 and "waits for a hand-over" in said and "party hand-over" in said
        code, said = run(LAB, "release", "--enclave", addresses[0])
        assert code == 2 and "copies escrow.sealed" in said
        for name in ("escrow.sealed", "log.jsonl"):
            (tmp_path / "new" / name).write_bytes((tmp_path / "state" / name).read_bytes())
        code, said = run(LAB, "members", "--enclave", addresses[0])
        assert code == 1 and "until all parties have released" in said and "party release" in said
        code, said = run(LAB, "release", "--enclave", addresses[0], answer="n")
        assert code == 2 and "release this? [y/N]" in said
        code, said = run(LAB, "release", "--enclave", addresses[0])
        assert code == 0 and "shares of 1 more are needed" in said and serving.enclave.fingerprint in said
        code, said = run(CLINIC, "release", "--enclave", addresses[0], "--yes")
        assert code == 0 and "the enclave goes on" in said
        thread.join(30)
        assert not thread.is_alive() and len(new.state.former) == 1
        # Released once more, to the enclave that serves by now: the reply of the last release may have been lost.
        with serve(new, members_of(new, tmp_path / "parties", None), simulated) as serves:
            code, said = run(CLINIC, "release", "--enclave", serves.server.address, "--yes")
            assert code == 2 and "no state waits to be released" in said and "nothing is left to release" in said
    code, said = run(CLINIC, "release", "--yes")  # at the address of an enclave that never waited
    assert code == 2 and "no state waits to be released" in said and "--take_over" in said
