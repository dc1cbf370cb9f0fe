"""The wire test: what the worker gets to know in two training steps and a generation, against all that is plain.

The worker knows what crossed and what it computes from it, so both are searched. Each profile has a table of what it
exposes: the test must find all of that, which is its control, and nothing else.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from .matching import AS_IT_IS, UP_TO_ORDER, search
from .recording import PROMPT, TEXT, Recording, record

Table = dict[str, str]

# Of `plain` this is only the least: it claims nothing. LoRA's low-rank numbers are keyed even there, by the rotation
# of the split.
PLAIN: Table = dict.fromkeys(
    [
        *("attn c_attn weight", "attn c_attn bias", "attn c_proj weight"),
        *("mlp c_fc weight", "mlp c_fc bias", "mlp c_proj weight"),
        *("ln_1 output", "ln_2 output", "q, k, v", "attention map", "heads' output"),
        *("MLP pre-activations", "MLP activations"),
        *("gradient of block input", "gradient of q, k, v", "gradient of heads' output"),
        *("gradient of MLP pre-activations", "gradient of MLP activations", "gradient of MLP output"),
    ],
    AS_IT_IS,
)
# Q, K and V come without their bias, which the enclave adds; so do the MLP's pre-activations. The factors next to what
# is not keyed are plain: B of q, k, v and of fc1, A of the two output layers; so are x A and its gradient.
PAPER: Table = {
    **dict.fromkeys(
        [
            *("q, k, v, without bias", "heads' output", "MLP pre-activations, without bias", "MLP activations"),
            *("gradient of q, k, v", "gradient of heads' output"),
            *("gradient of MLP pre-activations", "gradient of MLP activations"),
            *("attn c_attn lora_B weight", "mlp c_fc lora_B weight"),
            *("attn c_proj lora_A weight", "mlp c_proj lora_A weight"),
            *("gradient of attn c_attn lora_B weight", "gradient of mlp c_fc lora_B weight"),
            *("gradient of attn c_proj lora_A weight", "gradient of mlp c_proj lora_A weight"),
        ],
        AS_IT_IS,
    ),
    "x A": UP_TO_ORDER,  # r numbers a token are too few for a row: found by its columns
    "gradient of x A": UP_TO_ORDER,
}
ATTENTION: Table = {"attention map": AS_IT_IS}  # the heads in another order
NEURONS: Table = dict.fromkeys(
    [
        *("MLP pre-activations", "MLP activations"),
        *("gradient of MLP pre-activations", "gradient of MLP activations"),
    ],
    UP_TO_ORDER,
)
FOLDED: Table = {"c_fc bias, norm folded": UP_TO_ORDER}
# Held factors: B of fc1 and A of fc2 are keyed by the order of the neurons alone, and x A not at all.
HELD: Table = dict.fromkeys(
    [
        *("mlp c_fc bias", "mlp c_fc lora_B weight", "mlp c_proj lora_A weight"),
        *("gradient of mlp c_fc lora_B weight", "gradient of mlp c_proj lora_A weight"),
        *("x A", "gradient of x A"),
    ],
    UP_TO_ORDER,
)

CASES: dict[str, tuple[str, dict[str, Any], Table]] = {
    "plain": ("plain", {}, PLAIN),
    "naive": ("naive", {}, PAPER),
    "paper": ("paper", {}, PAPER),
    "balanced": ("balanced", {}, ATTENTION | NEURONS | FOLDED),
    "balanced, blocks of 8": ("balanced", {"key_block": 8}, ATTENTION | NEURONS | FOLDED),
    "balanced+mlp=enclave": ("balanced", {"mlp": "enclave"}, ATTENTION),
    "balanced+lora_placement=worker": ("balanced", {"lora_placement": "worker"}, ATTENTION | NEURONS | HELD),
    "balanced+attention=enclave": ("balanced", {"attention": "enclave"}, NEURONS | FOLDED),
    "balanced+attention=enclave+mlp=enclave": ("balanced", {"attention": "enclave", "mlp": "enclave"}, {}),
    "strict": ("strict", {}, {}),
    "strict, blocks of 8": ("strict", {"key_block": 8}, {}),
    "stream": ("stream", {}, ATTENTION | NEURONS | FOLDED),
    "stream, blocks of 8": ("stream", {"key_block": 8}, ATTENTION | NEURONS | FOLDED),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Recording]]:
    profile, switches, _ = CASES[request.param]
    unfolds = "lora_placement" in switches
    with pytest.warns(UserWarning, match="norms are not folded") if unfolds else contextlib.nullcontext():
        recording = record(profile, switches, tmp_path_factory.mktemp("wire"))
    yield request.param, recording


def test_worker_learns_what_the_profile_says_and_nothing_else(case: tuple[str, Recording]) -> None:
    name, recording = case
    table = CASES[name][2]
    found = search(recording.truth, recording.seen())
    assert not {k: v for k, v in table.items() if found.get(k) != v}, "the control is not found"
    if name != "plain":
        assert not {k: v for k, v in found.items() if k not in table}, "more is exposed than the profile says"


@pytest.mark.parametrize(
    ("switch", "shown"),
    [
        ({"head_keys": False}, {"q, k, v": AS_IT_IS, "heads' output": AS_IT_IS}),
        ({"permute_mlp": False}, {"MLP activations": AS_IT_IS, "c_fc bias, norm folded": AS_IT_IS}),
        ({"keys": "identity"}, {"ln_1 normalized rows": AS_IT_IS, "gradient of MLP output": AS_IT_IS}),
    ],
    ids=str,
)
@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_a_key_that_is_left_out_shows(profile: str, switch: dict[str, Any], shown: Table, tmp_path: Path) -> None:
    if profile == "stream" and "keys" in switch:  # its stream is centred, and no gradient of a block's output is apart
        shown = {"ln_1 normalized rows": AS_IT_IS}
    recording = record(profile, switch, tmp_path)
    found = search(recording.truth, recording.seen())
    assert {name: found.get(name) for name in shown} == shown


def test_no_key_is_seen(case: tuple[str, Recording]) -> None:
    _, recording = case
    keys = {f"{i}: {key!r}": [key.dense()] for i, key in enumerate(recording.keys)}
    assert keys
    assert search(keys, recording.seen()) == {}


def test_no_secret_bytes_cross(case: tuple[str, Recording]) -> None:
    _, recording = case
    needles = needles_of(recording)
    for raw in recording.raw.values():
        assert len(raw) > 10_000
        assert [name for name, needle in needles.items() if needle in raw] == []
        # The control: each would be seen where it crossed.
        assert [name for name, needle in needles.items() if needle not in raw + b"".join(needles.values())] == []


def test_headers_hold_words_of_the_protocol_only(case: tuple[str, Recording]) -> None:
    _, recording = case
    words = {word for fields, tensors in recording.frames("to worker") for word in [*strings_of(fields), *tensors]}
    assert {"define", "x"} | ({"multiply"} if "strict" in case[0] else {"forward", "backward"}) <= words
    foreign = {word for word in words - PROTOCOL_WORDS if not re.fullmatch(NAMES, word)}
    assert not foreign, "a request says more than it must"
    for raw in recording.raw.values():
        for word in (b"acme", b"transformer", b"GPT2", b"c_attn", b"c_fc", b"lora", b"default", b"balanced", b"stream"):
            assert word not in raw


# Of segments and their held slots, and of the slots of a body's parts.
NAMES = r"s\d+(\.(main|qkv|out|up|down))?|[ABc]\.\d+\.(qkv|out|up|down)"
PROTOCOL_WORDS = {
    *("id", "op", "drop", "calls", "caches", "segment", "kind", "spec", "heads", "scale", "activation", "slot"),
    *("keep", "factors", "held", "causal", "mask_shape", "cache", "length", "rows", "call", "wants", "fresh"),
    *("action", "options", "scales", "lr", "a", "b"),
    *("hello", "define", "hold", "forward", "backward", "optimizer", "stats", "step", "export", "sgd"),
    *("multiply", "transpose", "body", "parts", "eps", "bias", "recompute"),
    *("linear", "attention", "mlp", "gelu_new", "main", "qkv", "out", "up", "down"),
    *("x", "y", "mask", "weight", "qkv_bias", "up_bias"),
    *(f"{kind}.{slot}" for kind in "uvAB" for slot in ("main", "qkv", "out", "up", "down")),
}


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def needles_of(recording: Recording) -> dict[str, bytes]:
    """Token ids, eight at a time, in every encoding; the master secret; and the numbers that keys are made of."""
    new = recording.generated[len(PROMPT) - 5 :]
    needles = {"secret": recording.secret, "secret in hex": recording.secret.hex().encode()}
    for name, ids in {"text": TEXT[3:11], "labels": TEXT[-8:], "prompt": PROMPT[4:12], "generated": new}.items():
        for kind in ("uint8", "<i2", "<i4", "<i8", "<f4", "<f8"):
            needles[f"{name} as {kind}"] = np.array(list(ids)).astype(kind).tobytes()
        needles[f"{name} as msgpack"] = msgpack.packb(list(ids))
    for i, key in enumerate(recording.keys):
        for j, factor in enumerate(key._factors):
            for dtype in (factor.dtype, torch.float32, torch.int32):
                needles[f"factor {j} of key {i} as {dtype}"] = factor.flatten()[:16].to(dtype).numpy().tobytes()
    return {name: needle for name, needle in needles.items() if any(needle)}
