"""What `inspect` computes equals what a run counts; `doctor` never promises what is not there."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import obfuscatune
from obfuscatune.cli.doctor import NO_TEE, TEE, examine

BATCH, SHORT, LONG = 2, 4, 20


def test_inspect_prints_a_table_and_json(model_dir: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run("inspect", "--model_name_or_path", model_dir, "--json").out)
    assert (found["family"], found["blocks"], found["width"], found["hidden"]) == ("gpt2", 2, 24, 96)
    assert [row["profile"] for row in found["profiles"]] == list(obfuscatune.PROFILES)
    table = run("inspect", "--model_name_or_path", model_dir).out
    assert "balanced" in table and "parameters        22,224" in table
    for profile in obfuscatune.PROFILES.values():
        assert f"  {profile.name}: {profile.audience}\n    claim: {profile.claim}\n" in table
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal breaks lines, and no value is cut
    narrow = run("inspect", "--model_name_or_path", "llama-3.2-1b").out
    assert "1,235.8 M" in narrow and "22,806,528" in narrow and "\N{HORIZONTAL ELLIPSIS}" not in narrow


@pytest.mark.filterwarnings("ignore:attn.resid_dropout")
@pytest.mark.parametrize("profile", ["plain", "paper", "balanced", "stream", "enclave"])
def test_the_estimate_is_what_a_forward_counts(profile: str, model_dir: Path, worker: str, run) -> None:
    found = json.loads(run("inspect", "--model_name_or_path", model_dir, "--json").out)
    row = next(row for row in found["profiles"] if row["profile"] == profile)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    counts = []
    with obfuscatune.protect(model, profile=profile, worker=worker) as protected, torch.no_grad():
        for length in (SHORT, LONG):
            protected.model(torch.ones(BATCH, length, dtype=torch.int64), use_cache=False)
            report = protected.report()
            t = report.traffic.get("forward")
            counts.append((0, 0, 0) if t is None else (t.calls, t.bytes_sent, t.bytes_received))
    assert (row["enclave_parameters"], row["worker_parameters"]) == (
        report.enclave_parameters,
        report.worker_parameters,
    )
    (calls, *first), (both_calls, *both) = counts
    assert calls == both_calls / 2 == row["calls"] == (1 if profile == "stream" else row["calls"])
    rates = (row["bytes_sent_per_token"], row["bytes_received_per_token"])
    for of_first, of_both, rate in zip(first, both, rates, strict=True):
        # The second forward less the first: framing cancels, but for the digits of the calls' numbers.
        tokens = BATCH * (LONG - SHORT)
        assert of_both - 2 * of_first == pytest.approx(rate * tokens, abs=8 * max(1, calls))
        framing = of_first - rate * BATCH * SHORT
        assert 0 <= framing <= 200 * calls


def test_the_estimate_of_mixed_rows_is_what_a_forward_of_as_many_counts(model_dir: Path, worker: str, run) -> None:
    from obfuscatune.studies.bench.estimate import ROWS

    found = json.loads(run("inspect", "--model_name_or_path", model_dir, "--json").out)
    row = next(row for row in found["profiles"] if row["profile"] == "strict")
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with obfuscatune.protect(model, profile="strict", worker=worker) as protected, torch.no_grad():
        protected.model(torch.ones(ROWS // 16, 16, dtype=torch.int64), use_cache=False)
        traffic = protected.report().traffic["multiply"]
    assert traffic.calls == row["calls"] == 4 * row["keyed_blocks"]
    rates = (row["bytes_sent_per_token"], row["bytes_received_per_token"])
    for counted, rate in zip((traffic.bytes_sent, traffic.bytes_received), rates, strict=True):
        # Rates are rounded down to whole numbers for each call.
        assert -200 * traffic.calls <= counted - rate * ROWS <= 200 * traffic.calls + 4 * ROWS * traffic.calls
    assert 0 < row["enclave_arithmetic"] < 1


def test_inspect_refuses_other_families(tmp_path: Path, run) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    outcome = run("inspect", "--model_name_or_path", tmp_path)
    assert outcome.code == 2 and "not the configuration of a causal language model" in outcome.err


def test_doctor_prints_lines_and_json(run) -> None:
    found = json.loads(run("doctor", "--json").out)
    assert {"torch", "cpu_threads", "cuda_devices", "core_dumps", "tee_devices", "verdict"} <= found.keys()
    assert found["verdict"] in run("doctor").out


def test_doctor_says_which_products_a_cpu_is_slow_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, word in ((True, "fast"), (False, "slow")):
        monkeypatch.setattr("obfuscatune.protocol.cpu.has_products", lambda dtype, has=has: has)
        monkeypatch.setattr("obfuscatune.worker.residues.uses_int8_products", lambda device, has=has: has)
        found = examine()
        assert all(found[f"{kind}_products"].startswith(word) for kind in ("bfloat16", "float16", "int8"))


def test_only_a_device_inside_a_tee_changes_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    assert examine(tmp_path)["verdict"] == NO_TEE
    for name in ("tpm0", "sgx_enclave"):  # there on machines whose owner reads every process
        (tmp_path / "dev" / name).touch()
    assert examine(tmp_path)["tee_devices"]["/dev/tpm*"]
    assert examine(tmp_path)["verdict"] == NO_TEE
    (tmp_path / "dev" / "tdx_guest").touch()
    assert examine(tmp_path)["verdict"] == TEE


def test_inspect_knows_shapes_by_name(run) -> None:
    outcome = run("inspect", "--model_name_or_path", "qwen2.5-0.5b", "--dtype", "bfloat16", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["blocks"], found["parameters"]) == (0, 24, 494_032_768)
