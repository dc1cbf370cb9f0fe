"""The model that is served: protected once, with its adapters by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.errors import UsageError
from obfuscatune.profiles import Profile
from obfuscatune.training.chat import check_template
from obfuscatune.training.completion import named_refusals, stop_tokens
from obfuscatune.training.loading import load, load_adapters, load_config, load_tokenizer

BASE = "base"
# What each request decides; a length of the model's own would bound a round, which is a part of a completion.
_OF_REQUESTS = ("temperature", "top_p", "top_k", "max_length")
_TOP_K = 50  # of stock sampling, where the model's settings name none
# What would choose otherwise than requests say, or anew in each round, or make several tokens in one step, with the
# value that changes nothing.
_REFUSED = {
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "watermarking_config": None,
    "guidance_scale": 1.0,
}


# Where transformers' handlers look for a family's way to mark thoughts and calls of tools: texts are handed on as they
# are.
NO_FAMILY = SimpleNamespace(model_type="")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How tokens are chosen where a request does not say: by the model's own settings of generation."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class ServedModel:
    """A protected model, its tokenizer, and its adapters; used by one thread at a time.

    Attributes:
        protected: what ends with it. model: of transformers or PEFT. tokenizer: pads on the left. ends: tokens that end
            a completion. defaults: of requests. names: ``base`` and the adapters. positions: of prompt and completion
            together, None where the model has no limit.
    """

    config, generation_config = NO_FAMILY, None

    def __init__(self, protected: Protected, tokenizer: Any, adapters: Mapping[str, str], defaults: Defaults) -> None:
        self.protected, self.tokenizer = protected, tokenizer
        self.model: Any = protected.model
        self.names = (BASE, *adapters)
        self._has_adapters = bool(adapters)
        self.ends = frozenset(stop_tokens(self.model, tokenizer))
        self.positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        self.defaults = defaults

    @property
    def has_ended(self) -> bool:
        """Whether too many sessions with workers have ended: after a fault no later reply is used."""
        return self.protected.has_ended

    def give_up(self) -> bool:
        """End the sessions, for whoever waits for a worker in another thread; returns whether there are any."""
        for link in self.protected.links:
            link.session.close()
        return bool(self.protected.links)

    def try_settings(self) -> None:
        """Make one token, so that settings which transformers refuses are found before anybody asks.

        Raises:
            UsageError: those of the model's generation_config.json.
        """
        ids = torch.tensor([[self.tokenizer.pad_token_id]])
        ends = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": list(self.ends) or None}
        with torch.inference_mode(), self.using(self.names[-1]), named_refusals():
            self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **ends)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Compute with the adapter of that name, or with none."""
        if self._has_adapters and name != BASE:
            self.model.set_adapter(name)
        with self.model.disable_adapter() if self._has_adapters and name == BASE else nullcontext():
            yield


@contextmanager
def serve_model(
    name: str, dtype: str, adapters: Mapping[str, str], protection: Mapping[str, Any], chat_template: str | None
) -> Iterator[ServedModel]:
    """Load and protect a model with its adapters; its sessions end with the context.

    Args:
        name, dtype: as of `load`. adapters: name to directory. protection: arguments of `protect`.
        chat_template: of Jinja, in place of the tokenizer's own.

    Raises:
        UsageError: as of `load`, `protect` and `ServedModel.try_settings`; names of adapters that cannot be used, or
            several of them in a profile that has the adapter on the worker.
    """
    profile: Profile = protection["profile"]
    if profile.remote and profile.lora_placement == "worker" and len(adapters) > 1:
        hint = "serve one adapter, or take another profile"
        raise UsageError(f"profile {profile.name} keeps one adapter on the worker", got=len(adapters), hint=hint)
    tokenizer = load_tokenizer(name, load_config(name))
    tokenizer.padding_side = "left"  # completions continue the last position of every row
    if not tokenizer.is_fast:
        raise UsageError("tokenizer cannot stream text", got=type(tokenizer).__name__, expected="a fast tokenizer")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    check_template(tokenizer)
    model = load(name, dtype, profile)
    defaults = _take_defaults(model)  # refused before the work of keying
    if adapters:
        model = load_adapters(model, adapters)
    with protect(model.eval(), **protection, progress=True) as protected:
        served = ServedModel(protected, tokenizer, adapters, defaults)
        served.try_settings()
        yield served


def _take_defaults(model: Any) -> Defaults:
    """Return the model's own way of sampling, and leave it decoding greedily.

    Raises:
        UsageError: its settings ask for what requests that share a batch, round by round, cannot have.
    """
    own = model.generation_config
    for name, idle in _REFUSED.items():
        if (value := getattr(own, name, None)) is not None and value != idle:
            hint = "serve decodes requests together, in rounds; remove it to serve the model without it"
            raise UsageError(f"{name} in the model's generation_config.json", got=ascii(value)[:60], hint=hint)
    defaults = Defaults()
    if own.do_sample:
        defaults = Defaults(
            temperature=1.0 if own.temperature is None else own.temperature,
            top_p=1.0 if own.top_p is None else own.top_p,
            top_k=_TOP_K if own.top_k is None else own.top_k,
        )
    for name in _OF_REQUESTS:
        setattr(own, name, None)
    own.do_sample, own.num_beams, own.num_return_sequences = False, 1, 1
    return defaults
