"""The parties' end of a job: to which enclave they talk, and what they take for its result."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.cli.connecting import EnclaveOptions
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

    def request(self, fields: dict[str, Any], payload: bytes = b"", **_: Any) -> tuple[dict[str, Any], bytes]:
        if fields["op"] == "download":
            return {"size": len(self.data)}, self.data[fields["offset"] :]
        if fields["op"] == "generate":
            return {}, json.dumps(["red"] * len(json.loads(payload))).encode()
        done = {"status": "done", "reason": "", "step": 1, "steps": 1, "missing": {}, "queries": 0}
        return {**done, "job": fields.get("job", ""), "results": {"output": self.digest}}, b""

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


def seal(name: str, *, sender: Identity = ENCLAVE, kind: Any = "output") -> tuple[Path, str]:
    path = Path(name)
    files: dict[str, Path | bytes] = {"generations.jsonl": b"{}\n"}
    return path, seal_files(path, files, kind=kind, sender=sender, recipients=[CLINIC.public])


def test_a_result_of_the_enclave_is_opened(job: Job, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    channel = Channel(*seal("true"))
    monkeypatch.setattr(EnclaveOptions, "connect", lambda *_: channel)
    assert run("job", "fetch", "job.json", "--output_dir", "results", *CONNECT).code == 0
    assert Path("results/output/generations.jsonl").read_bytes() == b"{}\n"


@pytest.mark.parametrize("what", ["sender", "digest", "kind"])
def test_a_result_of_somebody_else_is_not(job: Job, what: str, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    more = {"sender": {"sender": Identity.generate("enclave", "x25519")}, "kind": {"kind": "adapter"}}.get(what, {})
    path, digest = seal("other", **more)
    channel = Channel(path, "cc" * 32 if what == "digest" else digest)
    monkeypatch.setattr(EnclaveOptions, "connect", lambda *_: channel)
    done = run("job", "fetch", "job.json", "--output_dir", "results", *CONNECT)
    assert done.code == 2 and "not the result that the enclave has sealed" in done.err
    assert not Path("results/output").exists()


@pytest.mark.parametrize(
    "verb",
    [
        ("job", "submit", "job.json"),
        ("job", "watch", "job.json", "--once"),
        ("job", "fetch", "job.json", "--output_dir", "results"),
        ("generate", "--job", "job.json", "--prompt", "the colour is"),
    ],
)
def test_every_verb_talks_to_the_enclave_of_the_job_only(
    job: Job, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    channel, asked = Channel(*seal("true")), []
    monkeypatch.setattr("obfuscatune.cli.connecting.load_policy", lambda *_: None)
    monkeypatch.setattr(
        "obfuscatune.parties.channel.client.connect_attested",
        lambda *_, enclave, **__: asked.append(enclave) or channel,
    )
    assert run(*verb, *CONNECT).code == 0
    assert asked == [job.enclave]


def test_a_job_beyond_ones_terms_is_not_signed(job: Job, run: Run) -> None:
    Path("terms.toml").write_text('profiles = ["enclave"]\n')
    before = Path("job.json").read_bytes()
    done = run("job", "sign", "job.json", "--identity", "clinic.key", "--terms", "terms.toml")
    assert done.code == 1 and "your terms do not allow this job" in done.err and "balanced" in done.err
    assert Path("job.json").read_bytes() == before
    Path("terms.toml").write_text('profiles = ["balanced"]\n')
    assert run("job", "sign", "job.json", "--identity", "clinic.key", "--terms", "terms.toml").code == 0
