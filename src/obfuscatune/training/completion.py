"""Completing prompts with a protected model: one batch, by the stock ``generate``."""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.training.chat import prompt_tokens
from obfuscatune.training.data import Prompt
from obfuscatune.training.encoding import (
    check_embedded,
    check_known,
    positions_of,
    prompt_text_tokens,
    start_tokens,
    vocabulary_of,
)
from obfuscatune.training.finite import FiniteScores
from obfuscatune.training.quiet import Quiet

TOO_LONG = "prompt is too long for the model"


@dataclass(frozen=True)
class Completion:
    """One completion: its text, secret; tokens of its prompt, and its own but for the one that ended it.

    ``ended`` says that it ended by itself, and not at the longest.
    """

    text: str = field(repr=False)
    prompt_tokens: int
    tokens: int
    ended: bool


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[str, Prompt]], *, max_new_tokens: int, **generation: Any
) -> list[str]:
    """Return the texts of :func:`complete_counted`; everything else as there."""
    found = complete_counted(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **generation)
    return [completion.text for completion in found]


def complete_counted(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[str, Prompt]], *, max_new_tokens: int, **generation: Any
) -> list[Completion]:
    """Return the completions of one batch of ``(where, prompt)`` pairs; ``where`` names a prompt in errors.

    A completion stops at each of the tokens that the model's generation settings stop at, as stock ``generate`` does,
    and at the tokenizer's end-of-text token, which is what fine-tuning closes rows with.

    Secrecy: prompts and completions are the data owner's, and stay in the enclave.

    Args:
        model, tokenizer: of each other; the tokenizer pads on the left.
        max_new_tokens: longest completion. generation: further arguments of ``generate``; ``None`` leaves one out.

    Raises:
        NotFiniteError: the model's logits.
        UsageError, DataError: as :func:`prompt_ids`; settings of generation that transformers refuses.
    """
    ids = prompt_ids(model.config, tokenizer, prompts, max_new_tokens)
    ends = stop_tokens(model, tokenizer)
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.inference_mode(), named_refusals():
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends or None,
            return_dict_in_generate=False,  # the model's own settings may ask for these
            num_return_sequences=1,
            logits_processor=LogitsProcessorList([FiniteScores()]),
            **{name: value for name, value in generation.items() if value is not None},
        )
    found = []
    for prompt, row in zip(ids, output[:, batch["input_ids"].shape[1] :], strict=True):
        tokens = row.tolist()
        last = next((number for number, token in enumerate(tokens) if token in ends), None)
        with Quiet("the tokenizer fails on the completions", where=f"{prompts[0][0]} to {prompts[-1][0]}"):
            text: str = tokenizer.decode(row, skip_special_tokens=True)
        found.append(Completion(text, len(prompt), len(tokens) if last is None else last, last is not None))
    return found


@contextlib.contextmanager
def named_refusals() -> Iterator[None]:
    """Tell a refusal of stock ``generate`` by its class and place: its words may quote what it was given."""
    problem = None
    try:
        yield
    except ObfuscatuneError:
        raise
    except (ValueError, TypeError, ImportError, IndexError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        got = f"a {type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        hint = "look at the options, and at the model's generation_config.json: what does stock generate say to it"
        problem = UsageError("transformers does not generate with these settings", got=got, hint=hint)
    if problem is not None:
        raise problem


def prompt_ids(
    config: Any, tokenizer: Any, prompts: Sequence[tuple[str, Prompt]], max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of each prompt: of a text, or of messages in the chat template, up to the answer's first word.

    Raises:
        UsageError: a prompt that leaves no room for the completion, or messages without a chat template.
        DataError: messages that the chat template refuses, a text that the tokenizer does not know, or a token that
            the model has no embedding of.
    """
    positions, vocabulary = positions_of(config), vocabulary_of(config)
    start = len(start_tokens(tokenizer))
    found = []
    for where, prompt in prompts:
        if isinstance(prompt, str):
            with Quiet("the tokenizer fails on the prompt", where=where):
                ids = prompt_text_tokens(tokenizer, prompt)
            check_known(tokenizer, ids[start:], where)
        else:
            ids = prompt_tokens(tokenizer, prompt, where)
        check_embedded(ids, vocabulary, where)
        if positions is not None and len(ids) + max_new_tokens > positions:
            got = f"{len(ids)} tokens and {max_new_tokens} new ones"
            raise UsageError(TOO_LONG, got=got, expected=f"at most {positions}", where=where)
        found.append(ids)
    return found


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a completion, see :func:`complete`."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [*own] if isinstance(own, list | tuple) else [own]
    if not all(token is None or type(token) is int for token in found):
        raise UsageError(
            "the model's eos_token_id", expected="a number, or a list of them", where="generation_config.json"
        )
    return list(dict.fromkeys(int(token) for token in (*found, tokenizer.eos_token_id) if token is not None))
