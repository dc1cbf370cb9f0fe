"""``obfuscatune attest``: exit codes, verdicts that name their rule, JSON, and the outputs that the document shows."""

import json
import re
import shlex
import time
from pathlib import Path

import pytest

from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Evidence, Quote, attest
from obfuscatune.parties.attestation.gpu_machine import GpuPlatform
from obfuscatune.parties.attestation.simulated_gpu import ROOT_FILE, SimulatedGpu
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.identity import Identity

FOLDER = Path(__file__).parents[2] / ".." / "shared" / "attestation"
needs_samples = pytest.mark.skipif(not FOLDER.is_dir(), reason="the samples of ../shared/attestation are not here")
NONCE, TLS_KEY = "ab" * 32, "cd" * 32
ENCLAVE = Identity.generate("enclave")
DOCUMENT = Path(__file__).parents[2] / "docs" / "attestation.md"
BLOCKS = re.findall(r"```\n\$ obfuscatune (.*?)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("hardware") / "tdx")


@pytest.fixture
def files(tmp_path: Path, platform: SimulatedPlatform, run) -> tuple[Path, Path]:
    """An evidence file, and a policy that accepts it, written with the help of ``attest measure``."""
    policy, made = tmp_path / "policy.toml", tmp_path / "enclave.evidence"
    claims = EnclaveClaims(ENCLAVE.public, TLS_KEY, NONCE, int(time.time()), "0.1.0")
    made.write_bytes(attest(platform.attester, claims.to_dict()).to_bytes() + b"\n")
    policy.write_text(
        f'[platform]\nkinds = ["tdx"]\n[simulation]\nallow = true\nroot = "{platform.root}"\n'
        + run("attest", "measure", "--simulation").out
    )
    return made, policy


def test_accepted_evidence(files: tuple[Path, Path], run) -> None:
    made, policy = files
    outcome = run("attest", "verify", made, "--policy", policy, "--nonce", NONCE, "--allow-simulation")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith("\naccepted; SIMULATION, it protects nothing\n")
    assert re.search(r"^ok +nonce ", outcome.out, re.MULTILINE)
    assert re.search(r"^not judged +tls key ", outcome.out, re.MULTILINE)


def test_refused_evidence_names_the_rule(files: tuple[Path, Path], run) -> None:
    made, policy = files
    outcome = run("attest", "verify", made, "--policy", policy, "--nonce", "00" * 32, "--allow-simulation")
    assert outcome.code == 1
    assert re.search(rf"^FAILED +nonce +{NONCE}\n +expected: 0+$", outcome.out, re.MULTILINE)
    assert "\nrefused: nonce; SIMULATION" in outcome.out
    late = run("attest", "verify", made, "--policy", policy, "--allow-simulation", "--time", 1_000_000_000)
    assert late.code == 1 and "refused: signature, claims" in late.out


def test_json_is_for_scripts(files: tuple[Path, Path], run) -> None:
    made, policy = files
    arguments = ("attest", "verify", made, "--policy", policy, "--allow-simulation", "--json")
    verdict = json.loads(run(*arguments).out)
    assert verdict["accepted"] and verdict["simulation"]
    assert (verdict["claims"]["tls_key"], verdict["claims"]["nonce"]) == (TLS_KEY, NONCE)
    refused = run(*arguments, "--nonce", "00" * 32)
    assert refused.code == 1
    assert [rule["name"] for rule in json.loads(refused.out)["rules"] if rule["passed"] is False] == ["nonce"]


def test_simulation_is_switched_on_by_name_in_both_places(files: tuple[Path, Path], run) -> None:
    made, policy = files
    outcome = run("attest", "verify", made, "--policy", policy)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--allow-simulation" in outcome.err
    policy.write_text(re.sub(r"\[simulation\].*?(?=\[measurements)", "", policy.read_text(), flags=re.DOTALL))
    outcome = run("attest", "verify", made, "--policy", policy, "--allow-simulation")
    assert outcome.code == 1
    assert "under another root" in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["EVIDENCE"],
        ["EVIDENCE", "--policy", "none.toml"],
        ["EVIDENCE", "--policy", "POLICY", "--allow-simulation", "--kind", "tdx"],
        ["POLICY", "--policy", "POLICY", "--allow-simulation"],
        ["EVIDENCE", "--policy", "EVIDENCE"],
        ["--quote", "EVIDENCE"],
        ["--quote", "EVIDENCE", "--kind", "tdx", "--nonce", NONCE],
        ["--quote", "none", "--kind", "tdx"],
        ["--quote", "EVIDENCE", "--kind", "tpm"],
    ],
)
def test_misuse_is_said(arguments: list[str], files: tuple[Path, Path], run) -> None:
    names = dict(zip(("EVIDENCE", "POLICY"), files, strict=True))
    outcome = run("attest", "verify", *(names.get(word, word) for word in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and "Traceback" not in outcome.err


def test_a_bare_quote_is_judged_and_never_accepted(files: tuple[Path, Path], tmp_path: Path, run) -> None:
    made, policy = files
    quote = Evidence.from_bytes(made.read_bytes().rstrip()).quote
    (tmp_path / "quote").write_bytes(quote.quote)
    (tmp_path / "collateral").write_bytes(quote.extras["collateral"])
    arguments = ("--quote", tmp_path / "quote", "--kind", "tdx", "--collateral", tmp_path / "collateral")
    judged = run("attest", "verify", *arguments, "--policy", policy, "--allow-simulation")
    assert (judged.code, judged.err) == (1, "")
    assert "FAILED" not in judged.out
    assert judged.out.endswith("\nrefused: no claims of an enclave; SIMULATION, it protects nothing\n")


def test_show_says_that_nothing_is_verified(files: tuple[Path, Path], run) -> None:
    outcome = run("attest", "show", files[0])
    assert outcome.code == 0
    assert outcome.out.startswith("NOT VERIFIED")
    assert all(text in outcome.out for text in (ENCLAVE.public.fingerprint, NONCE, TLS_KEY, "mrtd"))


def test_measure_wants_something_to_measure(run, tmp_path: Path) -> None:
    assert run("attest", "measure").code == 2
    (tmp_path / "log").write_bytes(b"no log")
    outcome = run("attest", "measure", "--event_log", tmp_path / "log")
    assert (outcome.code, outcome.out) == (2, "")


@needs_samples
@pytest.mark.parametrize(("command", "printed"), BLOCKS, ids=[command[:60] for command, _ in BLOCKS])
def test_the_document_shows_what_is_printed(
    command: str, printed: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in FOLDER.iterdir():
        if folder.is_dir():
            (tmp_path / folder.name).symlink_to(folder.resolve())
    text = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    (tmp_path / "tdx.toml").write_text(text.replace('collateral = "collateral.json"\n', ""))
    monkeypatch.chdir(tmp_path)
    outcome = run(*shlex.split(command))
    assert outcome.out == printed
    assert outcome.code == (1 if "verify" in command else 0)


@needs_samples
def test_an_event_log_of_another_boot_is_refused(run) -> None:
    outcome = run(
        "attest", "measure", "--event_log", FOLDER / "ccel/ccel_data.dat", "--quote", FOLDER / "dcap/tdx_quote"
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert "does not give the quote's registers" in outcome.err


def sampled(kind: str, quote: bytes, path: Path) -> Path:
    """An evidence file around a real quote, whose claims it does not bind."""
    claims = EnclaveClaims(ENCLAVE.public, TLS_KEY, NONCE, int(time.time()), "0.1.0")
    path.write_bytes(Evidence(Quote(kind, quote), claims.to_dict()).to_bytes())  # type: ignore[arg-type]
    return path


@needs_samples
@pytest.mark.parametrize(
    ("kind", "sample", "told"),
    [
        ("tdx", "tdx/quote_v5_sample.dat", "mrservicetd"),
        ("tdx", "dcap/tdx_quote", "mrtd"),
        ("sgx", "dcap/sgx_quote", "mrenclave"),
        ("snp", "snp/goog_attestation.bin", "measurement"),
        ("azure", "azure/hcl-report.bin", "runtime data"),
    ],
)
def test_quotes_of_every_kind_are_shown_and_measured(kind: str, sample: str, told: str, run, tmp_path: Path) -> None:
    quote = FOLDER / sample
    shown = run("attest", "show", sampled(kind, quote.read_bytes(), tmp_path / "evidence"))
    assert (shown.code, shown.err) == (0, "") and told in shown.out
    measured = run("attest", "measure", "--quote", quote, "--kind", kind)
    assert (measured.code, measured.err) == (0, "") and "[measurements]" in measured.out
    version = {"snp": "0", "azure": "5"}.get(kind)  # a number, as the policy takes it
    assert ("guest_svn" in shown.out) is (version is not None)
    assert re.findall(r"^guest_svn = (\d+)$", measured.out, re.MULTILINE) == ([version] if version else [])
    cut = tmp_path / "cut"
    cut.write_bytes(quote.read_bytes()[:700])
    assert run("attest", "measure", "--quote", cut, "--kind", kind).code == 2
    assert run("attest", "show", sampled(kind, cut.read_bytes(), tmp_path / "evidence")).code == 2


@needs_samples
def test_certificates_beside_evidence_that_comes_without(run, tmp_path: Path) -> None:
    """Own hardware, whose host hands out none."""
    report = bytes.fromhex((FOLDER / "snp/virtee_report_milan.hex").read_text().strip())
    evidence, policy = sampled("snp", report, tmp_path / "evidence"), tmp_path / "policy.toml"
    policy.write_text(
        '[platform]\nkinds = ["snp"]\nallow_smt = true\n'
        "min_tcb = { bootloader = 0, tee = 0, snp = 0, microcode = 0 }\n"
        f'[measurements]\nmeasurement = ["{report[0x90:0xC0].hex()}"]\n'
    )
    command = ("attest", "verify", evidence, "--policy", policy, "--time", 1_750_000_000)
    bare = run(*command)
    assert bare.code == 1 and "FAILED      format" in bare.out and "platform.certificates" in bare.out
    leaf, chain = FOLDER / "snp/virtee_vcek_milan.der", FOLDER / "snp/virtee_cert_chain_milan"
    given = run(*command, "--certificates", leaf, "--certificates", chain)
    assert "ok          certificates    under AMD's root" in given.out and "ok          measurement" in given.out
    assert given.code == 1 and "refused: claims" in given.out  # the sample is no enclave of ours


def test_misuse_of_nonce_and_kind_is_named(files: tuple[Path, Path], run) -> None:
    made, policy = files
    for nonce in ("", "zz", NONCE.upper(), NONCE + "00", "\udcff"):
        outcome = run("attest", "verify", made, "--policy", policy, "--allow-simulation", "--nonce", nonce)
        assert outcome.code == 2 and outcome.err.startswith("error: not a nonce")
    for kind, name in (("tdx", "mrtd"), ("snp", "measurement")):
        lines = run("attest", "measure", "--simulation", "--kind", kind).out.splitlines()
        assert len(lines) == 2 and lines[1].startswith(f"{name} = ")
    assert run("attest", "measure", "--simulation", "--kind", "sgx").code == 2


def test_a_gpu_from_its_reference_to_the_verdict(platform: SimulatedPlatform, run, tmp_path: Path) -> None:
    gpu = SimulatedGpu.open(tmp_path / "gpu")
    claims = EnclaveClaims(ENCLAVE.public, TLS_KEY, NONCE, int(time.time()), "0.1.0")
    evidence = attest(GpuPlatform(platform, gpu).attester, claims.to_dict())
    names = {name: tmp_path / name for name in ("enclave.evidence", "gpu_report", "gpu_chain.pem", "h100.toml")}
    names["enclave.evidence"].write_bytes(evidence.to_bytes())
    names["gpu_report"].write_bytes(evidence.quote.extras["gpu_report"])
    names["gpu_chain.pem"].write_bytes(evidence.quote.extras["gpu_certificates"])
    shown = run("attest", "show", names["enclave.evidence"])
    assert shown.code == 0 and re.search(r"^gpu driver +550\.90\.07$", shown.out, re.MULTILINE)
    reference = run("attest", "measure", "--quote", names["gpu_report"], "--kind", "gpu")
    assert reference.code == 0 and "not verified" in reference.out
    names["h100.toml"].write_text(reference.out)
    (tmp_path / "roots.pem").write_bytes(platform.root.read_bytes() + (tmp_path / "gpu" / ROOT_FILE).read_bytes())
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[platform]\nkinds = ["tdx"]\n[gpu]\nreference = "h100.toml"\n[simulation]\nallow = true\nroot = "roots.pem"\n'
        + run("attest", "measure", "--simulation").out
    )
    judging = ("--policy", policy, "--allow-simulation")
    accepted = run("attest", "verify", names["enclave.evidence"], *judging)
    assert accepted.code == 0 and re.search(r"^ok +gpu values +64 as the reference", accepted.out, re.MULTILINE)
    bare = ("attest", "verify", "--quote", names["gpu_report"], "--kind", "gpu", *judging)
    assert re.search(r"^FAILED +gpu chain", run(*bare).out, re.MULTILINE)
    found = run(*bare, "--certificates", names["gpu_chain.pem"])
    assert (found.code, found.err) == (1, "") and "FAILED" not in found.out
    names["gpu_report"].write_bytes(evidence.quote.extras["gpu_report"][:-1])
    assert run("attest", "measure", "--quote", names["gpu_report"], "--kind", "gpu").code == 2
    assert run("attest", "measure", "--kind", "gpu").code == 2
    names["h100.toml"].write_text("driver = []")
    refused = run("attest", "verify", names["enclave.evidence"], *judging)
    assert refused.code == 2 and "gpu.reference" in refused.err
