r"""Weights + keys -> keyed weights: pure float64 maths on roles, no modules, no transport.

Notation: rows are tokens, weights are ``[in, out]``, ``x* = x R``. A linear layer under an input key and an output
key is

    W* = R_in^-1 W R_out,   so   (x R_in) W* R_out^-1 = x W.

Everything is computed in float64 and rounded last, to the model's dtype. A weight is keyed some columns, then some rows
at a time, so that there is one float64 copy of it and no more: that copy is most of the enclave's peak. Secrecy: these
functions read keys and plain weights; what they return as ``keyed`` may leave the enclave, what they return beside it
must not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys import ConcatKey, HeadKeys, Key
from obfuscatune.enclave.keys.source import Stream

SLAB = 1 << 21  # numbers at a time: 16 MiB in float64, which malloc keeps for the next ones (`protocol/memory.py`)

Read = Callable[
    [Tensor], Tensor
]  # some columns [in, n] of a plain weight to those that the worker's is made of, float64


def fold_norm(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    r"""Fold a norm's gain and bias into the linear layer after it.

    ``(x^ * gain + shift) W + b = x^ W' + b'`` with ``W' = diag(gain) W`` and ``b' = b + shift W``. Then the rows that
    are keyed have constant norm, which closes matching by row norms (attack A8).

    Args:
        weight: ``[in, out]``; bias: ``[out]``; gain, shift: ``[in]``. Any float dtype; float64 is returned. Where there
            is neither a bias nor a shift, there is no bias after it either.
    """
    return times_gain(weight, gain), fold_shift(weight, bias, shift)


def times_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """Return ``diag(gain) W`` in float64, for all columns of W or for some."""
    return gain.double()[:, None] * weight.double()


def fold_shift(weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """Return the bias ``b + shift W`` in float64; None where there is neither."""
    folded = None if bias is None else bias.double()
    if shift is None:
        return folded
    written = _row_times(shift, weight)
    return written if folded is None else folded + written


def centre(rows: Tensor) -> Tensor:
    r"""Return ``x C`` with ``C = I - 11^T/d``: rows ``[..., d]`` less their mean.

    A residual stream that is centred, and into which only centred rows are written, makes of every LayerNorm an
    RMSNorm, which commutes with a rotation: ``RMSNorm(x R) = RMSNorm(x) R``. In the dtype of the rows, differentiable.
    """
    return rows - rows.mean(dim=-1, keepdim=True)


def key_weight(
    weight: Tensor, key_in: Key, key_out: Key, *, read: Read = Tensor.double, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return ``R_in^-1 W R_out``, rounded to ``dtype``, for ``weight`` ``[in, out]``; ``read`` is what W is made by."""
    half = torch.empty(weight.shape, dtype=torch.float64)
    for part in _slabs(*weight.shape):  # each column by itself ...
        half[:, part] = unkey_rows(read(weight[:, part]), key_in)
    keyed = half if dtype == torch.float64 else torch.empty(weight.shape, dtype=dtype)
    for part in _slabs(*reversed(weight.shape)):  # ... then each row
        keyed[part] = key_out.apply(half[part])
    return keyed


def _slabs(length: int, count: int) -> Iterator[slice]:
    """All of ``count`` rows, or columns, of ``length`` numbers each, in slices of about `SLAB` numbers."""
    step = max(1, SLAB // max(1, length))
    yield from (slice(start, start + step) for start in range(0, count, step))


def _row_times(row: Tensor, weight: Tensor) -> Tensor:
    """Return ``row W`` in float64, for ``row`` ``[in]`` and ``weight`` ``[in, out]``."""
    row = row.double()
    return torch.cat([row @ weight[:, part].double() for part in _slabs(*weight.shape)])


def unkey_rows(matrix: Tensor, key: Key) -> Tensor:
    """Return ``R^-1 M`` for ``M`` ``[size, n]``: the input side of a weight or of a LoRA factor A."""
    return key.apply_inverse_transpose(matrix.T.contiguous()).T


def key_rows(matrix: Tensor, key: Key) -> Tensor:
    """Return ``R M`` for ``M`` ``[size, n]``: undoes :func:`unkey_rows`."""
    return key.apply_transpose(matrix.T.contiguous()).T


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show the secret biases
class KeyedAttention:
    """A whole attention under keys.

    Attributes:
        keyed: ``first`` ``[d, n]``, ``first_bias`` ``[n]`` where there is one, ``last`` ``[heads, d]``: may leave the
            enclave. The bias is float64.
        bias: ``[d]``, added to the un-keyed output in the enclave; None where there is none. own_bias: the layer's
            own, which is all that is added where a row attends to nothing.
        value_offset: ``[heads * head_dim]``, what the true heads' output has more than the worker's.
    """

    keyed: dict[str, Tensor]
    bias: Tensor | None
    own_bias: Tensor | None
    value_offset: Tensor | None


def key_attention(
    *,
    first: tuple[Tensor, Tensor | None],
    last: tuple[Tensor, Tensor | None],
    key_in: Key,
    heads: HeadKeys,
    key_out: Key,
    kv_heads: int,
    rotated: bool,
    stream: Stream | None,
    read: Read = Tensor.double,
    dtype: torch.dtype = torch.float64,
) -> KeyedAttention:
    r"""Key q,k,v, the attention and its output projection as one.

    ``[Wq|Wk|Wv]* = Ra^-1 [Wq M | Wk M^-T | Wv N]`` and ``Wo* = N^-1 Wo Rb``, block-diagonal per head. With a
    ``stream``, the biases of k and v are replaced by secrets c and e: ``q.(k + c)`` adds to each row of logits a
    constant, which softmax cancels; softmax rows sum to one, so that a v bias of e instead of bv changes the heads'
    output by ``e - bv``, and the enclave adds ``bo + (bv - e) Wo``; a row that attends to nothing sums to zero, and
    gets bo alone. Rotated by position, a bias of k does not cancel: there the true one is sent, keyed. This
    needs attention dropout off. docs/design.md, "Whole submodules".

    Args:
        first: ``q | k | v`` ``[d, n]`` and bias, norms already folded into the bias where the profile folds them.
            last: ``[heads, d]`` and bias.
        key_in, key_out: Ra and Rb, size d. heads: M, M^-T, N, and N for the heads' output.
        kv_heads: heads of k and v. rotated: whether q and k are rotated by position, at least in part.
        stream: randomness for c and e; ``None`` keeps the true biases.
        read: folds norms into the weight of ``first``. dtype: of keyed weights.
    """
    (weight, bias), out_weight = first, last[0]
    out_bias = None if last[1] is None else last[1].double()
    widths = [heads.q.size, heads.k.size, heads.v.size]
    key_first = ConcatKey([heads.q, heads.k, heads.v])
    keyed = {
        "first": key_weight(weight, key_in, key_first, read=read, dtype=dtype),
        "last": key_weight(out_weight, heads.output, key_out, dtype=dtype),
    }
    if bias is None:
        return KeyedAttention(keyed, out_bias, out_bias, None)
    bias_q, bias_k, bias_v = torch.split(bias.double(), widths)
    sent_k, sent_v = bias_k, bias_v
    if stream is not None:
        # As large as the biases they replace: larger ones would cost precision, smaller ones would show that they are
        # not.
        sent_v = stream.normal(len(bias_v)) * bias_v.square().mean().sqrt()
        if not rotated:
            sent_k = stream.normal(len(bias_k)) * bias_k.square().mean().sqrt()
    keyed["first_bias"] = key_first.apply(torch.cat([bias_q, sent_k, sent_v]))
    if stream is None:
        return KeyedAttention(keyed, out_bias, out_bias, None)
    share = heads.output.size // len(bias_v)  # query heads for each kv head
    value_offset = (bias_v - sent_v).view(kv_heads, -1).repeat_interleave(share, dim=0).flatten()
    written = _row_times(value_offset, out_weight)
    return KeyedAttention(keyed, written if out_bias is None else out_bias + written, out_bias, value_offset)


def key_mlp(
    *,
    first: tuple[Tensor, Tensor | None],
    last: Tensor,
    key_in: Key,
    key_first: Key,
    key_last: Key,
    key_out: Key,
    read: Read = Tensor.double,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    r"""Key a whole MLP: ``W1* = Rc^-1 W1 P``, ``b1* = b1 P``, ``W2* = P^T W2 Rf``, with P a permutation of the neurons.

    An elementwise activation commutes with a permutation and with no other key. A gated MLP,
    ``(act(x Wg) * (x Wu)) Wd``, allows a diagonal D besides: ``[Wg|Wu]* = Rc^-1 [Wg P | Wu D P]`` and
    ``Wd* = (D P)^-1 Wd Rf``.

    Args:
        first: ``up``, or ``gate | up``, ``[d, n]`` and bias. last: ``[h, d]``.
        key_first: P, or P and D P. key_last: of what enters ``last``: P, or D P.
        read: folds norms into the weight of ``first``. dtype: of keyed weights.

    Returns:
        ``first`` and ``last``, and float64 ``first_bias`` where there is one: may leave the enclave.
    """
    keyed = {
        "first": key_weight(first[0], key_in, key_first, read=read, dtype=dtype),
        "last": key_weight(last, key_last, key_out, dtype=dtype),
    }
    if first[1] is not None:
        keyed["first_bias"] = key_first.apply(first[1].double())
    return keyed
