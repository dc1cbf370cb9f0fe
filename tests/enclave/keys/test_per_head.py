"""Per-head keys keep attention exact, with a block of its own for each head and one shared order of heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from obfuscatune.enclave.keys import ConcatKey, MasterSecret, PerHeadKey, Stream, haar, head_keys, monarch
from obfuscatune.errors import KeyFaultError, UsageError
from obfuscatune.worker.attention import rotate

TOLERANCE = 1e-12  # float64, kappa up to 16; measured 5e-14


def per_head(stream: Stream, heads: int, head_dim: int, kappa: float) -> tuple[PerHeadKey, PerHeadKey, PerHeadKey]:
    """Keys of q, k and v where every head has its own k and v, and nothing is rotated."""
    keys = head_keys(stream, heads=heads, kv_heads=heads, head_dim=head_dim, rotary=0, kappa=kappa)
    return keys.q, keys.k, keys.v


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.view(len(x), heads, -1).transpose(0, 1)  # [heads, rows, head_dim]


@given(st.integers(1, 6), st.integers(1, 8), st.floats(1, 16), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_attention_is_that_of_the_plain_heads(heads: int, head_dim: int, kappa: float, seed: int) -> None:
    stream = MasterSecret.from_insecure_test_seed(seed).stream("heads")
    q_key, k_key, v_key = per_head(stream, heads, head_dim, kappa)
    q, k, v = (stream.normal(5, heads * head_dim) for _ in range(3))
    order = q_key._factors[2]
    logits = heads_of(q_key.apply(q), heads) @ heads_of(k_key.apply(k), heads).mT
    expected = (heads_of(q, heads) @ heads_of(k, heads).mT)[order]
    assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE)
    out = scaled_dot_product_attention(
        *(heads_of(key.apply(x), heads) for key, x in zip((q_key, k_key, v_key), (q, k, v), strict=True))
    )
    plain = scaled_dot_product_attention(*(heads_of(x, heads) for x in (q, k, v)))
    decoded = v_key.apply_inverse(out.transpose(0, 1).reshape(5, -1))
    assert torch.allclose(decoded, plain.transpose(0, 1).reshape(5, -1), rtol=0, atol=TOLERANCE)


def test_logits_are_lost_without_the_inverse_transpose(master: MasterSecret) -> None:
    q_key, _, v_key = per_head(master.stream("h"), 3, 4, 4.0)
    x = master.stream("x").normal(5, 12)
    expected = (heads_of(x, 3) @ heads_of(x, 3).mT)[q_key._factors[2]]
    for wrong in (q_key, v_key):
        got = heads_of(q_key.apply(x), 3) @ heads_of(wrong.apply(x), 3).mT
        assert (got - expected).abs().max().item() > 0.1


@given(
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    planes=st.integers(0, 3),
    rest=st.integers(0, 3),
    kappa=st.floats(1, 16),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_grouped_and_rotated_heads(kv_heads: int, share: int, planes: int, rest: int, kappa: float, seed: int) -> None:
    """Attention of the worker on keyed heads, rotated by position, is that of the plain heads in another order."""
    if planes + rest == 0:
        return
    head_dim, heads = 2 * planes + rest, kv_heads * share
    stream = MasterSecret.from_insecure_test_seed(seed).stream("heads")
    keys = head_keys(stream, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=2 * planes, kappa=kappa)
    q, k, v = (stream.normal(5, count * head_dim) for count in (heads, kv_heads, kv_heads))
    angles = torch.outer(torch.arange(5.0, dtype=torch.float64), stream.uniform(planes)).repeat(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = heads_of(q, heads), heads_of(k, kv_heads), heads_of(v, kv_heads)
        if planes:
            q, k = (rotate(x[None], angles.cos()[None], angles.sin()[None])[0] for x in (q, k))
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        return scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(5, -1)

    there = attention(keys.q.apply(q), keys.k.apply(k), keys.v.apply(v))
    assert torch.allclose(keys.output.apply_inverse(there), attention(q, k, v), rtol=0, atol=TOLERANCE)
    assert max(key.condition_number for key in (keys.q, keys.k, keys.v)) <= kappa * (1 + 1e-9)
    if planes:  # the control: a key that does not commute with the rotations
        other = head_keys(stream, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=0, kappa=1.0)
        wrong = attention(other.q.apply(q), other.k.apply(k), other.v.apply(v))
        assert not torch.allclose(other.output.apply_inverse(wrong), attention(q, k, v), rtol=0, atol=1e-6)


def test_structure(master: MasterSecret) -> None:
    blocks = torch.eye(2).double() * torch.tensor([1.0, 2.0, 4.0]).double().view(3, 1, 1)
    key = PerHeadKey(blocks, blocks.inverse(), torch.tensor([2, 0, 1]))
    assert key.apply(torch.tensor([1.0, 2, 3, 4, 5, 6])).tolist() == [20, 24, 1, 2, 6, 8]
    assert (key.size, key.condition_number) == (6, 4.0)


def test_every_head_has_its_own_block(master: MasterSecret) -> None:
    q_key, k_key, v_key = per_head(master.stream("h"), 8, 8, 4.0)
    blocks = torch.cat([q_key._factors[0], v_key._factors[0]])
    norm = blocks[0].norm().item()
    overlaps = torch.einsum("aij,bij->ab", blocks, blocks) / norm**2 - torch.eye(16)
    assert overlaps.abs().max().item() < 6 / 8  # as traces of Haar matrices over their size; 1 for equal blocks
    for key in (q_key, k_key, v_key):
        assert torch.equal(key._factors[2], q_key._factors[2])
        assert torch.linalg.cond(key._factors[0]).sub(4).abs().max().item() < 1e-9
        assert key.condition_number == pytest.approx(4)


def test_order_of_heads_is_secret(master: MasterSecret) -> None:
    orders = {tuple(per_head(master.stream("h", str(i)), 3, 1, 1.0)[0]._factors[2].tolist()) for i in range(100)}
    assert len(orders) == 6


def test_wrong_inverse_is_refused(master: MasterSecret) -> None:
    blocks = master.stream("h").normal(3, 4, 4)
    inverses = blocks.inverse()
    inverses[1, 2, 3] += 1e-6
    with pytest.raises(KeyFaultError, match="wrong inverse"):
        PerHeadKey(blocks, inverses, torch.arange(3))


def test_concatenation_is_block_diagonal(master: MasterSecret) -> None:
    parts = [
        haar(master.stream("a"), 5),
        monarch(master.stream("b"), 16, 4),
        per_head(master.stream("c"), 2, 3, 9.0)[2],
    ]
    key = ConcatKey(parts)
    expected = torch.block_diag(*(part.dense() for part in parts))
    assert torch.equal(key.dense() == 0, expected == 0)
    # A product of more rows may add up in another order, on some CPUs.
    assert torch.allclose(key.dense(), expected, rtol=0, atol=1e-14)
    assert key.condition_number == pytest.approx(9)


def test_empty_concatenation_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        ConcatKey([])
