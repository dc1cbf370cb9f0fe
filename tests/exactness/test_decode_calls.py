"""What a decode step costs in Python, counted and not timed: calls of the enclave's own functions in each block."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import obfuscatune

from .models import gpt2, tokens, with_lora

ENCLAVE = str(Path(obfuscatune.__file__).parent / "enclave")
GUARDS = ("guard.py", "hooks.py", "inputs.py", "standing.py")
# In each block, of attention and MLP with LoRA on all four layers; measured 305, some 40 of guards. It was 435 and 198
# where each slot was looked at twice, and each module by a loop over its kinds of hooks, and 265 before what comes back
# was looked at for numbers that are not finite.
MOST, MOST_OF_GUARDS = 330, 48


def calls_of_a_step(protect: Any, blocks: int) -> tuple[int, int]:
    """Calls within the enclave's code at one step that goes on from a cache: all of them, and those of the guards."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ENCLAVE):
            found.append(Path(frame.f_code.co_filename).name)

    with protect(with_lora(gpt2(n_layer=blocks)).eval(), profile="balanced") as protected, torch.inference_mode():
        model, ids = protected.model, tokens(2, 5)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache = model(input_ids=ids[:, :1], past_key_values=cache).past_key_values  # sends what is sent once
        sys.setprofile(note)
        try:
            model(input_ids=ids[:, :1], past_key_values=cache)
        finally:
            sys.setprofile(None)
    return len(found), sum(name in GUARDS for name in found)


def test_the_guards_are_a_small_part_of_a_decode_step(protect: Any) -> None:
    few, more = calls_of_a_step(protect, 1), calls_of_a_step(protect, 3)
    each, guards = ((b - a) / 2 for a, b in zip(few, more, strict=True))
    assert 50 < each < MOST
    assert 10 < guards < MOST_OF_GUARDS
