r"""Weights + keys -> keyed weights: pure float64 maths on roles, no modules, no transport.

Notation: rows are tokens, weights are ``[in, out]``, ``x* = x R``. A linear layer under an input key and an output
key is

    W* = R_in^-1 W R_out,   so   (x R_in) W* R_out^-1 = x W.

Everything is computed in float64 and rounded last, to the model's dtype. Secrecy: these functions read keys and plain
weights; what they return as ``keyed`` may leave the enclave, what they return beside it must not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys import ConcatKey, HeadKeys, Key
from obfuscatune.enclave.keys.source import Stream


def fold_norm(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    r"""Fold a norm's gain and bias into the linear layer after it.

    ``(x^ * gain + shift) W + b = x^ W' + b'`` with ``W' = diag(gain) W`` and ``b' = b + shift W``. Then the rows that
    are keyed have constant norm, which closes matching by row norms (attack A8).

    Args:
        weight: ``[in, out]``; bias: ``[out]``; gain, shift: ``[in]``. Any float dtype; float64 is returned. Where there
            is neither a bias nor a shift, there is no bias after it either.
    """
    weight = weight.double()
    folded_bias = None if bias is None else bias.double()
    if shift is not None:
        written = shift.double() @ weight
        folded_bias = written if folded_bias is None else folded_bias + written
    return gain.double()[:, None] * weight, folded_bias


def centre(rows: Tensor) -> Tensor:
    r"""Return ``x C`` with ``C = I - 11^T/d``: rows ``[..., d]`` less their mean.

    A residual stream that is centred, and into which only centred rows are written, makes of every LayerNorm an
    RMSNorm, which commutes with a rotation: ``RMSNorm(x R) = RMSNorm(x) R``. In the dtype of the rows, differentiable.
    """
    return rows - rows.mean(dim=-1, keepdim=True)


def key_weight(weight: Tensor, key_in: Key, key_out: Key) -> Tensor:
    """Return ``R_in^-1 W R_out`` in float64, for ``weight`` ``[in, out]``."""
    return key_out.apply(unkey_rows(weight.double(), key_in))


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
            enclave. float64.
        bias: ``[d]``, added to the un-keyed output in the enclave; None where there is none.
        value_offset: ``[heads * head_dim]``, what the true heads' output has more than the worker's.
    """

    keyed: dict[str, Tensor]
    bias: Tensor | None
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
) -> KeyedAttention:
    r"""Key q,k,v, the attention and its output projection as one.

    ``[Wq|Wk|Wv]* = Ra^-1 [Wq M | Wk M^-T | Wv N]`` and ``Wo* = N^-1 Wo Rb``, block-diagonal per head. With a
    ``stream``, the biases of k and v are replaced by secrets c and e: ``q.(k + c)`` adds to each row of logits a
    constant, which softmax cancels; softmax rows sum to one, so that a v bias of e instead of bv changes the heads'
    output by ``e - bv``, and the enclave adds ``bo + (bv - e) Wo``. Rotated by position, a bias of k does not cancel:
    there the true one is sent, keyed. This needs attention dropout off. docs/design.md, "Whole submodules".

    Args:
        first: ``q | k | v`` ``[d, n]`` and bias, norms already folded where the profile folds them. last:
            ``[heads, d]`` and bias.
        key_in, key_out: Ra and Rb, size d. heads: M, M^-T, N, and N for the heads' output.
        kv_heads: heads of k and v. rotated: whether q and k are rotated by position, at least in part.
        stream: randomness for c and e; ``None`` keeps the true biases.
    """
    weight, bias = first[0].double(), first[1]
    out_weight, out_bias = last[0].double(), None if last[1] is None else last[1].double()
    widths = [heads.q.size, heads.k.size, heads.v.size]
    key_first = ConcatKey([heads.q, heads.k, heads.v])
    keyed = {"first": key_weight(weight, key_in, key_first), "last": key_weight(out_weight, heads.output, key_out)}
    if bias is None:
        return KeyedAttention(keyed, out_bias, None)
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
        return KeyedAttention(keyed, out_bias, None)
    share = heads.output.size // len(bias_v)  # query heads for each kv head
    value_offset = (bias_v - sent_v).view(kv_heads, -1).repeat_interleave(share, dim=0).flatten()
    written = value_offset @ out_weight
    return KeyedAttention(keyed, written if out_bias is None else out_bias + written, value_offset)


def key_mlp(
    *,
    first: tuple[Tensor, Tensor | None],
    last: Tensor,
    key_in: Key,
    key_first: Key,
    key_last: Key,
    key_out: Key,
) -> dict[str, Tensor]:
    r"""Key a whole MLP: ``W1* = Rc^-1 W1 P``, ``b1* = b1 P``, ``W2* = P^T W2 Rf``, with P a permutation of the neurons.

    An elementwise activation commutes with a permutation and with no other key. A gated MLP,
    ``(act(x Wg) * (x Wu)) Wd``, allows a diagonal D besides: ``[Wg|Wu]* = Rc^-1 [Wg P | Wu D P]`` and
    ``Wd* = (D P)^-1 Wd Rf``.

    Args:
        first: ``up``, or ``gate | up``, ``[d, n]`` and bias. last: ``[h, d]``.
        key_first: P, or P and D P. key_last: of what enters ``last``: P, or D P.

    Returns:
        float64 ``first``, ``first_bias`` where there is one, and ``last``: may leave the enclave.
    """
    keyed = {"first": key_weight(first[0], key_in, key_first), "last": key_weight(last, key_last, key_out)}
    if first[1] is not None:
        keyed["first_bias"] = key_first.apply(first[1].double())
    return keyed
