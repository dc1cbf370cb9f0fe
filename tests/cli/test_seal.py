"""``seal`` and ``sealed``: what goes in comes out for the recipients alone, and nothing is written on failure."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from obfuscatune.parties.exposure import line
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.sealed import read_header
from obfuscatune.parties.terms import Terms, load_terms
from obfuscatune.profiles import PROFILES

ROWS = '{"prompt": "canary question", "completion": "canary answer"}\n'


@pytest.fixture
def parties(tmp_path: Path, run: Callable) -> Path:
    for name in ("lab", "clinic", "enclave"):
        assert run("identity", "new", name, "--output_dir", tmp_path, "--suite", "x25519").code == 0
    (tmp_path / "terms.toml").write_text("version = 3\n")
    return tmp_path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    return path


def common(parties: Path, output: str = "out.sealed", recipient: str = "enclave") -> list[object]:
    return [
        *("--identity", parties / "lab.key", "--recipient", parties / f"{recipient}.pub"),
        *("--output", parties / output, "--terms", parties / "terms.toml"),
    ]


@pytest.mark.parametrize(
    "verb",
    ["seal", "seal model", "seal data", "seal prompts", "seal terms", "sealed inspect", "sealed open", "sealed bench"],
)
def test_every_help_ends_with_examples_of_options_that_exist(
    verb: str, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run(*verb.split(), "--help")
    assert outcome.code == 0
    assert "…" not in outcome.out, "an option's name is cut"
    options, _, examples = outcome.out.partition("Examples:")
    if " " in verb:
        assert f"obfuscatune {verb}" in " ".join(examples.split())
        assert {word for word in examples.split() if word.startswith("--")} <= set(options.split())


def test_a_model_there_and_back(parties: Path, model_dir: Path, run: Callable) -> None:
    shows = f'[shows]\nbalanced = "{line(PROFILES["balanced"])}"\n'
    (parties / "terms.toml").write_text(f'version = 3\nprofiles = ["balanced"]\nmax_queries = 7\n{shows}')
    more = ["--recipient", parties / "clinic.pub"]
    outcome = run("seal", "model", model_dir, *common(parties), *more)
    assert outcome.code == 0, outcome.err
    signed = read_header(parties / "out.sealed")
    assert outcome.out.split() == [str(parties / "out.sealed"), signed.digest]
    recipients = [PublicIdentity.load(parties / f"{name}.pub") for name in ("enclave", "clinic")]
    assert [one.fingerprint for one in signed.header.recipients] == [one.fingerprint for one in recipients]
    assert all(one.fingerprint in outcome.err for one in recipients)
    assert signed.header.kind == "model" and signed.header.terms is not None
    assert signed.header.terms["max_queries"] == 7

    opening = ["sealed", "open", parties / "out.sealed", "--identity", parties / "clinic.key"]
    outcome = run(*opening, "--output_dir", parties / "back", "--sender", parties / "lab.pub")
    assert outcome.code == 0, outcome.err
    assert {path.name: path.read_bytes() for path in (parties / "back").iterdir()} == {
        path.name: path.read_bytes() for path in model_dir.iterdir()
    }
    assert "compare this fingerprint" not in outcome.err
    outcome = run(*opening, "--output_dir", parties / "back")
    assert outcome.code == 2 and "there already" in outcome.err
    outcome = run(*opening, "--output_dir", parties / "again")
    assert outcome.code == 0 and "compare this fingerprint" in outcome.err


@pytest.mark.parametrize(("verb", "name"), [("data", "data.jsonl"), ("prompts", "prompts.jsonl")])
def test_rows_there_and_back(verb: str, name: str, parties: Path, rows: Path, run: Callable) -> None:
    assert run("seal", verb, rows, *common(parties, recipient="clinic")).code == 0
    assert b"canary" not in (parties / "out.sealed").read_bytes()
    assert read_header(parties / "out.sealed").header.kind == verb
    outcome = run(
        *("sealed", "open", parties / "out.sealed", "--identity", parties / "clinic.key"),
        *("--output_dir", parties / "back"),
    )
    assert outcome.code == 0, outcome.err
    assert (parties / "back" / name).read_text() == ROWS


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("data", '{"prompt": "canary"}\n'),
        ("data", '{"text": "a"}\n{"text": "canary", "labels": 1}\n'),
        ("data", ""),
        ("prompts", '{"text": "canary"}\n'),
        ("prompts", '{"prompt": ""}\n'),
        ("prompts", "canary\n"),
    ],
)
def test_bad_rows_are_not_sealed(verb: str, text: str, parties: Path, rows: Path, run: Callable) -> None:
    rows.write_text(text)
    outcome = run("seal", verb, rows, *common(parties))
    assert outcome.code == 2 and re.search(r"rows\.jsonl:\d", outcome.err)
    assert "canary" not in outcome.err + outcome.out
    assert not list(parties.glob("*sealed*"))


def test_misuse_writes_nothing(parties: Path, rows: Path, model_dir: Path, run: Callable) -> None:
    (parties / "bad.toml").write_text("version = 3\nprofiles = 3\n")
    (parties / "old.toml").write_text('profiles = ["balanced"]\n')
    terms = ["--terms", parties / "terms.toml"]
    identity, output = ["--identity", parties / "lab.key"], ["--output", parties / "out.sealed"]
    recipient = ["--recipient", parties / "enclave.pub"]
    for arguments, message in [
        ([*identity, *output, *terms], "no recipient"),
        ([*identity, *output, *terms, *recipient, *recipient], "there twice"),
        ([*identity, *output, *terms, "--recipient", parties / "enclave.key"], "is a secret key"),
        (
            ["--identity", parties / "lab.pub", *terms, *output, *recipient],
            "is a public identity: expected the secret one",
        ),
        ([*identity, *output, *terms, *recipient, "--evidence", rows], "belong together"),
        ([*identity, *output, *terms, *recipient, "--policy", rows], "belong together"),
        ([*identity, *output, *recipient, "--terms", parties / "bad.toml"], "terms"),
        ([*identity, *output, *recipient, "--terms", parties / "nowhere"], "cannot read the terms"),
        ([*identity, *output, *recipient, "--terms", parties / "old.toml"], "another version"),
        ([*identity, *output, *recipient], "no terms"),
    ]:
        outcome = run("seal", "data", rows, *arguments)
        assert outcome.code == 2 and message in outcome.err, outcome.err
        assert not list(parties.glob("*sealed*")), message
    outcome = run("seal", "model", model_dir / "nowhere", *identity, *output, *recipient)
    assert outcome.code == 2 and "no such model directory" in outcome.err


def test_a_sealed_file_is_not_overwritten(parties: Path, rows: Path, run: Callable) -> None:
    (parties / "out.sealed").write_text("before")
    outcome = run("seal", "data", rows, *common(parties))
    assert outcome.code == 2 and "there already" in outcome.err
    assert (parties / "out.sealed").read_text() == "before"


def test_inspect_needs_no_key(parties: Path, rows: Path, run: Callable) -> None:
    run("seal", "data", rows, *common(parties))
    outcome = run("sealed", "inspect", parties / "out.sealed", "--json")
    facts = json.loads(outcome.out)
    signed = read_header(parties / "out.sealed")
    assert (facts["kind"], facts["digest"], facts["signature"]) == ("data", signed.digest, "valid")
    assert facts["sender"]["fingerprint"] == PublicIdentity.load(parties / "lab.pub").fingerprint
    assert facts["recipients"] == [PublicIdentity.load(parties / "enclave.pub").fingerprint]
    assert (facts["payload_bytes"], facts["terms"]) == (signed.header.payload_bytes, Terms().to_dict())
    outcome = run("sealed", "inspect", parties / "out.sealed")
    assert all(str(facts[name]) in outcome.out for name in ("kind", "digest", "payload_bytes"))


@pytest.mark.parametrize("role", ["provider", "owner"])
def test_terms_are_printed_to_be_filled(role: str, parties: Path, run: Callable) -> None:
    outcome = run("seal", "terms", "--role", role, "--partner", parties / "lab.pub")
    (parties / "mine.toml").write_text(outcome.out)
    assert Terms.from_dict(load_terms(parties / "mine.toml")).profiles == ("enclave", "shared")
    assert PublicIdentity.load(parties / "lab.pub").fingerprint in outcome.out


def test_a_changed_file_is_refused_and_nothing_is_written(parties: Path, rows: Path, run: Callable) -> None:
    run("seal", "data", rows, *common(parties, recipient="clinic"))
    path = parties / "out.sealed"
    data = bytearray(path.read_bytes())
    opening = ["sealed", "open", path, "--identity", parties / "clinic.key", "--output_dir", parties / "back"]
    for place, message in [(-1, "signature"), (read_header(path).payload_offset, "chunk 0")]:
        data[place] ^= 1
        path.write_bytes(data)
        outcome = run(*opening)
        assert outcome.code == 2 and message in outcome.err and outcome.out == ""
        data[place] ^= 1
    assert not list(parties.glob("*back*"))
    path.write_bytes(data)
    assert run(*opening).code == 0  # the control


def test_who_may_open_and_from_whom(parties: Path, rows: Path, run: Callable) -> None:
    run("seal", "data", rows, *common(parties, recipient="clinic"))
    opening = ["sealed", "open", parties / "out.sealed", "--output_dir", parties / "back", "--identity"]
    outcome = run(*opening, parties / "lab.key")
    assert outcome.code == 2 and "not sealed to this identity" in outcome.err
    outcome = run(*opening, parties / "clinic.key", "--sender", parties / "enclave.pub")
    assert outcome.code == 2 and "sealed by somebody else" in outcome.err
    assert not list(parties.glob("*back*"))


def test_the_same_name_is_not_the_same_sender(parties: Path, rows: Path, run: Callable) -> None:
    run("seal", "data", rows, *common(parties, recipient="clinic"))
    (parties / "real").mkdir()
    run("identity", "new", "lab", "--output_dir", parties / "real", "--suite", "x25519")
    outcome = run(
        *("sealed", "open", parties / "out.sealed", "--identity", parties / "clinic.key"),
        *("--output_dir", parties / "back", "--sender", parties / "real" / "lab.pub"),
    )
    assert outcome.code == 2 and "sealed by somebody else" in outcome.err


def test_an_enclave_becomes_a_recipient_only_by_a_verdict(
    parties: Path, rows: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    enclave = Identity.generate("attested", "x25519").public
    asked = []

    def attested(evidence: Path, policy: Path, allow_simulation: bool) -> PublicIdentity:
        asked.append((evidence, policy, allow_simulation))
        return enclave

    monkeypatch.setattr("obfuscatune.cli.seal.attested_identity", attested)
    outcome = run(
        *("seal", "data", rows, "--identity", parties / "lab.key", "--output", parties / "out.sealed"),
        *("--evidence", "e", "--policy", "p", "--allow-simulation", "--terms", parties / "terms.toml"),
    )
    assert outcome.code == 0, outcome.err
    assert asked == [(Path("e"), Path("p"), True)]
    assert [one.fingerprint for one in read_header(parties / "out.sealed").header.recipients] == [enclave.fingerprint]


def test_bench_prints_both_ways(run: Callable) -> None:
    outcome = run("sealed", "bench", "--size_mb", 2, "--repetitions", 1)
    assert outcome.code == 0, outcome.err
    assert all(word in outcome.out for word in ("seal", "open", "memory", "median"))
