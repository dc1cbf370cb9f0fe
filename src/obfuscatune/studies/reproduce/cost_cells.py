"""The cells of `cost`: each runs the benchmark of `obfuscatune.studies.bench` for one size, in processes of its own."""

import dataclasses
import statistics
from typing import Any

import torch

from obfuscatune.profiles import Profile
from obfuscatune.studies.bench.contender import ContenderSpec
from obfuscatune.studies.bench.process import ContenderProcess, WaitPolicy
from obfuscatune.studies.bench.run import KEY, WARM_UPS, BenchOptions, Measurement, parse_profile, run_bench
from obfuscatune.studies.bench.workloads import WORKLOADS, Shape
from obfuscatune.studies.reproduce.layer import layer_seconds

Plain = dict[str, Any]


def key(inputs: Plain, places: Plain) -> Plain:
    """Protect one size under one profile: seconds, share of the parameters inside, peak memory of both processes."""
    result = run_bench(_options(inputs, (KEY,)))
    return dataclasses.asdict(result.footprints[0])


def layer(inputs: Plain, places: Plain) -> Plain:
    """Time one linear layer in the clear, as shares, and under FHE where that is installed; ``{"layer": [...]}``."""
    before = torch.get_num_threads()
    torch.set_num_threads(inputs["threads"])
    try:
        return {"layer": layer_seconds(inputs["rows"], inputs["width"], fhe=inputs["fhe"] is not None)}
    finally:
        torch.set_num_threads(before)


def timed(inputs: Plain, places: Plain) -> Plain:
    """Time one workload of one size under each profile; ``{"measurements": [...]}`` with their ratios."""
    options = _options(inputs, (inputs["workload"],))
    measured = _apart(options) if inputs["apart"] else run_bench(options).measurements
    return {"measurements": [{**dataclasses.asdict(each), "ratio": each.ratio} for each in measured]}


def _options(inputs: Plain, workloads: tuple[str, ...]) -> BenchOptions:
    return BenchOptions(
        sizes=(inputs["size"],),
        profiles=tuple(inputs["profiles"]),
        workloads=workloads,
        shape=Shape(**inputs["shape"]),
        repetitions=inputs["rounds"],
        threads=inputs["threads"],
        device=inputs["device"],
        dtype=inputs["dtype"],
    )


def _apart(options: BenchOptions) -> list[Measurement]:
    """Time the contenders one after another, each alone in memory.

    The benchmark holds all of them at once and alternates, which a large model does not allow. What changes on the
    machine between two contenders is then in the ratio.
    """
    (size,), (workload,) = options.sizes, options.workloads
    policies: tuple[WaitPolicy, ...] = ("default", "passive")
    alone = {policy: _alone(options, None, policy) for policy in policies}
    policy = min(policies, key=lambda each: statistics.median(reply["seconds"] for reply in alone[each]))
    measured = []
    for text in options.profiles:
        profile = parse_profile(text)
        replies = _alone(options, profile, "passive")
        measured.append(
            Measurement(
                size=size,
                profile=profile.name,
                workload=workload,
                tokens=WORKLOADS[workload].tokens(options.shape),
                plain_policy=policy,
                plain_seconds=[reply["seconds"] for reply in alone[policy]],
                seconds=[reply["seconds"] for reply in replies],
                calls=replies[-1]["calls"],
                bytes=replies[-1]["bytes"],
            )
        )
    return measured


def _alone(options: BenchOptions, profile: Profile | None, policy: WaitPolicy) -> list[Plain]:
    """Replies of the counted rounds of one contender, which ends before this returns."""
    (size,), (workload,) = options.sizes, options.workloads
    threads = options.threads or torch.get_num_threads()
    spec = ContenderSpec(size, options.shape, profile, threads, options.device, options.dtype)
    label = f"{size} {'plain' if profile is None else profile.name}"
    with ContenderProcess(spec, label=label, wait_policy=policy) as contender:
        contender.ask("load", adapter=WORKLOADS[workload].adapter)
        replies = [contender.ask("run", workload=workload) for _ in range(WARM_UPS + options.repetitions)]
    return replies[WARM_UPS:]
