"""The benchmark: its counts are right, its processes end, bad options are refused. No test looks at speed."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from obfuscatune.cli.bench import command
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.protocol.arena import Arena
from obfuscatune.studies.bench.contender import Contender, ContenderSpec
from obfuscatune.studies.bench.link import LinkKind, split_link
from obfuscatune.studies.bench.process import ContenderProcess
from obfuscatune.studies.bench.report import to_markdown
from obfuscatune.studies.bench.run import BenchOptions, Measurement, count_steps, parse_profile, run_bench
from obfuscatune.studies.bench.workloads import SIZES, WORKLOADS, Shape, build_model
from obfuscatune.studies.reports.provenance import describe_machine

SHAPE = Shape(batch_size=2, seq_length=8, new_tokens=3)
PROFILES = ("paper", "balanced")


def _spec(profile: str | None) -> ContenderSpec:
    return ContenderSpec("tiny", SHAPE, None if profile is None else parse_profile(profile), 1, "cpu")


@pytest.mark.slow
def test_the_command_measures_every_workload_and_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/obfuscatune", "bench", "--size", "tiny"])
    command(
        size=["tiny"],
        profile=list(PROFILES),
        batch_size=SHAPE.batch_size,
        seq_length=SHAPE.seq_length,
        new_tokens=SHAPE.new_tokens,
        repetitions=2,
        threads=1,
        json_file=tmp_path / "bench.json",
        markdown=tmp_path / "bench.md",
    )
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["command"] == "obfuscatune bench --size tiny" and found["machine"]["threads"] == 1
    assert {"commit", "dirty", "accelerator"} <= found["machine"].keys()
    measured = {(m["profile"], m["workload"]): m for m in found["measurements"]}
    assert set(measured) == {(p, w) for p in PROFILES for w in WORKLOADS}
    for (profile, workload), m in measured.items():
        assert len(m["seconds"]) == len(m["plain_seconds"]) == 2
        assert min(*m["seconds"], *m["plain_seconds"], m["ratio"], m["tokens_per_second"]) > 0
        assert m["calls"] == _calls(profile, workload)
        assert m["plain_policy"] in ("default", "passive")
    # x goes and y comes back, float32, twice a layer; the rest is framing.
    payload = 2 * 2 * 4 * SIZES["tiny"].width
    assert payload < measured["balanced", "prefill"]["bytes_per_token_layer"] < 2 * payload
    assert measured["balanced", "prefill"]["bytes"] < measured["paper", "prefill"]["bytes"]
    for footprint in found["footprints"]:
        assert 0 < footprint["enclave_share"] < 1
        peaks = [footprint[f"{process}_peak_bytes"] for process in ("enclave", "worker", "plain")]
        assert min(*peaks, footprint["obfuscation_seconds"]) > 0
    text = (tmp_path / "bench.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| tiny |")]
    assert len(rows) == len(measured) + len(PROFILES)
    assert "balanced" in capfd.readouterr().out


def _calls(profile: str, workload: str) -> int:
    """Requests of one repetition: a forward for each remote module, a backward too in training, its optimizer's own."""
    modules = SIZES["tiny"].layers * (2 if profile == "balanced" else 4)
    optimizer = 1 if profile == "paper" else 0
    return {"prefill": modules, "decode": modules * SHAPE.new_tokens, "lora_step": 2 * modules + optimizer}[workload]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["paper", "balanced", "enclave"])
@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_counts_are_those_of_the_connection(profile: str, workload: str) -> None:
    contender = Contender(_spec(profile))
    try:
        contender.load(adapter=WORKLOADS[workload].adapter)
        assert contender.protected is not None
        session = contender.protected.session
        before = 0 if session is None else session.connection.bytes_sent + session.connection.bytes_received
        reply = contender.run(workload=workload)
        after = 0 if session is None else session.connection.bytes_sent + session.connection.bytes_received
        assert reply["bytes"] == after - before
        assert (reply["bytes"] > 0) == (reply["calls"] > 0) == (profile != "enclave")
    finally:
        contender.close()


def test_a_row_without_shared_memory_stands_beside_another() -> None:
    contender = Contender(dataclasses.replace(_spec("balanced"), link="socket"))
    try:
        contender.load(adapter=False)
        assert not contender.protected.session.shares_memory
    finally:
        contender.close()
    assert contender.spec.name == "balanced@socket"
    assert Arena.create(1) is not None  # what others have


@pytest.mark.parametrize("link", [pytest.param("tcp", marks=pytest.mark.slow), "tls"])
def test_a_listening_worker_is_measured_too(link: LinkKind) -> None:
    contender = Contender(dataclasses.replace(_spec("balanced"), link=link))
    try:
        contender.load(adapter=False)
        assert contender.run(workload="prefill")["calls"] == _calls("balanced", "prefill")
        assert contender.protected.session.worker.startswith(f"{link}://127.0.0.1:")
    finally:
        contender.close()
    assert contender.spec.name == f"balanced@{link}"


def test_links_are_part_of_a_profiles_text() -> None:
    assert split_link("balanced+mlp=enclave@tls") == ("balanced+mlp=enclave", "tls")
    assert split_link("balanced") == ("balanced", "spawn")
    with pytest.raises(UsageError, match="unknown link: got udp"):
        BenchOptions(profiles=("balanced@udp",))


def test_plain_crosses_no_boundary_and_trains() -> None:
    contender = Contender(_spec(None))
    contender.load(adapter=True)
    before = {name: p.detach().clone() for name, p in contender._model.named_parameters()}
    reply = contender.run(workload="lora_step")
    assert reply["calls"] == reply["bytes"] == 0
    changed = {name for name, p in contender._model.named_parameters() if not p.equal(before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_sizes_are_those_of_gpt2() -> None:
    published = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
    for name, count in published.items():
        size = SIZES[name]
        d = size.width
        assert (size.vocabulary + size.positions + 2 + size.layers * (12 * d + 13)) * d == count
        assert d // size.heads == 64
    size = SIZES["tiny"]
    formula = (size.vocabulary + size.positions + 2 + size.layers * (12 * size.width + 13)) * size.width
    assert sum(p.numel() for p in build_model(size, adapter=False).parameters()) == formula


def test_the_ratio_is_the_median_of_paired_ratios() -> None:
    # A slow spell that hits one whole round changes both sides of a pair, and neither ratio.
    plain, ours = [1.0, 10.0, 1.0], [2.0, 20.0, 3.0]
    measured = Measurement("tiny", "balanced", "decode", 6, "default", plain, ours, 12, 2400)
    assert measured.ratio == 2.0
    assert measured.tokens_per_second == 2.0
    assert measured.plain_tokens_per_second == 6.0
    assert measured.calls_per_token_layer == 1.0
    assert measured.bytes_per_token_layer == 200.0


@pytest.mark.slow
def test_key_only_protects() -> None:
    options = BenchOptions(sizes=("tiny",), profiles=("balanced",), workloads=("key",), shape=SHAPE, threads=1)
    steps: list[str] = []
    result = run_bench(options, steps.append)
    assert result.measurements == []
    (footprint,) = result.footprints
    assert footprint.plain_peak_bytes is None
    assert footprint.obfuscation_seconds > 0
    assert steps == ["tiny balanced: load"]
    assert count_steps(options) == 1
    assert "tiny" in to_markdown(options, result, describe_machine(["obfuscatune"]))


def test_steps_are_loads_and_repetitions() -> None:
    # Four contenders, loaded without and with an adapter, each doing a warm-up and two rounds of three workloads.
    options = BenchOptions(sizes=("tiny",), profiles=PROFILES, shape=SHAPE, repetitions=2)
    assert count_steps(options) == 4 * (2 + 3 * 3)


def test_a_failed_contender_is_named_and_its_process_ends() -> None:
    with (
        pytest.raises(ObfuscatuneError, match=r"KeyError.*tiny plain, run"),
        ContenderProcess(_spec(None), label="tiny plain", wait_policy="default") as process,
    ):
        process.ask("run", workload="no such workload")
    assert process._process.poll() is not None


@pytest.mark.slow
def test_a_failed_contender_takes_its_worker_with_it() -> None:
    spec = dataclasses.replace(_spec("balanced"), link="tcp")
    with (
        pytest.raises(ObfuscatuneError, match="KeyError"),
        ContenderProcess(spec, label="tiny balanced@tcp", wait_policy="passive") as process,
    ):
        process.ask("load", adapter=False)
        pid = process._process.pid
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        process.ask("run", workload="no such workload")
    assert started and not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.mark.slow
def test_a_killed_contender_is_named() -> None:
    with (
        pytest.raises(ObfuscatuneError, match=r"killed by signal 9 .*tiny plain, load"),
        ContenderProcess(_spec(None), label="tiny plain", wait_policy="default") as process,
    ):
        process._process.kill()
        process._process.wait()  # so that the request meets a closed pipe, and so does its flush at the end
        process.ask("load", adapter=False)


@pytest.mark.slow
def test_waiting_policies_reach_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    default, passive = [b"GOMP_SPINCOUNT=300000"], [b"GOMP_SPINCOUNT=1000", b"OMP_WAIT_POLICY=passive"]
    for policy, expected in (("default", default), ("passive", passive)):
        with ContenderProcess(_spec(None), label="plain", wait_policy=policy) as process:
            process.ask("load", adapter=False)  # until it answers, the kernel may not show its environment
            environment = Path(f"/proc/{process._process.pid}/environ").read_bytes().split(b"\0")
            process._process.kill()
        assert sorted(entry for entry in environment if entry.startswith((b"OMP_WAIT_POLICY=", b"GOMP_"))) == expected
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ("huge",)}, "--size huge: not one of tiny, small"),
        ({"workloads": ("sleep",)}, "--workload sleep: not one of prefill"),
        ({"profiles": ("balanced", "balanced")}, "--profile: none, or one of them twice"),
        ({"sizes": ()}, "--size: none"),
        ({"repetitions": 0}, "--repetitions 0: not at least 1"),
        ({"threads": 0}, "--threads 0: not at least 1"),
        ({"threads": 4097}, "--threads 4097: more than 4096"),
        ({"shape": Shape(0, 8, 3)}, "--batch_size 0: not at least 1"),
        ({"shape": Shape(2, 2000, 3)}, "--size small: holds 1024 tokens, not the 2000"),
        ({"shape": Shape(2, 8, 1020)}, "--size small: holds 1024 tokens, not the 1036"),
        ({"device": "nosuch"}, "device not available: got nosuch (at --device)"),
        ({"device": "cuda:99"}, "device not available: got cuda:99"),
        ({"profiles": ("bold",)}, "unknown profile: got 'bold'"),
        ({"profiles": ("balanced+mlp=moon",)}, "mlp is 'moon'"),
        ({"profiles": ("balanced+mlp",)}, "unknown profile switch: got mlp"),
        ({"profiles": ("balanced+remote=false",)}, "unknown profile switch: got remote=false"),
        ({"profiles": ("balanced+fold_norms=maybe",)}, "value of fold_norms: got maybe, expected bool"),
        ({"profiles": ("balanced+kappa=x",)}, "value of kappa: got x, expected float"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        BenchOptions(**options)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)--size huge.*--repetitions 0"):
        BenchOptions(sizes=("huge",), repetitions=0)


@pytest.mark.parametrize("option", ["json_file", "markdown"])
def test_a_file_nowhere_is_refused_before_anything_is_measured(tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        command(**{option: tmp_path / "missing" / "file"})
    with pytest.raises(UsageError, match="a directory, and no file to write"):
        command(**{option: tmp_path})


def test_numbers_do_not_lose_their_file_to_the_tables(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="numbers and tables in one file"):
        command(json_file=tmp_path / "file", markdown=tmp_path / "." / "file")


def test_profiles_are_written_as_reports_write_them() -> None:
    for text in ("balanced", "balanced+mlp=enclave", "paper+enclave_blocks=1", "balanced+fold_norms=False"):
        assert parse_profile(text).name == text
    assert parse_profile("balanced+fold_norms=false").fold_norms is False
