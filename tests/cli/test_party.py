"""A party's folder: made once, found by every verb; what is signed is shown first, and one is asked."""

import contextlib
import datetime
import errno
import functools
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import ConsentError, FormatError, SealError, UsageError
from obfuscatune.parties import Job, Party, SignedJob, review
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.passphrase import VARIABLE, lock
from obfuscatune.parties.sealed.archive import seal_files
from obfuscatune.parties.sealed.card import make_card, read_card
from obfuscatune.parties.succession import succeed
from obfuscatune.parties.terms import Terms
from obfuscatune.parties.vocabulary import Worker
from obfuscatune.settings import TrainingSettings

from .conftest import Run

ENCLAVE = Identity.generate("enclave", "x25519")
ADDRESS = "tls://127.0.0.1:1"
ROWS = '{"prompt": "the colour is", "completion": " red"}\n'
WORKERS = tuple(Worker(f"{number:02x}" * 32, f"operator {number}") for number in range(3))


@dataclass
class Accepted:
    """A verdict that accepts ENCLAVE."""

    accepted: bool = True
    identity: PublicIdentity = ENCLAVE.public

    def require(self) -> "Accepted":
        return self

    def __str__(self) -> str:
        return "accepted"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> tuple[Path, Path]:
    """The folders of a provider and of an owner, who have each other's identities; their enclave is ENCLAVE."""
    (tmp_path / "root.pem").write_text("a certificate")
    (tmp_path / "mine.toml").write_text("[platform]\n")
    lab, clinic = tmp_path / "lab", tmp_path / "clinic"
    made = ("--enclave", ADDRESS, "--policy", tmp_path / "mine.toml")
    assert run("party", "init", "lab", "--role", "provider", "--folder", lab, *made).code == 0
    partner = ("--partner", lab / "lab.pub")
    assert run("party", "init", "clinic", "--role", "owner", "--folder", clinic, *made, *partner).code == 0
    monkeypatch.setattr("obfuscatune.parties.party.verify_at", lambda *_: Accepted())
    monkeypatch.setattr("obfuscatune.parties.folder.Policy.load", lambda _: Allowing(False))
    assert run("party", "verify", "--party", lab, "--partner", clinic / "clinic.pub").code == 0
    return lab, clinic


@dataclass
class Allowing:
    allow_simulation: bool


@pytest.fixture
def sealed(folders: tuple[Path, Path], model_dir: Path, run: Run) -> tuple[Path, Path]:
    """Both have sealed what is theirs."""
    lab, clinic = folders
    (clinic / "rows.jsonl").write_text(ROWS)
    assert run("party", "seal", "--party", lab, "--model", model_dir).code == 0
    more = ("--held_out", clinic / "rows.jsonl", "--prompts", clinic / "rows.jsonl")
    done = run("party", "seal", "--party", clinic, "--data", clinic / "rows.jsonl", *more)
    assert done.code == 0, done.err
    return folders


def propose(lab: Path, clinic: Path, run: Run, *more: object) -> Any:
    return run("job", "propose", "--party", clinic, "--partner_input", lab / "model.card", *more)


def test_a_passphrase_is_asked_for_once(folders: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an agent may give it through a pipe, which can be read once."""
    _, clinic = folders
    (clinic / "rows.jsonl").write_text(ROWS)
    key, phrase = clinic / "clinic.key", "correct horse battery"
    identity = Identity.load(key)
    key.write_bytes(lock(identity.to_bytes(), identity.public.to_dict(), phrase, log2_n=14))
    with piped(phrase, monkeypatch):
        both = ("--data", clinic / "rows.jsonl", "--prompts", clinic / "rows.jsonl")
        done = run("party", "seal", "--party", clinic, *both)
        assert done.code == 0, done.err
        again = run("job", "list", "--party", clinic)  # the control: it has been read
        assert again.code == 2 and "passphrase file is empty" in again.err


@contextlib.contextmanager
def piped(text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A passphrase from a pipe, as <(pass show clinic) gives it: it can be read once."""
    reading, writing = os.pipe()
    try:
        os.write(writing, text.encode() + b"\n")
        os.close(writing)
        monkeypatch.setenv(VARIABLE, f"/dev/fd/{reading}")
        yield
    finally:
        os.close(reading)


def test_no_verb_of_a_folder_reads_the_passphrase_twice(
    folders: tuple[Path, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.parties.identity.lock", functools.partial(lock, log2_n=14))
    lab, phrase, other = folders[0] / "lab.pub", "correct horse battery", tmp_path / "other"
    assert run("identity", "new", "doctor", "--output_dir", tmp_path).code == 0
    heir = succeed(Identity.load(folders[0] / "lab.key"), Identity.load(tmp_path / "doctor.key"))
    (tmp_path / "lab.succession").write_bytes(heir)
    revoked = succeed(Identity.load(tmp_path / "doctor.key"), None)
    (tmp_path / "doctor.succession").write_bytes(revoked)
    made = ("--role", "owner", "--enclave", ADDRESS, "--folder", other, "--partner", lab, "--passphrase")
    for verb in (
        ("init", "other", *made),
        ("verify", "--party", other, "--partner", lab),
        ("verify", "--party", other, "--partner", tmp_path / "lab.succession"),
        ("verify", "--party", other, "--partner", tmp_path / "doctor.succession"),
        ("rotate", "other-2", "--party", other),
    ):
        with piped(phrase, monkeypatch):
            done = run("party", *verb)
            assert done.code == 0, done.err
    with piped("", monkeypatch):
        assert run("party", "verify", "--party", other).code == 0  # who asks is not said
    with piped(phrase, monkeypatch):  # it opens the one, and there is none left to lock the other
        done = run("identity", "lock", other / "other.key")
    assert done.code == 2 and "passphrase file is empty" in done.err and "nobody can restore" not in done.err


def test_a_folder_is_made_whole_or_not_at_all(
    folders: tuple[Path, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, made = tmp_path / "root.pem", ("--role", "owner", "--enclave", ADDRESS)
    cases: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("file is there already", ("clinic", "--simulation", root)),
        ("your partner has this name too", ("lab", "--partner", folders[0] / "lab.pub")),
        ("another identity of this name", ("clinic", "--partner", folders[0] / "lab.pub")),
    )
    for number, (message, arguments) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "simulation-root.pem").write_text("another certificate")
        (folder / "lab.pub").write_bytes((folders[1] / "clinic.pub").read_bytes())
        before = {path: path.read_bytes() for path in folder.iterdir()}
        done = run("party", "init", *arguments, *made, "--folder", folder)
        assert done.code == 2 and message in done.err, done.err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    full = tmp_path / "full"
    monkeypatch.setattr("obfuscatune.parties.relations.sync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    assert run("party", "init", "clinic", *made, "--folder", full).code == 1 and list(full.iterdir()) == []
    monkeypatch.undo()
    own = tmp_path / "own"
    own.mkdir()
    (own / "simulation-root.pem").write_text("a certificate")
    monkeypatch.chdir(own)
    (own / "lab.pub").write_bytes((folders[0] / "lab.pub").read_bytes())
    done = run("party", "init", "clinic", *made, "--simulation", "simulation-root.pem", "--partner", "lab.pub")
    assert done.code == 0 and Party.open(own).partner.name == "lab", done.err


def test_a_policy_of_any_name_is_found_again_or_refused(tmp_path: Path, run: Run) -> None:
    made = ("--role", "owner", "--enclave", ADDRESS)
    for number, name in enumerate(('our "own" policy.toml', "back\\slash.toml", "größe.toml")):
        policy = tmp_path / name
        policy.write_text("any")
        assert run("party", "init", "clinic", *made, "--folder", tmp_path / str(number), "--policy", policy).code == 0
        assert Party.open(tmp_path / str(number)).policy_file.samefile(policy)
    for name in ("two\nlines.toml", "\udcff.toml"):
        (tmp_path / name).write_text("any")
        done = run("party", "init", "clinic", *made, "--folder", tmp_path / "new", "--policy", tmp_path / name)
        assert done.code == 2 and "cannot hold this name" in done.err and not (tmp_path / "new").exists()


def test_a_folder_knows_its_party(folders: tuple[Path, Path], run: Run) -> None:
    lab, clinic = map(Party.open, folders)
    assert lab.partner == clinic.identity.public and clinic.partner == lab.identity.public
    assert (lab.role, clinic.role) == ("provider", "owner") and lab.enclave_address == ADDRESS
    assert lab.identity_file.stat().st_mode & 0o077 == 0
    for party in (lab, clinic):
        assert Terms.from_dict(party.terms).partners == (party.partner.fingerprint,)
    again = run("party", "init", "lab", "--role", "provider", "--enclave", ADDRESS, "--folder", lab.folder)
    assert again.code == 2 and "there already" in again.err


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name = 1", "name is missing, or no text"),
        ('role = "operator"', "role is not"),
        ("allow_simulation = 1", "allow_simulation is not"),
        ("unknown = 1", "unknown 'unknown'"),
        ("x = ]", "is not TOML: got .*line 1"),
    ],
)
def test_a_folder_that_does_not_fit(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "party.toml").write_text("\ufeff" + text)  # as editors of Windows write it
    with pytest.raises(FormatError, match=fault):
        Party.open(tmp_path)


def test_misuse_is_told(tmp_path: Path, run: Run) -> None:
    for arguments, message in (
        (("job", "list", "--party", tmp_path), "no party's folder"),
        (("party", "verify", "--party", tmp_path), "no party's folder"),
        (
            ("party", "init", "a b", "--role", "owner", "--enclave", ADDRESS, "--folder", tmp_path),
            "name of an identity",
        ),
        (("party", "init", "a", "--role", "owner", "--enclave", "host", "--folder", tmp_path), "not an address"),
    ):
        done = run(*arguments)
        assert done.code == 2 and message in done.err, done.err
    assert list(tmp_path.iterdir()) == []


def test_a_simulator_is_accepted_only_where_the_folder_says_so(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    party = Party.open(folders[0])
    monkeypatch.setattr("obfuscatune.parties.folder.Policy.load", lambda _: Allowing(True))
    with pytest.raises(UsageError, match="policy allows simulation"):
        _ = party.policy
    assert replace(party, allow_simulation=True).policy.allow_simulation


def test_nothing_is_sealed_before_there_is_a_partner(tmp_path: Path, run: Run) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    folder = tmp_path / "alone"
    assert run("party", "init", "alone", "--role", "owner", "--enclave", ADDRESS, "--folder", folder).code == 0
    done = run("party", "seal", "--party", folder, "--data", tmp_path / "rows.jsonl")
    assert done.code == 2 and "name no partner" in done.err and not list(folder.glob("*.sealed"))


@pytest.mark.parametrize("day", ["expires = 2020-02-02\n", ""])
def test_nothing_is_sealed_under_terms_that_are_over(folders: tuple[Path, Path], day: str, run: Run) -> None:
    terms, rows = folders[1] / "terms.toml", folders[1] / "rows.jsonl"
    rows.write_text(ROWS)
    text, found = re.subn("^expires = .*\n", day, terms.read_text(), flags=re.MULTILINE)
    assert found == 1
    terms.write_text(text)
    done = run("party", "seal", "--party", folders[1], "--data", rows)
    assert done.code == 2 and "have expired" in done.err and not list(folders[1].glob("*.sealed")), done.err


def test_another_identity_of_the_partners_name_is_refused(folders: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    assert run("identity", "new", "clinic", "--output_dir", tmp_path / "false").code == 0
    done = run("party", "verify", "--party", folders[0], "--partner", tmp_path / "false" / "clinic.pub")
    assert done.code == 2 and "another identity of this name" in done.err


def test_from_sealing_to_both_signatures(sealed: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, clinic = sealed
    done = propose(lab, clinic, run, "--max_steps", 6, "--learning_rate", 1e-3)
    assert done.code == 0, done.err
    job = SignedJob.load(clinic / "job.json").job
    assert (job.profile, job.adapter_to, job.queries_by) == ("enclave", ("owner",), ())
    assert job.model == read_card(lab / "model.sealed").digest == read_card(lab / "model.card").digest
    for name in TrainingSettings.__dataclass_fields__:
        assert f"\n{name} " in done.out, "a setting is signed and not shown"
    assert "(default)" in done.out and "6 steps" in done.out and "million parameters" in done.out
    assert run("job", "sign", "--party", clinic, "--yes").code == 0
    for answer, code in (("", 2), ("n\n", 2), ("y\n", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        done = run("job", "sign", "--party", lab, clinic / "job.json")
        assert done.code == code and "sign exactly this? [y/N] " in done.err
        assert ("[y/N] \n" in done.err) == (not answer)  # the error has a line of its own where input has ended
        assert (lab / "job.json").exists() == (code == 0)
    signed = SignedJob.load(lab / "job.json")
    assert signed.missing() == [] and signed.job == job
    assert [path.name for path in Party.open(clinic).inputs_of(signed)] == ["data.sealed", "prompts.sealed"]
    (clinic / "another.sealed").write_bytes(b"cut")  # a damaged file of another job does not stop this one
    assert [path.name for path in Party.open(clinic).inputs_of(signed)] == ["data.sealed", "prompts.sealed"]
    (clinic / "data.sealed").rename(clinic / "data.elsewhere")
    with pytest.raises(FormatError, match=r"another\.sealed"):  # now it may be the one
        Party.open(clinic).inputs_of(signed)
    (clinic / "another.sealed").unlink()
    with pytest.raises(UsageError, match="not in the folder: expected data"):
        Party.open(clinic).inputs_of(signed)
    (clinic / "data.elsewhere").rename(clinic / "data.sealed")
    assert propose(lab, clinic, run).code == 2  # nothing is overwritten


def test_what_replaces_a_file_is_on_the_disk_before(
    sealed: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """party.toml, the terms and the signed job: else a crash may leave an empty one under the name."""
    lab, clinic = sealed
    synced, replaced = set(), set()
    fsync, replace_ = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: synced.add(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr("os.replace", lambda *names: replaced.add(tuple(map(str, names))) or replace_(*names))
    assert propose(lab, clinic, run, "--max_steps", 1).code == 0
    assert run("job", "sign", "--party", clinic, "--yes").code == 0
    assert run("party", "trust", lab / "lab.pub", "--operator", "A", "--party", clinic).code == 0
    done = run("party", "rotate", "clinic-2", "--party", clinic)
    assert done.code == 0 and f"party agree {clinic}/clinic.succession --identity {clinic}/clinic.key" in done.out
    assert {Path(target).name for _, target in replaced} == {"party.toml", "terms.toml", "job.json"}
    assert {source for source, _ in replaced} <= synced and str(clinic) in synced


def test_a_full_disk_leaves_nothing_half_written(
    sealed: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, clinic = sealed
    assert propose(lab, clinic, run, "--max_steps", 1).code == 0
    before = {path.name: path.read_bytes() for path in clinic.iterdir() if path.is_file()}

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("obfuscatune.cli.contract.sync", full)
    monkeypatch.setattr("obfuscatune.parties.folder.sync", full)
    for words in (("job", "sign", "--yes"), ("party", "verify", "--partner", lab / "lab.pub")):
        done = run(*words, "--party", clinic)
        assert done.code == 1 and "No space left on device" in done.err, done.err
        assert {path.name: path.read_bytes() for path in clinic.iterdir() if path.is_file()} == before


def test_a_job_that_has_expired_is_not_signed(sealed: tuple[Path, Path], run: Run) -> None:
    lab, clinic = sealed
    assert propose(lab, clinic, run, "--days", 0.001).code == 0
    job = SignedJob.load(clinic / "job.json").job
    over = SignedJob(replace(job, created=1, expires=2)).to_bytes()
    (clinic / "job.json").write_bytes(over)
    done = run("job", "sign", "--party", clinic, "--yes")
    assert done.code == 1 and "the job has expired" in done.err and (clinic / "job.json").read_bytes() == over


def test_queries_by_nobody_are_not_asked_for(sealed: tuple[Path, Path], run: Run) -> None:
    lab, clinic = sealed
    for by in ((), ("--queries_by", "nobody")):
        done = propose(lab, clinic, run, "--max_queries", 50, *by)
        assert done.code == 2 and "--max_queries 50" in done.err and not (clinic / "job.json").exists()
    for number, (more, count) in enumerate(((("--queries_by", "owner"), 10), (("--queries_by", "nobody"), 0))):
        path = clinic / f"{number}.json"
        assert propose(lab, clinic, run, "--output", path, *more).code == 0
        assert SignedJob.load(path).job.max_queries == count


def test_nothing_is_sealed_where_one_of_several_could_not_be(folders: tuple[Path, Path], run: Run) -> None:
    rows = folders[1] / "rows.jsonl"
    rows.write_text(ROWS)
    (folders[1] / "prompts.sealed").touch()
    (folders[1] / "prompts.card").touch()
    done = run("party", "seal", "--party", folders[1], "--data", rows, "--prompts", rows)
    assert done.code == 2 and "file is there already" in done.err and not (folders[1] / "data.sealed").exists()


def test_an_enclave_is_no_partner(folders: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    before = (folders[0] / "party.toml").read_bytes()
    enclave = tmp_path / "enclave.pub"
    enclave.write_bytes(encode(ENCLAVE.public.to_dict()))
    done = run("party", "verify", "--party", folders[0], "--partner", enclave)
    assert done.code == 2 and "this is the enclave's identity" in done.err
    assert (folders[0] / "party.toml").read_bytes() == before and not (folders[0] / "enclave.pub").exists()
    made = ("--role", "owner", "--enclave", ADDRESS, "--folder", tmp_path / "new")
    done = run("party", "init", "ward", *made, "--partner", enclave)  # before anybody asks the enclave who it is
    assert done.code == 2 and "this is an enclave's identity, not a partner's" in done.err
    for verb in (("init", "enclave", *made), ("rotate", "enclave", "--party", folders[0])):
        done = run("party", *verb)
        assert done.code == 2 and "enclaves have this name" in done.err
    assert not (tmp_path / "new").exists() and not (folders[0] / "enclave.key").exists()


def test_a_job_beyond_terms_is_neither_proposed_nor_signed(sealed: tuple[Path, Path], run: Run) -> None:
    lab, clinic = sealed
    done = propose(lab, clinic, run, "--profile", "balanced")
    assert done.code == 1 and "do not allow this job: got profile balanced" in done.err
    named = [part for worker in WORKERS for part in ("--worker", f"{worker.fingerprint}={worker.operator}")]
    done = propose(lab, clinic, run, "--profile", "shared", *named)
    assert done.code == 1 and "the worker 0000000000000000 of operator 0" in done.err
    assert propose(lab, clinic, run, "--max_steps", 1).code == 0
    terms = clinic / "terms.toml"
    terms.write_text(terms.read_text().replace('"enclave", "shared"', '"shared"'))
    before = (clinic / "job.json").read_bytes()
    done = run("job", "sign", "--party", clinic, "--yes")
    assert done.code == 1 and "your terms do not allow this job" in done.err
    assert (clinic / "job.json").read_bytes() == before


def test_workers_that_are_trusted_are_those_of_a_job_that_shares(sealed: tuple[Path, Path], run: Run) -> None:
    lab, clinic = sealed
    for number in range(3):
        name = f"gpu{number}"
        assert run("identity", "new", name, "--output_dir", clinic, "--suite", "x25519").code == 0
        for folder in (lab, clinic):
            trusting = ("party", "trust", clinic / f"{name}.pub", "--operator", f"Cloud {number}", "--party", folder)
            assert run(*trusting).code == 0
    assert run(*trusting).code == 2  # twice
    for folder, kind in ((lab, "model"), (clinic, "data"), (clinic, "prompts")):
        (folder / f"{kind}.sealed").unlink()
        (folder / f"{kind}.card").unlink()
    party = Party.open(lab)
    party.seal("model", {"config.json": b"{}"})
    Party.open(clinic).seal("data", {"data.jsonl": ROWS.encode()})
    assert propose(lab, clinic, run, "--profile", "shared").code == 0
    job = SignedJob.load(clinic / "job.json").job
    assert [worker.operator for worker in job.workers] == ["Cloud 0", "Cloud 1", "Cloud 2"]
    assert party.sign(Party.open(clinic).sign(SignedJob(job))).missing() == []


def test_a_job_with_another_partner_is_not_signed(sealed: tuple[Path, Path]) -> None:
    lab, clinic = map(Party.open, sealed)
    stranger = Identity.generate("stranger", "x25519").public.fingerprint
    signed = clinic.propose(partner_inputs=[lab.folder / "model.card"])
    assert clinic.sign(signed).missing() == ["provider"]
    with pytest.raises(ConsentError, match="with another partner"):
        clinic.sign(SignedJob(replace(signed.job, provider=stranger)))
    with pytest.raises(ConsentError, match="not the owner of this job"):
        clinic.sign(SignedJob(replace(signed.job, owner=stranger)))


def test_a_card_is_signed(sealed: tuple[Path, Path], tmp_path: Path) -> None:
    lab, _ = sealed
    data = make_card(lab / "model.sealed")
    assert len(data) < 10_000 and read_card(lab / "model.card") == read_card(lab / "model.sealed")
    for place in range(0, len(data), max(1, len(data) // 60)):
        (tmp_path / "card").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((FormatError, SealError)):
            read_card(tmp_path / "card")
    with pytest.raises(ConsentError, match="sealed by somebody else"):
        Party.open(lab).propose(partner_inputs=[forged(tmp_path)])


def forged(folder: Path) -> Path:
    """Data that a stranger has sealed to the enclave."""
    stranger, path = Identity.generate("clinic", "x25519"), folder / "data.sealed"
    seal_files(path, {"data.jsonl": b"{}"}, kind="data", sender=stranger, recipients=[ENCLAVE.public])
    return path


def test_a_review_says_who_the_workers_are() -> None:
    names = ("provider", "owner", "enclave", "model", "data")
    job = Job(
        **{name: f"{number}{number}" * 32 for number, name in enumerate(names)},
        profile="shared",
        workers=WORKERS,
        expires=int(datetime.datetime.now(datetime.UTC).timestamp()) + 100,
    )
    text = "\n".join(review(SignedJob(job)))
    assert all(worker.operator in text and worker.fingerprint in text for worker in WORKERS)
    assert "any 2 of them together: everything" in text and "not signed" in text
    assert "passes over the data" in text
    chosen = replace(job, profile="balanced", workers=())
    assert "whom the enclave's operator chooses" in "\n".join(review(SignedJob(chosen)))
