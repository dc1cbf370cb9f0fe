"""What the benchmark runs: models of true sizes with random weights, and the workloads timed on them.

A workload is the same code for a plain and for a protected model. Data and weights come from fixed seeds: speed depends
on neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families import layer_names

PROMPT_TOKENS = 16  # of the decode workload: short, so that the cached steps are what is timed
LORA_R = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Width, heads, layers, vocabulary and longest sequence of a GPT-2."""

    width: int
    heads: int
    layers: int
    vocabulary: int = 50257
    positions: int = 1024


SIZES = {
    "tiny": Size(32, 2, 2, vocabulary=101, positions=128),  # for trying the benchmark itself
    "small": Size(768, 12, 12),
    "medium": Size(1024, 16, 24),
    "large": Size(1280, 20, 36),
    "xl": Size(1600, 25, 48),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of a batch, tokens of a row (prefill and LoRA step), new tokens of a row (decode)."""

    batch_size: int = 4
    seq_length: int = 128
    new_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model and how to get the optimizer of what is trained in it. ``device``: where its inputs go."""

    model: Any
    create_optimizer: Callable[[], torch.optim.Optimizer]
    device: torch.device


Repetition = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to time.

    Attributes:
        adapter: whether the model carries a LoRA adapter. Without training it does not: an adapter is merged into the
            weights before they are served, in the clear or keyed.
        tokens: tokens that one repetition works on.
        prepare: makes the function that does one repetition.
    """

    adapter: bool
    tokens: Callable[[Shape], int]
    prepare: Callable[[Subject, Shape], Repetition]


DTYPES = ("float32", "bfloat16")


def gpt2_config(size: Size) -> GPT2Config:
    """Return the configuration of a GPT-2 of that size, without dropout."""
    return GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.positions,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def build_model(size: Size, *, adapter: bool, dtype: str = "float32") -> Any:
    """Return a GPT-2 of that size in memory; with an adapter where asked."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(gpt2_config(size)).to(getattr(torch, dtype))
    return with_adapter(model) if adapter else model.eval()


def with_adapter(model: Any) -> Any:
    """Return the PEFT model in training mode, with LoRA (float32) on all large linear layers of each block."""
    fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    lora = LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules=layer_names(model), fan_in_fan_out=fan_in_fan_out)
    return get_peft_model(model, lora).train()


def _random_ids(subject: Subject, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vocabulary = subject.model.config.vocab_size
    return torch.randint(vocabulary, (rows, tokens), generator=generator).to(subject.device)


def _prefill(subject: Subject, shape: Shape) -> Repetition:
    """One forward that fills a KV cache; logits of the last position only."""
    ids = _random_ids(subject, shape.batch_size, shape.seq_length)

    def repeat() -> None:
        with torch.no_grad():
            subject.model(input_ids=ids, logits_to_keep=1)

    return repeat


def _decode(subject: Subject, shape: Shape) -> Repetition:
    """Greedy generation of a fixed number of tokens with a KV cache."""
    ids = _random_ids(subject, shape.batch_size, PROMPT_TOKENS)
    mask = torch.ones_like(ids)

    def repeat() -> None:
        subject.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=shape.new_tokens,
            max_new_tokens=shape.new_tokens,
            pad_token_id=0,
        )

    return repeat


def _lora_step(subject: Subject, shape: Shape) -> Repetition:
    """Forward with labels on all positions, backward, optimizer step."""
    ids = _random_ids(subject, shape.batch_size, shape.seq_length)
    optimizer = subject.create_optimizer()

    def repeat() -> None:
        subject.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeat


def _all_tokens(shape: Shape) -> int:
    return shape.batch_size * shape.seq_length


WORKLOADS = {
    "prefill": Workload(False, _all_tokens, _prefill),
    "decode": Workload(False, lambda shape: shape.batch_size * shape.new_tokens, _decode),
    "lora_step": Workload(True, _all_tokens, _lora_step),
}
