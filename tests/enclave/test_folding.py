"""Keyed weights compute on keyed rows what the plain weights compute on plain rows: float64 against dense maths."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.enclave.folding import centre, fold_norm, key_attention, key_mlp, key_rows, key_weight, unkey_rows
from obfuscatune.enclave.keys import FAMILIES, ConcatKey, IdentityKey, Key, MasterSecret, build, per_head

EXACT = 1e-11  # relative to the largest entry, keys of condition number up to 8; measured below 2e-13

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)
# A Gaussian key's condition number has no bound; its own tests say what it costs.
FAMILY = st.sampled_from(sorted(set(FAMILIES) - {"gaussian"}))


def master(seed: int) -> MasterSecret:
    return MasterSecret.from_insecure_test_seed(seed)


def key(family: str, seed: int, name: str, size: int) -> Key:
    return build(family, master(seed).stream(name), size, block=4, kappa=8.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=EXACT)


@given(SIZES, SIZES, SEEDS, st.booleans(), st.booleans())
def test_fold_norm(d: int, out: int, seed: int, has_bias: bool, has_shift: bool) -> None:
    rows, weight, gain = normal(seed, 3, d), normal(seed + 1, d, out), normal(seed + 2, d)
    bias = normal(seed + 3, out) if has_bias else None
    shift = normal(seed + 4, d) if has_shift else None
    folded, folded_bias = fold_norm(weight, bias, gain, shift)
    plain = rows * gain + (0 if shift is None else shift)
    assert_equal(rows @ folded + folded_bias, plain @ weight + (0 if bias is None else bias))


def test_fold_norm_works_in_float64_and_leaves_its_arguments() -> None:
    weight, bias, gain, shift = (normal(s, *n).float() for s, n in enumerate([(3, 2), (2,), (3,), (3,)]))
    before = [t.clone() for t in (weight, bias, gain, shift)]
    folded = fold_norm(weight, bias, gain, shift)
    assert [t.dtype for t in folded] == [torch.float64] * 2
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, bias, gain, shift), strict=True))


@given(st.integers(2, 9), SEEDS, st.sampled_from(["haar", "monarch", "identity"]))
def test_a_centred_layer_norm_commutes_with_a_rotation(d: int, seed: int, family: str) -> None:
    rows, rotation = normal(seed, 3, d) + 5, key(family, seed, "stream", d)
    layer_norm = torch.nn.functional.layer_norm(rows, (d,), eps=0.1)
    rms_norm = lambda x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()  # noqa: E731
    centred = centre(rows)
    assert_equal(centred.sum(-1), torch.zeros(3, dtype=torch.float64))
    assert_equal(rms_norm(rotation.apply(centred)), rotation.apply(layer_norm))
    assert (rms_norm(rotation.apply(rows)) - rotation.apply(layer_norm)).abs().max() > 0.1  # it must be centred


@given(SIZES, SIZES, SEEDS, FAMILY, FAMILY)
def test_key_weight(d: int, out: int, seed: int, family_in: str, family_out: str) -> None:
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", out)
    rows, weight = normal(seed, 4, d), normal(seed + 1, d, out)
    keyed = key_weight(weight, key_in, key_out)
    assert_equal(keyed, torch.linalg.solve(key_in.dense(), weight) @ key_out.dense())
    assert_equal(key_out.apply_inverse(key_in.apply(rows) @ keyed), rows @ weight)


@given(SIZES, SIZES, SEEDS, FAMILY)
def test_key_rows_and_unkey_rows_are_inverse(d: int, columns: int, seed: int, family: str) -> None:
    matrix, secret = normal(seed, d, columns), key(family, seed, "rows", d)
    assert_equal(key_rows(matrix, secret), secret.dense() @ matrix)
    assert_equal(key_rows(unkey_rows(matrix, secret), secret), matrix)


def dense_attention(x: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """Causal attention spelled out, for one sequence [T, d]."""
    qkv = x @ weights["qkv"] + weights["qkv_bias"]
    outputs = []
    for q, k, v in zip(*(part.chunk(heads, dim=1) for part in qkv.chunk(3, dim=1)), strict=True):
        logits = q @ k.T / math.sqrt(q.shape[1])
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        outputs.append(logits.softmax(dim=1) @ v)
    return torch.cat(outputs, dim=1) @ weights["out"]


def attention_parts(heads: int, head_dim: int, seed: int) -> dict[str, Any]:
    d = heads * head_dim
    return {
        "x": normal(seed, 5, d),
        "qkv": (normal(seed + 1, d, 3 * d) / math.sqrt(d), normal(seed + 2, 3 * d)),
        "out": (normal(seed + 3, d, d), normal(seed + 4, d)),
    }


@given(st.integers(1, 3), st.integers(1, 4), SEEDS, FAMILY, FAMILY, st.booleans(), st.booleans())
def test_key_attention(
    heads: int, head_dim: int, seed: int, family_in: str, family_out: str, head_keys: bool, secret_biases: bool
) -> None:
    parts, d = attention_parts(heads, head_dim, seed), heads * head_dim
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", d)
    key_qkv, key_value = IdentityKey(3 * d), IdentityKey(d)
    if head_keys:
        key_q, key_k, key_value = per_head(master(seed).stream("heads"), heads, head_dim, 4.0)
        key_qkv = ConcatKey([key_q, key_k, key_value])
    keyed = key_attention(
        qkv=parts["qkv"],
        out=parts["out"],
        key_in=key_in,
        key_qkv=key_qkv,
        key_value=key_value,
        key_out=key_out,
        stream=master(seed).stream("biases") if secret_biases else None,
    )
    (weight, bias), (out_weight, out_bias) = parts["qkv"], parts["out"]
    plain = dense_attention(parts["x"], {"qkv": weight, "qkv_bias": bias, "out": out_weight}, heads) + out_bias
    got = key_out.apply_inverse(dense_attention(key_in.apply(parts["x"]), keyed.keyed, heads)) + keyed.bias
    assert_equal(got, plain)
    if not secret_biases:
        assert not keyed.value_offset.any()
    # What LoRA of the output layer sees: the heads' output on the worker, un-keyed, plus the offset.
    eye = torch.eye(d, dtype=torch.float64)
    heads_plain = dense_attention(parts["x"], {"qkv": weight, "qkv_bias": bias, "out": eye}, heads)
    heads_there = dense_attention(key_in.apply(parts["x"]), {**keyed.keyed, "out": eye}, heads)
    assert_equal(key_value.apply_inverse(heads_there) + keyed.value_offset, heads_plain)


def test_secret_biases_replace_those_of_k_and_v_and_nothing_of_q() -> None:
    parts = attention_parts(2, 4, seed=1)
    d = 8
    keyed = key_attention(
        qkv=parts["qkv"],
        out=parts["out"],
        key_in=IdentityKey(d),
        key_qkv=IdentityKey(3 * d),
        key_value=IdentityKey(d),
        key_out=IdentityKey(d),
        stream=master(0).stream("biases"),
    )
    q, k, v = (keyed.keyed["qkv_bias"] - parts["qkv"][1]).chunk(3)
    assert not q.any()
    assert k.abs().min() > 0 and v.abs().min() > 0
    assert keyed.bias.sub(parts["out"][1]).abs().max() > 0.1  # skipping the correction would show


@given(SIZES, SIZES, SEEDS, FAMILY, FAMILY, st.sampled_from(["permutation", "identity"]))
def test_key_mlp(d: int, hidden: int, seed: int, family_in: str, family_out: str, inner: str) -> None:
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", d)
    key_hidden = key(inner, seed, "neurons", hidden)
    x, up, up_bias = normal(seed, 4, d), normal(seed + 1, d, hidden), normal(seed + 2, hidden)
    down = normal(seed + 3, hidden, d)
    keyed = key_mlp(up=(up, up_bias), down=down, key_in=key_in, key_hidden=key_hidden, key_out=key_out)
    there = torch.relu(key_in.apply(x) @ keyed["up"] + keyed["up_bias"]) @ keyed["down"]
    assert_equal(key_out.apply_inverse(there), torch.relu(x @ up + up_bias) @ down)


@pytest.mark.parametrize("family", ["haar", "monarch"])
def test_no_other_key_commutes_with_an_activation(family: str) -> None:
    d, hidden = 6, 12
    x, up, bias, down = normal(0, 4, d), normal(1, d, hidden), normal(2, hidden), normal(3, hidden, d)
    plain = IdentityKey(d)
    inner = key(family, 5, "inner", hidden)
    keyed = key_mlp(up=(up, bias), down=down, key_in=plain, key_hidden=inner, key_out=plain)
    got = torch.relu(x @ keyed["up"] + keyed["up_bias"]) @ keyed["down"]
    assert (got - torch.relu(x @ up + bias) @ down).abs().max() > 0.1
