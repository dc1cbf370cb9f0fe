"""Keyed weights compute on keyed rows what the plain weights compute on plain rows: float64 against dense maths."""

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from obfuscatune.enclave import folding
from obfuscatune.enclave.folding import (
    centre,
    fold_norm,
    fold_shift,
    key_attention,
    key_mlp,
    key_rows,
    key_weight,
    times_gain,
    unkey_rows,
)
from obfuscatune.enclave.keys import FAMILIES, ConcatKey, HeadKeys, IdentityKey, Key, MasterSecret, build, head_keys
from obfuscatune.enclave.keys.diagonal import gated_keys

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
    assert (folded_bias is None) == (bias is None and shift is None)
    added = 0 if folded_bias is None else folded_bias
    assert_equal(rows @ folded + added, plain @ weight + (0 if bias is None else bias))


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


@given(SIZES, SIZES, SEEDS, FAMILY, FAMILY, st.sampled_from([1, 7, 20, folding.SLAB]))
def test_key_weight(d: int, out: int, seed: int, family_in: str, family_out: str, slab: int) -> None:
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", out)
    rows, weight, gain = normal(seed, 4, d), normal(seed + 1, d, out), normal(seed + 2, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folding, "SLAB", slab)
        keyed = key_weight(weight, key_in, key_out)
        folded = key_weight(weight, key_in, key_out, read=lambda columns: times_gain(columns, gain))
        assert_equal(fold_shift(weight, None, gain), gain @ weight)
        assert torch.equal(key_weight(weight, key_in, key_out, dtype=torch.bfloat16), keyed.bfloat16())
    assert_equal(keyed, torch.linalg.solve(key_in.dense(), weight) @ key_out.dense())
    assert_equal(key_out.apply_inverse(key_in.apply(rows) @ keyed), rows @ weight)
    assert_equal(key_out.apply_inverse(key_in.apply(rows) @ folded), (rows * gain) @ weight)


def test_keying_a_weight_holds_one_float64_copy() -> None:
    """Of all tensors that are made while it is keyed and rounded, those alive at a time: the peak of an enclave."""
    weight = torch.randn(512, 4096).bfloat16()
    keys = key("monarch", 0, "in", 512), key("monarch", 0, "out", 4096)
    with pytest.MonkeyPatch.context() as patch, Alive() as alive:
        patch.setattr(folding, "SLAB", 1 << 16)
        key_weight(weight, *keys, dtype=torch.bfloat16)
    copy = weight.numel() * 8
    assert copy * 1.25 < alive.most < copy * 1.6  # and one in bfloat16, and slabs
    with Alive() as alive:  # the control: in one piece
        keys[1].apply(unkey_rows(weight.double(), keys[0])).bfloat16()
    assert alive.most > 3 * copy


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made and that are there still; ``most``: at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._seen.add(address)
        self._now += size
        self.most = max(self.most, self._now)

        def gone() -> None:
            self._now -= size
            self._seen.discard(address)

        weakref.finalize(storage, gone)


@given(SIZES, SIZES, SEEDS, FAMILY)
def test_key_rows_and_unkey_rows_are_inverse(d: int, columns: int, seed: int, family: str) -> None:
    matrix, secret = normal(seed, d, columns), key(family, seed, "rows", d)
    assert_equal(key_rows(matrix, secret), secret.dense() @ matrix)
    assert_equal(key_rows(unkey_rows(matrix, secret), secret), matrix)


def dense_attention(x: Tensor, weights: dict[str, Tensor], heads: int, kv_heads: int) -> Tensor:
    """Causal attention spelled out, for one sequence [T, d]; query head j with kv head ``j // (heads / kv_heads)``."""
    first = x @ weights["first"] + weights.get("first_bias", 0)
    n = first.shape[1] // (heads + 2 * kv_heads)
    q, k, v = torch.split(first, [heads * n, kv_heads * n, kv_heads * n], dim=1)
    outputs = []
    for j in range(heads):
        kv = slice(j // (heads // kv_heads) * n, (j // (heads // kv_heads) + 1) * n)
        logits = q[:, j * n : (j + 1) * n] @ k[:, kv].T / math.sqrt(n)
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        outputs.append(logits.softmax(dim=1) @ v[:, kv])
    return torch.cat(outputs, dim=1) @ weights["last"]


def attention_parts(kv_heads: int, share: int, head_dim: int, seed: int) -> dict[str, Any]:
    d, n = 7, (share + 2) * kv_heads * head_dim
    inner = kv_heads * share * head_dim
    return {
        "x": normal(seed, 5, d),
        "first": (normal(seed + 1, d, n) / math.sqrt(d), normal(seed + 2, n)),
        "last": (normal(seed + 3, inner, d), normal(seed + 4, d)),
    }


def identity_heads(query: int, kv: int) -> HeadKeys:
    return HeadKeys(IdentityKey(query), IdentityKey(kv), IdentityKey(kv), IdentityKey(query))


@given(
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    seed=SEEDS,
    family_in=FAMILY,
    family_out=FAMILY,
    keyed_heads=st.booleans(),
    secret_biases=st.booleans(),
    biases=st.sampled_from(["both", "first", "last", "none"]),
)
def test_key_attention(
    kv_heads: int,
    share: int,
    head_dim: int,
    seed: int,
    family_in: str,
    family_out: str,
    keyed_heads: bool,
    secret_biases: bool,
    biases: str,
) -> None:
    parts, heads, d = attention_parts(kv_heads, share, head_dim, seed), kv_heads * share, 7
    (weight, bias), (out_weight, out_bias) = parts["first"], parts["last"]
    bias = bias if biases in ("both", "first") else None
    out_bias = out_bias if biases in ("both", "last") else None
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", d)
    keys = identity_heads(heads * head_dim, kv_heads * head_dim)
    if keyed_heads:
        stream = master(seed).stream("heads")
        keys = head_keys(stream, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=0, kappa=4.0)
    keyed = key_attention(
        first=(weight, bias),
        last=(out_weight, out_bias),
        key_in=key_in,
        heads=keys,
        key_out=key_out,
        kv_heads=kv_heads,
        rotated=False,
        stream=master(seed).stream("biases") if secret_biases else None,
    )
    plain_weights = {"first": weight, "last": out_weight} | ({} if bias is None else {"first_bias": bias})
    plain = dense_attention(parts["x"], plain_weights, heads, kv_heads) + (0 if out_bias is None else out_bias)
    there = dense_attention(key_in.apply(parts["x"]), keyed.keyed, heads, kv_heads)
    assert_equal(key_out.apply_inverse(there) + (0 if keyed.bias is None else keyed.bias), plain)
    assert ("first_bias" in keyed.keyed) == (bias is not None)
    assert (keyed.value_offset is None) == (bias is None or not secret_biases)
    # What LoRA of the output layer sees: the heads' output on the worker, un-keyed, plus the offset.
    eye = torch.eye(heads * head_dim, dtype=torch.float64)
    heads_plain = dense_attention(parts["x"], {**plain_weights, "last": eye}, heads, kv_heads)
    heads_there = dense_attention(key_in.apply(parts["x"]), {**keyed.keyed, "last": eye}, heads, kv_heads)
    offset = 0 if keyed.value_offset is None else keyed.value_offset
    assert_equal(keys.output.apply_inverse(heads_there) + offset, heads_plain)


@pytest.mark.parametrize("rotated", [False, True])
def test_secret_biases_replace_those_of_k_and_v_and_nothing_of_q(rotated: bool) -> None:
    """A bias of k that is rotated by position does not cancel: there the true one is sent."""
    parts = attention_parts(2, 1, 4, seed=1)
    keyed = key_attention(
        first=parts["first"],
        last=parts["last"],
        key_in=IdentityKey(7),
        heads=identity_heads(8, 8),
        key_out=IdentityKey(7),
        kv_heads=2,
        rotated=rotated,
        stream=master(0).stream("biases"),
    )
    q, k, v = (keyed.keyed["first_bias"] - parts["first"][1]).chunk(3)
    assert not q.any()
    assert v.abs().min() > 0
    assert bool(k.any()) != rotated
    assert keyed.bias is not None
    assert keyed.bias.sub(parts["last"][1]).abs().max() > 0.1  # skipping the correction would show


@given(SIZES, SIZES, SEEDS, FAMILY, FAMILY, st.sampled_from(["permutation", "identity"]), st.booleans())
def test_key_mlp(d: int, hidden: int, seed: int, family_in: str, family_out: str, inner: str, biased: bool) -> None:
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", d)
    key_hidden = key(inner, seed, "neurons", hidden)
    x, up, down = normal(seed, 4, d), normal(seed + 1, d, hidden), normal(seed + 3, hidden, d)
    bias = normal(seed + 2, hidden) if biased else None
    keyed = key_mlp(
        first=(up, bias), last=down, key_in=key_in, key_first=key_hidden, key_last=key_hidden, key_out=key_out
    )
    there = torch.relu(key_in.apply(x) @ keyed["first"] + keyed.get("first_bias", 0)) @ keyed["last"]
    assert_equal(key_out.apply_inverse(there), torch.relu(x @ up + (0 if bias is None else bias)) @ down)


@given(SIZES, SIZES, SEEDS, FAMILY, FAMILY, st.booleans(), st.booleans())
def test_key_gated_mlp(
    d: int, hidden: int, seed: int, family_in: str, family_out: str, permute: bool, biased: bool
) -> None:
    key_in, key_out = key(family_in, seed, "in", d), key(family_out, seed, "out", d)
    gate, up = gated_keys(master(seed).stream("neurons"), hidden, permute=permute)
    x, weight, down = normal(seed, 4, d), normal(seed + 1, d, 2 * hidden), normal(seed + 3, hidden, d)
    bias = normal(seed + 2, 2 * hidden) if biased else None
    both = ConcatKey([gate, up])
    keyed = key_mlp(first=(weight, bias), last=down, key_in=key_in, key_first=both, key_last=up, key_out=key_out)

    def mlp(x: Tensor, weight: Tensor, bias: Any, last: Tensor) -> Tensor:
        g, u = (x @ weight + (0 if bias is None else bias)).chunk(2, dim=1)
        return torch.nn.functional.silu(g) * u @ last

    there = mlp(key_in.apply(x), keyed["first"], keyed.get("first_bias"), keyed["last"])
    assert_equal(key_out.apply_inverse(there), mlp(x, weight, bias, down))
    if permute:
        assert both.apply(torch.eye(2 * hidden).double())[hidden:, hidden:].abs().sum(0).max() <= 2


@pytest.mark.parametrize("family", ["haar", "monarch"])
def test_no_other_key_commutes_with_an_activation(family: str) -> None:
    d, hidden = 6, 12
    x, up, bias, down = normal(0, 4, d), normal(1, d, hidden), normal(2, hidden), normal(3, hidden, d)
    plain = IdentityKey(d)
    inner = key(family, 5, "inner", hidden)
    keyed = key_mlp(first=(up, bias), last=down, key_in=plain, key_first=inner, key_last=inner, key_out=plain)
    got = torch.relu(x @ keyed["first"] + keyed["first_bias"]) @ keyed["last"]
    assert (got - torch.relu(x @ up + bias) @ down).abs().max() > 0.1
