"""The growing buffers of cached tokens against concatenation, over random histories of steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.worker.kv import Tokens

HEADS, WIDTH = 2, 3

# Of one step: shares of the tokens cut off at either side, rows, how many are new, whether a graph is kept.
STEPS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.floats(0, 1),
        st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.integers(1, 40),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def fresh(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 2, HEADS, count, WIDTH, generator=generator, dtype=torch.float64)
    return k, v


@given(STEPS, st.integers(0, 10**6))
@settings(deadline=None, max_examples=150)
def test_any_history_gives_what_concatenation_gives(
    steps: list[tuple[float, float, list[int] | None, int, bool]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = fresh(5, generator)
    tokens = Tokens.of(*expected)
    graphs: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    for from_start, from_end, rows, new, grad in steps:
        start = int(from_start * (tokens.length - 1))
        length = 1 + int(from_end * (tokens.length - start - 1))
        expected = tuple(t[:, :, start : start + length] for t in expected)  # type: ignore[assignment]
        if rows is not None:
            expected = tuple(t[rows] for t in expected)  # type: ignore[assignment]
        added = fresh(new, generator)
        expected = torch.cat([expected[0], added[0]], dim=2), torch.cat([expected[1], added[1]], dim=2)
        with torch.set_grad_enabled(grad):
            got, tokens = tokens.part(start, length, rows).append(*added)
        assert all(map(torch.equal, got, expected))
        assert all(map(torch.equal, tokens.tensors(), expected))
        if grad:
            graphs.append((got, expected))
    for got, expected in graphs:  # what a graph may have kept is never written to
        assert all(map(torch.equal, got, expected))


def test_a_step_writes_in_place_and_copies_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, places = Tokens.of(*fresh(16, generator)), set()
    with torch.no_grad():
        for _ in range(500):
            tokens = tokens.append(*fresh(1, generator))[1]
            places.add(tokens.buffers[0].data_ptr())
    assert tokens.length == 516
    assert len(places) <= 6  # room for 49 tokens, then 100, 202, 406, 814


def test_a_window_that_slides_keeps_its_buffers_small() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.of(*fresh(16, generator))
    with torch.no_grad():
        for _ in range(300):
            tokens = tokens.part(tokens.length - 15, 15, None).append(*fresh(1, generator))[1]
    assert tokens.length == 16
    assert tokens.buffers[0].shape[2] <= 16 + 32


def test_gradients_go_through_a_step_that_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.of(*fresh(4, generator))
    with torch.no_grad():
        tokens = tokens.append(*fresh(1, generator))[1]
    k, v = (t.requires_grad_() for t in fresh(2, generator))
    (all_k, all_v), after = tokens.append(k, v)
    with torch.no_grad():
        after.part(0, 5, None).append(*fresh(3, generator))  # over the same tokens, of other buffers
    (all_k.square().sum() + 3 * all_v.square().sum()).backward()
    assert torch.equal(k.grad, 2 * k)
    assert torch.equal(v.grad, 6 * v)


def test_tokens_of_other_rows_are_refused() -> None:
    k, v = fresh(3, torch.Generator().manual_seed(0))
    with torch.no_grad(), pytest.raises(ProtocolError, match="cached tokens"):
        Tokens.of(k, v).append(k[:1], v[:1])
