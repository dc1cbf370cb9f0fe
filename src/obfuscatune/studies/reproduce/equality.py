"""Is a protected model the plain one, with its worker on this device? Logits, LoRA gradients, AdamW, greedy tokens.

The yardstick is the plain model in the same dtype on the same device: what it is off the plain one in float64,
protection may be off four times. The bundled model, LoRA on all its layers, both factors random, rows of
unequal length.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.profiles import PROFILES, Profile
from obfuscatune.studies.bench.run import parse_profile
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.bundled.records import company_records
from obfuscatune.training.encoding import IGNORED_LABEL
from obfuscatune.training.loading import load_config, load_model, load_tokenizer

Row = dict[str, Any]
Factors = dict[str, Tensor]

# All that have one worker, and placements of LoRA that no named profile has. `shared` needs three, and is not float.
CHECKED = (
    *(name for name, profile in PROFILES.items() if profile.remote and not profile.shares),
    *("balanced+lora_placement=split", "paper+lora_placement=enclave"),
)
TIMES_PLAIN = 4.0
# Where plain happens to be exact; of largest entries, relative.
FLOOR = {"float32": 1e-5, "bfloat16": 1e-3}
GREATEST = 0.2  # a limit beyond it would pass anything: then the yardstick itself is broken
LOGITS, GRADIENTS, LOSSES, TOKENS = "logits", "LoRA gradients", "losses of AdamW", "greedy tokens that differ"
OK, FAILED, NOT_JUDGED = "ok", "FAILED", "not judged"
_RATE = 100.0  # of the SGD step whose change is the gradient; so large that the factors' own rounding is nothing
_ADAMW_STEPS, _ADAMW_RATE = 5, 1e-3
_DECAY = {"adamw": 0.01, "sgd": 0.0}
_NEW_TOKENS = 12
_SEED = 0


def check(profiles: Sequence[str], *, dtype: str, device: str) -> Iterator[Row]:
    """Compare profiles; a row for each quantity of each: ``error``, ``plain``, ``limit`` and ``verdict``.

    Ill-conditioned keys lose digits, which is what they are there to show: under `naive` nothing is judged.
    """
    truth, plain = measure(_Exact()), measure(_Plain(dtype, device))
    yardsticks = {quantity: worst(plain[quantity], truth[quantity]) for quantity in (LOGITS, GRADIENTS, LOSSES)}
    for text in profiles:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            profile = parse_profile(text)
        expected = truth
        if profile.lora_placement == "worker":
            # AdamW in keyed coordinates is another curve than in plain ones: the worker on the CPU is the reference.
            expected = {**truth, LOSSES: losses(_Protected(profile, dtype, "cpu"))}
        found = measure(_Protected(profile, dtype, device))
        judged = profile.keys != "gaussian"
        what = {"profile": profile.name, "dtype": dtype, "device": device}
        for quantity, yardstick in yardsticks.items():
            limit = min(TIMES_PLAIN * yardstick + FLOOR[dtype], GREATEST)
            error = worst(found[quantity], expected[quantity])
            yield {**what, **_row(quantity, error, yardstick, limit, judged=judged)}
        # Two likeliest tokens may be closer than the rounding of a half dtype.
        differing = float((found[TOKENS]["tokens"] != plain[TOKENS]["tokens"]).sum())
        yield {**what, **_row(TOKENS, differing, 0.0, 0.0, judged=judged and dtype == "float32")}


def _row(quantity: str, error: float, plain: float, limit: float, *, judged: bool) -> Row:
    verdict = NOT_JUDGED if not judged else OK if error <= limit else FAILED  # NaN fails
    return {"quantity": quantity, "error": error, "plain": plain, "limit": limit, "verdict": verdict}


class _Subject:
    """A model to measure, fresh each time: its own optimizer of LoRA, and the device of its inputs."""

    device = "cpu"

    def open(self) -> AbstractContextManager[Any]:
        raise NotImplementedError

    def optimizer(self, opened: Any, kind: str, lr: float) -> torch.optim.Optimizer:
        trained = [p for p in opened.parameters() if p.requires_grad]
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        return kinds[kind](trained, lr=lr, weight_decay=_DECAY[kind])

    def model(self, opened: Any) -> Any:
        return opened


class _Exact(_Subject):
    def open(self) -> AbstractContextManager[Any]:
        return nullcontext(adapted("float64"))


class _Plain(_Subject):
    def __init__(self, dtype: str, device: str) -> None:
        self._dtype, self.device = dtype, device

    def open(self) -> AbstractContextManager[Any]:
        return nullcontext(adapted(self._dtype).to(self.device))


class _Protected(_Subject):
    """Inputs are on the CPU, where the enclave is; ``worker`` is the worker's device."""

    def __init__(self, profile: Profile, dtype: str, worker: str) -> None:
        self._profile, self._dtype = profile, dtype
        self._worker = None if worker == "cpu" else worker

    def open(self) -> AbstractContextManager[Protected]:
        model = adapted(self._dtype)
        return protect(model, profile=self._profile, device=self._worker, insecure_test_seed=_SEED)

    def optimizer(self, opened: Protected, kind: str, lr: float) -> torch.optim.Optimizer:
        return opened.create_optimizer(kind, lr=lr, weight_decay=_DECAY[kind])

    def model(self, opened: Protected) -> Any:
        return opened.model


def adapted(dtype: str) -> Any:
    """Return the bundled model under LoRA, both factors random, the same values in every dtype."""
    base = load_model(str(model_directory()), dtype)
    options: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, **options)).eval()
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
            if dtype == "float64":
                parameter.data = parameter.data.double()
    return model


def measure(subject: _Subject) -> dict[str, Factors]:
    """Return all quantities of a subject, each as tensors by name."""
    with subject.open() as opened:
        # The step of the gradients changes the model, so they come last.
        found = {quantity: of(subject, opened) for quantity, of in ((LOGITS, logits), (TOKENS, greedy))}
        found[GRADIENTS] = gradients(subject, opened)
    return {**found, LOSSES: losses(subject)}


def logits(subject: _Subject, opened: Any) -> Factors:
    """Logits where the rows are not padding; they are padded on the right."""
    batch = rows_of_records("right")
    with torch.no_grad():
        found = subject.model(opened)(**_to(batch, subject.device, labels=False), use_cache=False).logits
    return {"logits": found.cpu().double()[batch["attention_mask"].bool()]}


def gradients(subject: _Subject, opened: Any) -> Factors:
    """The change of every LoRA factor in one step of SGD: its gradient, wherever factor and optimizer are."""
    model = subject.model(opened)
    before = _factors(model)
    optimizer = subject.optimizer(opened, "sgd", _RATE)
    model(**_to(rows_of_records("right"), subject.device), use_cache=False).loss.backward()
    optimizer.step()
    return {name: after - before[name] for name, after in _factors(model).items()}


def losses(subject: _Subject) -> Factors:
    """The losses of a few steps of AdamW, of a fresh model."""
    found = []
    with subject.open() as opened:
        model = subject.model(opened)
        optimizer = subject.optimizer(opened, "adamw", _ADAMW_RATE)
        for _ in range(_ADAMW_STEPS):
            optimizer.zero_grad()
            loss = model(**_to(rows_of_records("right"), subject.device), use_cache=False).loss
            found.append(loss.item())
            loss.backward()
            optimizer.step()
    return {"losses": torch.tensor(found, dtype=torch.float64)}


def greedy(subject: _Subject, opened: Any) -> Factors:
    """Greedy tokens after prompts padded on the left, by a KV cache."""
    batch = _to(rows_of_records("left"), subject.device, labels=False)
    options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return {"tokens": subject.model(opened).generate(**batch, **options).cpu()}


def rows_of_records(side: str) -> dict[str, Tensor]:
    """Return four rows of unequal length, padded on one side: ids, mask, labels."""
    name = str(model_directory())
    tokenizer = load_tokenizer(name, load_config(name))
    tokenizer.padding_side = side
    rows = [row["prompt"] + row["completion"] for row in company_records(_SEED, 16)[0][:4]]
    batch = tokenizer(rows, return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED_LABEL)}


def worst(found: Factors, truth: Factors) -> float:
    """The largest difference, relative to the largest entry of the tensor it is in; over tensors of the same names."""
    if found.keys() != truth.keys():
        return float("nan")
    errors = [(found[name] - truth[name]).abs().max() / truth[name].abs().max().clamp(min=1e-30) for name in truth]
    return float(torch.stack(errors).max())  # not Python's max, which passes over NaN


def _factors(model: Any) -> Factors:
    # From the state, because reading it fetches what the worker holds.
    return {name: t.detach().cpu().double().clone() for name, t in model.state_dict().items() if "lora_" in name}


def _to(batch: dict[str, Tensor], device: str, *, labels: bool = True) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items() if labels or name != "labels"}
