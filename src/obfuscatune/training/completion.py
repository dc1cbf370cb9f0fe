"""Completing prompts with a protected model: one batch, by the stock ``generate``."""

from collections.abc import Sequence
from typing import Any

import torch

from obfuscatune.errors import UsageError


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[str, str]], *, max_new_tokens: int, **generation: Any
) -> list[str]:
    """Return the completions of one batch of ``(where, prompt)`` pairs; ``where`` names a prompt in errors.

    Secrecy: prompts and completions are the data owner's, and stay in the enclave.

    Args:
        model, tokenizer: of each other; the tokenizer pads on the left.
        max_new_tokens: longest completion. generation: further arguments of ``generate``; ``None`` leaves one out.

    Raises:
        UsageError: a prompt that leaves no room for the completion.
    """
    batch = tokenizer([prompt for _, prompt in prompts], return_tensors="pt", padding=True)
    positions = getattr(model.config, "max_position_embeddings", None)
    for (where, _), mask in zip(prompts, batch["attention_mask"], strict=True):
        tokens = int(mask.sum())
        if positions is not None and tokens + max_new_tokens > positions:
            got = f"{tokens} tokens and {max_new_tokens} new ones"
            raise UsageError("prompt is too long for the model", got=got, expected=f"at most {positions}", where=where)
    with torch.inference_mode():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **{name: value for name, value in generation.items() if value is not None},
        )
    completions: list[str] = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions
