"""The parties' end of a job: to which enclave they talk, and what they take for its result."""

import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import AttestationError, ConnectionClosedError, UsageError
from obfuscatune.parties.enclave import Enclave
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import seal_files

from .conftest import Run

LAB, CLINIC, ENCLAVE = (Identity.generate(name, "x25519") for name in ("lab", "clinic", "enclave"))
CONNECT = ("--enclave", "tls://127.0.0.1:1", "--identity", "clinic.key", "--policy", "policy.toml")


class Channel:
    """An enclave that has one result, of which it says ``digest``."""

    enclave = ENCLAVE.public

    def __init__(self, path: Path, digest: str) -> None:
        self.data, self.digest = path.read_bytes(), digest
        self.states: list[str] = []  # of the job, one a question
        self.asked: list[dict[str, Any]] = []  # the queries

    def request(self, fields: dict[str, Any], payload: bytes = b"", **_: Any) -> tuple[dict[str, Any], bytes]:
        if fields["op"] == "download":
            return {"size": len(self.data)}, self.data[fields["offset"] :]
        if fields["op"] == "generate":
            self.asked.append(fields)
            return {}, json.dumps(["red"] * len(json.loads(payload))).encode()
        if fields["op"] == "list":
            return {}, json.dumps([self.told("done")]).encode()
        return self.told(self.states.pop(0) if self.states else "done", str(fields.get("job"))), b""

    def told(self, state: str, job: str = "aa" * 32) -> dict[str, Any]:
        known = {"reason": "", "step": 1, "steps": 1, "missing": {}, "queries": 0, "workers": []}
        return {**known, "status": state, "job": job, "results": {"output": self.digest} if state == "done" else {}}

    def close(self) -> None:
        return

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None:
        return


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    Path("clinic.key").write_bytes(CLINIC.to_bytes())
    Path("clinic.key").chmod(0o600)
    Path("policy.toml").touch()
    monkeypatch.setattr("obfuscatune.cli.connecting.load_policy", lambda *_: None)
    job = Job(
        provider=LAB.public.fingerprint,
        owner=CLINIC.public.fingerprint,
        enclave=ENCLAVE.public.fingerprint,
        model="aa" * 32,
        data="bb" * 32,
        expires=int(time.time()) + 3600,
    )
    Path("job.json").write_bytes(SignedJob(job).sign(LAB).sign(CLINIC).to_bytes())
    return job


def seal(name: str, *, sender: Identity = ENCLAVE, kind: Any = "output", text: bytes = b"{}\n") -> tuple[Path, str]:
    path = Path(name)
    files: dict[str, Path | bytes] = {"generations.jsonl": text}
    return path, seal_files(path, files, kind=kind, sender=sender, recipients=[CLINIC.public])


def test_a_result_of_the_enclave_is_opened(job: Job, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    channel = Channel(*seal("true"))
    monkeypatch.setattr(Enclave, "connect", lambda *_: channel)
    assert run("job", "fetch", "job.json", "--output_dir", "results", *CONNECT).code == 0
    assert Path("results/output/generations.jsonl").read_bytes() == b"{}\n"


def test_a_successor_is_told_how_to_open_what_its_former_identity_gets(
    job: Job, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    channel = Channel(*seal("true"))
    monkeypatch.setattr(Enclave, "connect", lambda *_: channel)
    Path("clinic.key").rename("old.key")
    Path("clinic.key").write_bytes(Identity.generate("clinic-2", "x25519").to_bytes())
    Path("clinic.key").chmod(0o600)
    verb = ("job", "fetch", "job.json", "--output_dir", "results", *CONNECT)
    done = run(*verb)
    assert done.code == 2 and "sealed to the identity that the job names: got clinic-2" in done.err
    assert "job fetch --keep_sealed, then sealed open" in done.err and not Path("results").exists()
    assert run(*verb, "--keep_sealed").code == 0
    opened = run("sealed", "open", "results/output.sealed", "--identity", "old.key", "--output_dir", "results/output")
    assert opened.code == 0 and Path("results/output/generations.jsonl").read_bytes() == b"{}\n"


@pytest.mark.parametrize(("allowed", "given", "asked"), [(8, (), 8), (64, (), 32), (64, (40,), 40), (8, (9,), None)])
def test_a_query_asks_for_no_more_tokens_than_the_job_allows(
    job: Job, monkeypatch: pytest.MonkeyPatch, run: Run, allowed: int, given: tuple[int, ...], asked: int | None
) -> None:
    Path("job.json").write_bytes(SignedJob(replace(job, max_new_tokens=allowed)).sign(LAB).sign(CLINIC).to_bytes())
    channel = Channel(*seal("true"))
    monkeypatch.setattr("obfuscatune.parties.reached.connect_attested", lambda *_, **__: channel)
    more = ("--max_new_tokens", *given) if given else ()
    done = run("generate", "--job", "job.json", "--prompt", "x", *more, *CONNECT)
    if asked is None:
        assert (done.code, channel.asked) == (2, [])
        assert "got 9, expected at most 8, as the job says (at --max_new_tokens)" in " ".join(done.err.split())
        return
    assert (done.code, done.out) == (0, "red\n") and [fields["max_new_tokens"] for fields in channel.asked] == [asked]


def party_folder() -> None:
    """Make the directory of now the clinic's folder."""
    Path("terms.toml").touch()
    Path("party.toml").write_text(
        'name = "clinic"\nrole = "owner"\nidentity = "clinic.key"\npolicy = "policy.toml"\nterms = "terms.toml"\n'
        'enclave = "tls://127.0.0.1:1"\n'
    )


def test_a_result_of_another_job_is_never_given_out_as_this_ones(
    job: Job, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """Whether its sealed file is still beside it, or not; what is there stays as it is."""
    first, second = Channel(*seal("first", text=b"{}\n")), Channel(*seal("second", text=b"[]\n"))
    asked: list[str] = []
    request = second.request
    monkeypatch.setattr(second, "request", lambda fields, *_: asked.append(fields["op"]) or request(fields))
    party_folder()
    verbs = [("job", verb, "job.json", "--output_dir", "results", *CONNECT) for verb in ("fetch", "run")]
    for verb in verbs * 2:  # the same job into the same place: that is no fault
        monkeypatch.setattr(Enclave, "connect", lambda *_: first)
        assert run(*verb).code == 0
    monkeypatch.setattr(Enclave, "connect", lambda *_: second)
    for verb in verbs:
        done = run(*verb)
        assert done.code == 2 and "is there already" in done.err and done.out.count("results/") == 0, done.err
    Path("results/output.sealed").unlink()
    second.states = [*["done"] * 4, "running"]
    for verb in (*verbs, verbs[1]):  # the last one before the job is done, and where it would submit it
        done = run(*verb)
        assert done.code == 2 and "is there already (at results/output)" in done.err, done.err
    assert set(asked) == {"status"}  # before anything is fetched
    Path("results/output.sealed").write_bytes(second.data)
    done = run(*verbs[0])
    assert done.code == 2 and "other files than this job's result" in done.err
    assert Path("results/output/generations.jsonl").read_bytes() == b"{}\n"


@pytest.mark.parametrize("place", ["file", "file/below", "link"])
def test_a_place_that_takes_no_results_is_refused_before_anything_is_asked(
    job: Job, place: str, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    monkeypatch.setattr(Enclave, "connect", lambda *_: pytest.fail("it was asked"))
    party_folder()
    for verb in ("run", "fetch"):
        done = run("job", verb, "job.json", "--output_dir", place, *CONNECT)
        assert done.code == 2 and "not an output directory: got" in done.err and f"--output_dir {place}" in done.err


def test_a_place_that_is_lost_meanwhile_is_a_fault_of_the_disk(
    job: Job, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    Path("file").touch()
    monkeypatch.setattr("obfuscatune.cli.job.check_place", lambda *_: None)
    monkeypatch.setattr(Enclave, "connect", lambda *_: Channel(*seal("true")))
    done = run("job", "fetch", "job.json", "--output_dir", "file/below", *CONNECT)
    assert done.code == 1 and "cannot write the result: got" in done.err


@pytest.mark.parametrize("what", ["sender", "digest", "kind"])
def test_a_result_of_somebody_else_is_not(job: Job, what: str, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    more = {"sender": {"sender": Identity.generate("enclave", "x25519")}, "kind": {"kind": "adapter"}}.get(what, {})
    path, digest = seal("other", **more)
    channel = Channel(path, "cc" * 32 if what == "digest" else digest)
    monkeypatch.setattr(Enclave, "connect", lambda *_: channel)
    done = run("job", "fetch", "job.json", "--output_dir", "results", *CONNECT)
    assert done.code == 2 and "not the result that the enclave has sealed" in done.err
    assert not Path("results/output").exists()


@pytest.mark.parametrize(
    "verb",
    [
        ("job", "submit", "job.json"),
        ("job", "watch", "job.json", "--once"),
        ("job", "fetch", "job.json", "--output_dir", "results"),
        ("job", "cancel", "job.json"),
        ("job", "delete", "job.json"),
        ("generate", "--job", "job.json", "--prompt", "the colour is"),
    ],
)
def test_every_verb_talks_to_the_enclave_of_the_job_only(
    job: Job, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    channel, asked = Channel(*seal("true")), []
    monkeypatch.setattr("obfuscatune.parties.reached.connect_attested", lambda *_, **__: channel)
    assert run(*verb, *CONNECT).code == 0
    channel.enclave = LAB.public  # accepted by the policy, and not the one that the job names
    monkeypatch.setattr(channel, "request", lambda fields: asked.append(fields["op"]) or ({}, b""))
    done = run(*verb, *CONNECT)
    assert done.code == 1 and "another enclave than the one asked for" in done.err
    assert asked == ["former"]  # whether it goes on for that one
    monkeypatch.setattr(channel, "request", lambda fields: ({}, b"no certificate\n{}"))
    done = run(*verb, *CONNECT)  # what it shows in place of a proof is none
    assert done.code == 1 and "another enclave than the one asked for" in done.err


@pytest.mark.parametrize("state", ["waiting", "queued", "done"])
def test_what_the_enclave_has_from_an_earlier_job_is_not_sent_again(
    job: Job, state: str, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The job may be queued, and over, as soon as it is submitted: then it takes no inputs, and needs none."""
    path, digest = seal("rows", sender=CLINIC, kind="data")
    Path("job.json").write_bytes(SignedJob(replace(job, data=digest)).sign(LAB).sign(CLINIC).to_bytes())
    channel, asked = Channel(*seal("true")), []
    channel.states = [state, state]
    told, request = channel.told, channel.request
    missing = {"model": "aa" * 32} if state == "waiting" else {}
    monkeypatch.setattr(channel, "told", lambda *given: told(*given) | {"missing": missing})
    monkeypatch.setattr(channel, "request", lambda fields, *more: asked.append(fields["op"]) or request(fields, *more))
    monkeypatch.setattr(Enclave, "connect", lambda *_: channel)
    done = run("job", "submit", "job.json", "--attach", path, *CONNECT)
    assert done.code == 0 and asked == ["submit", "status"], done.err


def test_a_job_that_was_deleted_is_no_success(job: Job, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    channel = Channel(*seal("true"))
    monkeypatch.setattr(Enclave, "connect", lambda *_: channel)
    party_folder()
    for verb in (("run",), ("fetch", "job.json")):
        channel.states = ["deleted", "deleted"]
        done = run("job", *verb, *CONNECT)
        assert done.code == 2 and "job propose" in done.err, done.err


def test_a_list_of_jobs(job: Job, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(Enclave, "connect", lambda *_: Channel(*seal("true")))
    done = run("job", "list", *CONNECT)
    assert done.code == 0 and done.out == f"job {'aa' * 8}  done  step 1 of 1\n"


@pytest.mark.parametrize(("ends", "code"), [("done", 0), ("failed", 1), ("refused", 1), ("cancelled", 1)])
def test_a_watch_connects_anew_and_tells_how_the_job_ended(
    job: Job, ends: str, code: int, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """The enclave is not there, is there, breaks off, is there again."""
    channel = Channel(*seal("true"))
    channel.states = ["running", "running", ends]
    faults: list[Any] = [UsageError("no enclave answers"), None, ConnectionClosedError("closed"), OSError(), None]
    asked = channel.request

    def connect(*_: Any) -> Channel:
        if (fault := faults.pop(0)) is not None:
            raise fault
        return channel

    def request(fields: dict[str, Any], payload: bytes = b"", **_: Any) -> tuple[dict[str, Any], bytes]:
        if len(channel.states) == 2 and len(faults) == 3:  # after the first answer
            raise ConnectionClosedError("closed")
        return asked(fields, payload)

    monkeypatch.setattr(Enclave, "connect", connect)
    monkeypatch.setattr(channel, "request", request)
    done = run("job", "watch", "job.json", "--interval", 0.05, *CONNECT)
    assert done.code == code and ends in done.out and faults == []


def test_who_waits_is_told_for_what(job: Job, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """And once: a line when it changes, no line a second."""
    channel = Channel(*seal("true"))
    told, channel.states = channel.told, ["waiting", "waiting", "running", "done"]
    missing = {"model": "aa" * 32, "data": "bb" * 32}
    monkeypatch.setattr(channel, "told", lambda *state: told(*state) | {"missing": missing, "reason": ""})
    monkeypatch.setattr(Enclave, "connect", lambda *_: channel)
    done = run("job", "watch", "job.json", "--interval", 0.05, *CONNECT)
    lines = done.err.splitlines()
    assert lines.count("it waits for you to hand in data: obfuscatune job run") == 1
    assert lines.count("it waits for the provider to hand in model: obfuscatune job run") == 1
    assert lines[-1] == "running"
    missing.clear()


def test_an_enclave_that_says_nothing_is_lost_when_the_patience_is(
    job: Job, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr("obfuscatune.parties.enclave._LEAST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tls://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        done = run("job", "watch", "job.json", "--patience", 0, *("--enclave", address), *CONNECT[2:])
    assert done.code == 3 and time.monotonic() - begun < 20, done.err  # its --timeout is 60


def test_a_lost_connection_is_another_exit_code_than_a_failed_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    faults: list[Exception] = []

    def connect(*_: Any) -> Channel:
        raise faults[0]

    monkeypatch.setattr(Enclave, "connect", connect)
    watch = ("job", "watch", "job.json", "--interval", 0.05, "--patience", 0, *CONNECT)
    for fault, code, text in (
        (UsageError("no enclave answers"), 3, "LOST: the connection is lost"),
        (ConnectionClosedError("closed"), 3, "LOST: the connection is lost"),
        (AttestationError("refused by the policy"), 1, "refused by the policy"),  # waiting does not help
        (UsageError("no such job of this party"), 2, "no such job"),
    ):
        faults[:] = [fault]
        done = run(*watch)
        assert done.code == code and text in done.err, (fault, done.err)
