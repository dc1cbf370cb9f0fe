"""The benchmark: protected models against Hugging Face and PEFT in the clear, in the same run.

Every contender is loaded in a process of its own and idles while another one runs. A round runs each of them once, so
that what a round's ratio compares was measured within seconds; the result is the median over rounds. Plain takes part
under two waiting policies of its threads, and the faster one is the reference.
"""

import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from obfuscatune.errors import UsageError
from obfuscatune.profiles import PROFILES, SWITCHES, Profile, resolve
from obfuscatune.studies.bench.contender import ContenderSpec
from obfuscatune.studies.bench.link import LinkKind, split_link
from obfuscatune.studies.bench.process import ContenderProcess, WaitPolicy
from obfuscatune.studies.bench.shapes import is_shape, known_names, layers_of, shape_config
from obfuscatune.studies.bench.synthetic import write_random_model
from obfuscatune.studies.bench.workloads import DTYPES, PROMPT_TOKENS, SIZES, WORKLOADS, Shape
from obfuscatune.studies.device import check_device

KEY = "key"  # the workload that only protects: seconds and peak memory, nothing timed against plain
MEMORY = "memory"  # protects, and then prefills and decodes once, for the peaks; nothing timed either
_ONCE = ("prefill", "decode")
WARM_UPS = 1  # the first repetition makes optimizer states and matrix kernels, and pushes LoRA factors
PLAIN_POLICIES: tuple[WaitPolicy, ...] = ("default", "passive")

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure, checked as a whole.

    Attributes:
        sizes: names of shapes, or directories of models. workloads: names.
        profiles: ``NAME`` or ``NAME+switch=value+...``, as reports write them; ``...@tcp`` and ``...@tls`` for a worker
            that listens on loopback instead of a spawned one, ``...@socket`` for one that shares no memory.
        shape: of the workloads. repetitions: rounds that count. threads: of each process, torch's default otherwise.
        device: of plain and of the workers. dtype: of the weights.
    """

    sizes: Sequence[str] = ("small",)
    profiles: Sequence[str] = ("paper", "balanced", "strict")
    workloads: Sequence[str] = tuple(WORKLOADS)
    shape: Shape = field(default_factory=Shape)
    repetitions: int = 5
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        configs: dict[str, Any] = {}
        faults = []
        for name in self.sizes:
            if not is_shape(name) and not Path(name).is_dir():
                faults.append(f"--size {name}: not one of {', '.join(known_names())}, nor a model's directory")
                continue
            configs[name] = shape_config(name)
        known = (*WORKLOADS, KEY, MEMORY)
        faults += [f"--workload {name}: not one of {', '.join(known)}" for name in self.workloads if name not in known]
        for option, names in (("size", self.sizes), ("profile", self.profiles), ("workload", self.workloads)):
            if not names or len(set(names)) != len(names):
                faults.append(f"--{option}: none, or one of them twice")
        if self.dtype not in DTYPES:
            faults.append(f"--dtype {self.dtype}: not one of {', '.join(DTYPES)}")
        counts = {"repetitions": self.repetitions, "batch_size": self.shape.batch_size}
        counts |= {"seq_length": self.shape.seq_length, "new_tokens": self.shape.new_tokens}
        if self.threads is not None:
            counts["threads"] = self.threads
        faults += [f"--{name} {value}: not at least 1" for name, value in counts.items() if value < 1]
        if self.threads is not None and self.threads > 4096:
            faults.append(f"--threads {self.threads}: more than 4096")
        longest = max(self.shape.seq_length, PROMPT_TOKENS + self.shape.new_tokens)
        for name, config in configs.items():
            positions = getattr(config, "max_position_embeddings", None)
            if positions is not None and positions < longest:
                faults.append(f"--size {name}: holds {positions} tokens, not the {longest} asked for")
        if faults:
            raise UsageError("options of the benchmark", got="; ".join(faults))
        check_device(self.device)
        for text in self.profiles:
            parse_profile(split_link(text)[0])


def parse_profile(text: str) -> Profile:
    """Return the profile that ``NAME`` or ``NAME+switch=value+...`` names. Raises UsageError for an unknown one."""
    name, *changes = text.split("+")
    switches: dict[str, object] = {}
    for change in changes:
        switch, separator, value = change.partition("=")
        if not separator or switch not in SWITCHES:
            expected = f"switch=value, with one of {', '.join(SWITCHES)}"
            raise UsageError("unknown profile switch", got=change, expected=expected, where=f"--profile {text}")
        kind = type(getattr(PROFILES["plain"], switch))
        try:
            switches[switch] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UsageError(
                f"value of {switch}", got=value, expected=kind.__name__, where=f"--profile {text}"
            ) from None
    return resolve(name, **switches)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One workload of one size under one profile: seconds of each round, calls and bytes of one."""

    size: str
    profile: str
    workload: str
    tokens: int
    plain_policy: WaitPolicy
    plain_seconds: list[float]
    seconds: list[float]
    calls: int
    bytes: int

    @property
    def ratio(self) -> float:
        """Median over rounds of protected over plain."""
        return statistics.median(ours / plain for ours, plain in zip(self.seconds, self.plain_seconds, strict=True))

    @property
    def tokens_per_second(self) -> float:
        """Of the median round."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def plain_tokens_per_second(self) -> float:
        """Of plain's median round."""
        return self.tokens / statistics.median(self.plain_seconds)

    @property
    def calls_per_token_layer(self) -> float:
        """Requests to the worker, over tokens and layers."""
        return self.calls / (self.tokens * layers_of(self.size))

    @property
    def bytes_per_token_layer(self) -> float:
        """Bytes across the boundary, both directions, framing included, over tokens and layers."""
        return self.bytes / (self.tokens * layers_of(self.size))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What protecting one size under one profile takes; peaks over all its workloads, in bytes."""

    size: str
    profile: str
    obfuscation_seconds: float
    enclave_share: float
    enclave_peak_bytes: int
    worker_peak_bytes: int | None
    plain_peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All that was measured."""

    measurements: list[Measurement]
    footprints: list[Footprint]


def count_steps(options: BenchOptions) -> int:
    """How often `run_bench` calls ``step``: once for each load and each repetition of a contender."""
    timed = _timed(options)
    contenders = len(options.profiles) + (len(PLAIN_POLICIES) if timed else 0)
    loads = len(_stages(timed))
    untimed = len(options.profiles) * len(_untimed(options))
    return len(options.sizes) * (contenders * (loads + len(timed) * (WARM_UPS + options.repetitions)) + untimed)


def run_bench(options: BenchOptions, step: Step = lambda _: None) -> BenchResult:
    """Measure all sizes, one after another.

    Args:
        step: called before each load and each repetition, with what it is.

    Raises:
        ObfuscatuneError: a contender failed or was killed; all of them are ended then.
    """
    result = BenchResult([], [])
    for size in options.sizes:
        with ExitStack() as stack:
            directory = None if size in SIZES else _write(stack, options, size)
            plain, protected = _start(stack, options, size, directory)
            _measure_size(options, size, plain, protected, result, step)
    return result


def _timed(options: BenchOptions) -> list[str]:
    """The timed workloads, those without an adapter first: the model is loaded once for each of the two groups."""
    return sorted((name for name in options.workloads if name in WORKLOADS), key=lambda name: WORKLOADS[name].adapter)


def _untimed(options: BenchOptions) -> tuple[str, ...]:
    """What each protected contender does once after the first load, for its peak memory."""
    return _ONCE if MEMORY in options.workloads else ()


def _write(stack: ExitStack, options: BenchOptions, size: str) -> str:
    """Write a model of that shape with random weights, for as long as it is measured."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="obfuscatune-bench-"))
    write_random_model(shape_config(size), options.dtype, Path(directory))
    return directory


def _stages(timed: list[str]) -> list[tuple[bool, list[str]]]:
    return [(a, list(group)) for a, group in groupby(timed, key=lambda n: WORKLOADS[n].adapter)] or [(False, [])]


def _start(
    stack: ExitStack, options: BenchOptions, size: str, directory: str | None
) -> tuple[list[ContenderProcess], list[ContenderProcess]]:
    threads = options.threads or torch.get_num_threads()

    def start(profile: Profile | None, policy: WaitPolicy, link: LinkKind = "spawn") -> ContenderProcess:
        spec = ContenderSpec(size, options.shape, profile, threads, options.device, options.dtype, directory, link)
        label = f"{size} {spec.name}" + (f" ({policy})" if profile is None else "")
        return stack.enter_context(ContenderProcess(spec, label=label, wait_policy=policy))

    policies = PLAIN_POLICIES if _timed(options) else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shown when the options were checked
        pairs = [split_link(text) for text in options.profiles]
        profiles = [(parse_profile(text), link) for text, link in pairs]
    return (
        [start(None, policy) for policy in policies],
        [start(profile, "passive", link) for profile, link in profiles],
    )


def _measure_size(
    options: BenchOptions,
    size: str,
    plain: list[ContenderProcess],
    protected: list[ContenderProcess],
    result: BenchResult,
    step: Step,
) -> None:
    contenders = [*plain, *protected]
    obfuscation: dict[ContenderProcess, float] = {}
    for number, (adapter, workloads) in enumerate(_stages(_timed(options))):
        for contender in contenders:
            step(f"{contender.label}: load")
            seconds = contender.ask("load", adapter=adapter)["obfuscation_seconds"]
            obfuscation.setdefault(contender, seconds)
        for contender in protected if number == 0 else ():
            for workload in _untimed(options):
                step(f"{contender.label}: {workload}, untimed")
                contender.ask("run", workload=workload)
        for workload in workloads:
            rounds = _alternate(contenders, workload, options.repetitions, step)
            tokens = WORKLOADS[workload].tokens(options.shape)
            reference = min(plain, key=lambda contender: statistics.median(rounds[contender].seconds))
            for contender in protected:
                ours = rounds[contender]
                result.measurements.append(
                    Measurement(
                        size=size,
                        profile=contender.spec.name,
                        workload=workload,
                        tokens=tokens,
                        plain_policy=reference.wait_policy,
                        plain_seconds=rounds[reference].seconds,
                        seconds=ours.seconds,
                        calls=ours.calls,
                        bytes=ours.bytes,
                    )
                )
    plain_peaks = [contender.ask("report")["enclave_peak_bytes"] for contender in plain]
    for contender in protected:
        report = contender.ask("report")
        plain_peak = max(plain_peaks, default=None)
        result.footprints.append(
            Footprint(size, contender.spec.name, obfuscation[contender], **report, plain_peak_bytes=plain_peak)
        )


@dataclass(slots=True)
class _Rounds:
    """Seconds of each round of one contender, calls and bytes of the last one."""

    seconds: list[float]
    calls: int = 0
    bytes: int = 0


def _alternate(
    contenders: list[ContenderProcess], workload: str, repetitions: int, step: Step
) -> dict[ContenderProcess, _Rounds]:
    rounds = {contender: _Rounds([]) for contender in contenders}
    for index in range(WARM_UPS + repetitions):
        for contender in contenders:
            step(f"{contender.label}: {workload}")
            reply = contender.ask("run", workload=workload)
            if index >= WARM_UPS:
                rounds[contender].seconds.append(reply["seconds"])
                rounds[contender].calls, rounds[contender].bytes = reply["calls"], reply["bytes"]
    return rounds
