"""Tiny random GPT-2 models with nothing trivial in them, variants to protect them with, and how two are compared."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from obfuscatune.profiles import resolve

TARGETS = ("c_attn", "c_proj", "c_fc")
VOCABULARY = 37
END = 0

# Name of a variant -> profile and switches. Blocks of 4 make Monarch keys differ from one dense block at these widths.
MONARCH = {"key_block": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "naive": ("naive", {}),
    "paper": ("paper", {}),
    "paper, lora enclave": ("paper", {"lora_placement": "enclave"}),
    "paper, lora split": ("paper", {"lora_placement": "split"}),
    "balanced": ("balanced", MONARCH),
    "balanced, one block of 64": ("balanced", {}),
    "balanced, mlp enclave": ("balanced", {**MONARCH, "mlp": "enclave"}),
    "balanced, attention enclave": ("balanced", {**MONARCH, "attention": "enclave"}),
    "balanced, both enclave": ("balanced", {**MONARCH, "attention": "enclave", "mlp": "enclave"}),
    "balanced, both enclave, lora split": (
        "balanced",
        {**MONARCH, "attention": "enclave", "mlp": "enclave", "lora_placement": "split"},
    ),
    "balanced, first block inside": ("balanced", {**MONARCH, "enclave_blocks": 1}),
    "balanced, both enclave, verified": (
        "balanced",
        {**MONARCH, "attention": "enclave", "mlp": "enclave", "verify": True},
    ),
    "balanced, lora split": ("balanced", {**MONARCH, "lora_placement": "split"}),
    "balanced, lora worker": ("balanced", {**MONARCH, "lora_placement": "worker", "fold_norms": False}),
    "balanced, haar": ("balanced", {"keys": "haar"}),
    "balanced, conditioned": (
        "balanced",
        {"keys": "conditioned", "inner_keys": "conditioned", "kappa": 8.0, "mlp": "enclave"},
    ),
    "balanced, no head keys": ("balanced", {**MONARCH, "head_keys": False}),
    "balanced, no permutation": ("balanced", {**MONARCH, "permute_mlp": False}),
    "balanced, norms not folded": ("balanced", {**MONARCH, "fold_norms": False}),
    "strict": ("strict", MONARCH),
    "strict, norms folded": ("strict", {"fold_norms": True}),
    "strict, first block inside": ("strict", {**MONARCH, "enclave_blocks": 1}),
    "stream": ("stream", MONARCH),
    "stream, haar, no head keys": ("stream", {"keys": "haar", "head_keys": False}),
    "stream, no permutation": ("stream", {**MONARCH, "permute_mlp": False}),
    "stream, first block inside": ("stream", {**MONARCH, "enclave_blocks": 1}),
    "enclave": ("enclave", {}),
}


def gpt2(*, dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """A model without dropout, with random weights, biases and norms; some gains are tiny or negative."""
    generator = torch.Generator().manual_seed(seed)
    defaults = {
        "vocab_size": VOCABULARY,
        "n_positions": 48,
        "n_embd": 15,
        "n_head": 3,
        "n_layer": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    model = GPT2LMHeadModel(GPT2Config(**{**defaults, **config})).to(dtype).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if ".ln_" in name and name.endswith("weight"):
            gain = 1 + 0.5 * noise
            gain[0], gain[1] = 1e-3, -gain[1].abs()
            parameter.data.copy_(gain)
        else:
            parameter.data.copy_(0.4 * noise)
    return model


def with_lora(model: GPT2LMHeadModel, *, seed: int = 1, targets: tuple[str, ...] = TARGETS, **options: Any) -> Any:
    """A PEFT model of rank 3 around the model, both factors random."""
    dtype = next(model.parameters()).dtype
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(targets), "fan_in_fan_out": True, **options})
    peft_model = get_peft_model(model, config).to(dtype).eval()
    randomize_lora(peft_model, seed=seed)
    return peft_model


def randomize_lora(model: nn.Module, *, seed: int, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def twins(*, lora: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[Any, Any]:
    """Two equal models: one to protect, one to compare it with."""
    model: Any = gpt2(dtype=dtype, seed=seed, **config)
    if lora:
        model = with_lora(model)
    return copy.deepcopy(model), model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids without the end token."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def cotangent(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What the logits are multiplied with before they are summed: a loss whose gradients have no structure."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(dtype)


def scalar(logits: Tensor) -> Tensor:
    return (logits * cotangent(logits.shape, logits.dtype)).sum()


def train_everything_that_stays(model: nn.Module, profile: str, switches: dict[str, Any]) -> None:
    """Let embeddings, head and norms require gradients too, beside LoRA; not the norms that are folded."""
    resolved = resolve(profile, **switches)
    for name, parameter in model.named_parameters():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        leaves = resolved.remote and resolved.fold_norms and block is not None and block >= resolved.enclave_blocks
        if not any(f".{target}." in name for target in TARGETS) and not leaves:
            parameter.requires_grad_(True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "anchor" not in name}


def expected_gradients(reference: nn.Module, profile: str, switches: dict[str, Any]) -> dict[str, Tensor]:
    """The reference's gradients without those of folded norms and of LoRA that is trained on the worker."""
    resolved = resolve(profile, **switches)
    found = gradients(reference)
    for name in list(found):
        block = int(name.split(".h.")[1].split(".")[0]) if ".h." in name else None
        keyed = resolved.remote and block is not None and block >= resolved.enclave_blocks
        folded = resolved.fold_norms and (".ln_1." in name or ".ln_2." in name)
        held = resolved.lora_placement == "worker" and "lora_" in name
        if keyed and (folded or held):
            del found[name]
    return found


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry expected."""
    difference = (got.double() - expected.double()).abs().max().item()
    return difference / max(expected.abs().max().item(), torch.finfo(torch.float32).tiny)


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest `error` over tensors of the same names."""
    assert set(got) == set(expected)
    return max((error(got[name], expected[name]) for name in expected), default=0.0)
