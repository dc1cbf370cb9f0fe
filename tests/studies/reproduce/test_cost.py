"""`reproduce cost`: shares by the configuration are the paper's, what is measured is kept, what is not is said."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune.errors import UsageError
from obfuscatune.studies.bench.run import BenchOptions
from obfuscatune.studies.bench.workloads import SIZES, build_model
from obfuscatune.studies.reports.tables import read_csv
from obfuscatune.studies.reproduce import cost, cost_cells
from obfuscatune.studies.reproduce.cost import PRESETS, TRUE_SIZES, Part, Preset, expected, run
from obfuscatune.studies.reproduce.cost_report import PAPER_SHARES
from obfuscatune.studies.reproduce.layer import fhe_version, layer_seconds

GIB = 2**30


@pytest.mark.parametrize("size", TRUE_SIZES)
def test_shares_are_those_of_the_paper(size: str) -> None:
    found = expected(size, "paper", "float32")
    d, layers = SIZES[size].width, SIZES[size].layers
    assert found.worker_parameters == 12 * d * d * layers
    assert found.enclave_share == pytest.approx(PAPER_SHARES[size], abs=6e-4)
    assert expected(size, "naive", "float32").enclave_share == found.enclave_share
    assert 0 < found.enclave_share - expected(size, "balanced", "float32").enclave_share < 1e-3


def test_bytes_follow_the_dtype() -> None:
    wide, narrow = (expected("small", "balanced", dtype) for dtype in ("float32", "bfloat16"))
    assert wide.bytes_sent_per_token == 2 * narrow.bytes_sent_per_token


def test_shares_of_rows_are_bytes_of_each_prime_but_the_first_is_a_seed() -> None:
    plain, shared = (expected("small", profile, "float32") for profile in ("strict+mix_rows=false", "shared"))
    assert shared.bytes_sent_per_token == plain.bytes_sent_per_token // 4 * 6 * 2
    assert shared.bytes_received_per_token == plain.bytes_received_per_token // 4 * 6 * 3
    narrow = expected("small", "shared", "bfloat16")  # three primes
    assert narrow.bytes_sent_per_token * 2 == shared.bytes_sent_per_token


@pytest.mark.slow
def test_one_layer_three_ways() -> None:
    rows = {row["how"]: row for row in layer_seconds(4, 96, fhe=fhe_version() is not None)}
    assert rows["float32 in the clear"]["error"] < 1e-6 and rows["shared, 6 primes"]["error"] < 1e-6
    assert all(row["seconds"] > 0 for row in rows.values())
    if "FHE, 7 bits" not in rows:
        pytest.skip("FHE is not measured: concrete-ml-extensions, the extra fhe, is not installed")
    assert rows["FHE, 7 bits"]["error"] < 0.05


def test_the_small_preset_names_all_sizes_and_keys_of_each() -> None:
    for preset in ("small", "paper"):
        assert [part.size for part in PRESETS[preset].parts] == list(TRUE_SIZES)
        assert all({"balanced", "paper"} <= set(part.profiles) for part in PRESETS[preset].parts)


def test_a_profile_whose_switches_have_changed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    part, common = Part(size="small", profiles=("balanced",)), {"threads": 1}
    before = {cell.key for cell in cost._cells(part, common, "cpu")}
    assert before == {cell.key for cell in cost._cells(part, common, "cpu")}
    other = dataclasses.replace(cost.parse_profile("balanced"), key_block=32)
    monkeypatch.setattr(cost, "parse_profile", lambda name: other)
    assert before.isdisjoint(cell.key for cell in cost._cells(part, common, "cpu"))


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells that measure nothing; the list gets the label of each that was computed."""
    computed: list[str] = []

    def key(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
        (profile,) = inputs["profiles"]
        computed.append(f"{inputs['size']} {profile} key")
        return {
            "size": inputs["size"],
            "profile": profile,
            "obfuscation_seconds": 1.5,
            "enclave_peak_bytes": 2 * GIB,
            "worker_peak_bytes": GIB,
        }

    def timed(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
        computed.append(f"{inputs['size']} {inputs['workload']}")
        common = {"size": inputs["size"], "workload": inputs["workload"], "tokens": 10, "calls": 40, "bytes": 500}
        return {"measurements": [{**common, "profile": name, "ratio": 2.5} for name in inputs["profiles"]]}

    monkeypatch.setattr(cost_cells, "key", key)
    monkeypatch.setattr(cost_cells, "timed", timed)
    parts = (Part(size="small", workloads=("prefill",)), Part(size="xl", profiles=("balanced",), workloads=()))
    monkeypatch.setitem(cost.PRESETS, "tiny", Preset(parts=parts))
    return computed


def test_what_is_measured_and_what_is_not(tmp_path: Path, invented: list[str]) -> None:
    path = run("tiny", tmp_path, command=["reproduce", "cost"])
    keys = [f"small {profile} key" for profile in cost.PROFILES]
    assert invented == [*keys, "small prefill", "xl balanced key"]
    rows = {(row["model"], row["profile"]): row for row in read_csv(tmp_path / "cost.csv")}
    assert len(rows) == 4 * len(cost.PROFILES)
    small, large = rows["small", "paper"], rows["xl", "balanced"]
    assert (small["key time, s"], small["peak of keying, GiB"], small["prefill, x"]) == ("1.5", "3.0", "2.5")
    assert (large["key time, s"], large["prefill, x"], large["paper, %"]) == ("1.5", "", "5.33")
    assert rows["xl", "paper"]["key time, s"] == ""
    traffic = {(row["model"], row["profile"]): row for row in read_csv(tmp_path / "cost-traffic.csv")}
    assert traffic["small", "paper"]["calls of a forward"] == "48"
    assert traffic["small", "stream"]["calls of a forward"] == traffic["xl", "stream"]["calls of a forward"] == "1"
    assert traffic["small", "stream"]["bytes/token of a forward"] == str(2 * 4 * SIZES["small"].width)
    assert traffic["small", "paper"]["prefill bytes/token"] == "50.0"
    text = path.read_text()
    assert "not measured" in text
    assert "paper: 2.50x to 2.50x" in text
    assert "obfuscatune reproduce cost" in text
    for name in ("cost.png", "cost.svg", "cost.html"):
        assert (tmp_path / name).stat().st_size > 0
    run("tiny", tmp_path)
    assert len(invented) == len(keys) + 2


def test_no_measurement_begins_after_the_time(tmp_path: Path, invented: list[str]) -> None:
    path = run("tiny", tmp_path, seconds=0.0)
    assert invented == []
    cells = len(cost.PROFILES) + 2
    assert f"left out for lack of time: {cells}" in path.read_text()
    run("tiny", tmp_path, sizes=["xl"])
    assert invented == ["xl balanced key"]
    assert f"left out for lack of time: {cells - 1}" in run("tiny", tmp_path, seconds=0.0).read_text()


def test_large_sizes_are_alone_in_the_memory_of_a_cpu(tmp_path: Path) -> None:
    part = Part(size="xl", workloads=("prefill",))
    for device, apart in (("cpu", True), ("cuda", False)):
        assert [cell.inputs["apart"] for cell in cost._cells(part, {}, device) if "apart" in cell.inputs] == [apart]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "unknown preset: got huge"),
        ({"preset": "tiny", "dtype": "float16"}, "unknown dtype: got float16"),
        ({"preset": "small", "sizes": ["huge"]}, "a size that the preset has not: got huge"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(output_dir=tmp_path, **options)


def test_the_benchmark_takes_a_dtype() -> None:
    model = build_model(SIZES["tiny"], adapter=True, dtype="bfloat16")
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    with pytest.raises(UsageError, match="--dtype float16"):
        BenchOptions(dtype="float16")


@pytest.mark.slow
def test_the_tiny_preset_measures(tmp_path: Path) -> None:
    run("tiny", tmp_path, threads=1)
    (row,) = (row for row in read_csv(tmp_path / "cost.csv") if (row["model"], row["profile"]) == ("tiny", "balanced"))
    assert float(row["lora_step, x"]) > 0
    assert float(row["key time, s"]) > 0
    inputs = {"size": "tiny", "profiles": ["balanced"], "workload": "prefill", "rounds": 2, "apart": True}
    inputs |= {"shape": {"batch_size": 2, "seq_length": 8, "new_tokens": 3}, "threads": 1, "device": "cpu"}
    (alone,) = cost_cells.timed({**inputs, "dtype": "bfloat16"}, {})["measurements"]
    assert len(alone["seconds"]) == len(alone["plain_seconds"]) == 2
    assert alone["calls"] == 2 * SIZES["tiny"].layers
    assert alone["ratio"] > 0
