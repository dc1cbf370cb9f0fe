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

from obfuscatune.enclave.keys import Key
from obfuscatune.enclave.keys.source import Stream


def fold_norm(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Fold a norm's gain and bias into the linear layer after it.

    ``(x^ * gain + shift) W + b = x^ W' + b'`` with ``W' = diag(gain) W`` and ``b' = b + shift W``. Then the rows that
    are keyed have constant norm, which closes matching by row norms (attack A8).

    Args:
        weight: ``[in, out]``; bias: ``[out]``; gain, shift: ``[in]``. Any float dtype; float64 is returned.
    """
    weight = weight.double()
    folded_bias = torch.zeros(weight.shape[1], dtype=torch.float64) if bias is None else bias.double()
    if shift is not None:
        folded_bias = folded_bias + shift.double() @ weight
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
        keyed: ``qkv`` ``[d, 3d]``, ``qkv_bias`` ``[3d]``, ``out`` ``[d, d]``: may leave the enclave. float64.
        bias: ``[d]``, added to the un-keyed output in the enclave.
        value_offset: ``[d]``, what the true heads' output has more than the one that the worker computes.
    """

    keyed: dict[str, Tensor]
    bias: Tensor
    value_offset: Tensor


def key_attention(
    *,
    qkv: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    key_in: Key,
    key_qkv: Key,
    key_value: Key,
    key_out: Key,
    stream: Stream | None,
) -> KeyedAttention:
    r"""Key q,k,v, the attention and its output projection as one.

    ``[Wq|Wk|Wv]* = Ra^-1 [Wq M | Wk M^-T | Wv N]`` and ``Wo* = N^-1 Wo Rb``, block-diagonal per head. With a
    ``stream``, the biases of k and v are replaced by secrets c and e: ``q.(k + c)`` adds to each row of logits a
    constant, which softmax cancels; softmax rows sum to one, so that a v bias of e instead of bv changes the heads'
    output by ``e - bv``, and the enclave adds ``bo + (bv - e) Wo``. This needs attention dropout off. Source: our
    SECURITY analysis, section 4.1.

    Args:
        qkv, out: weight ``[in, out]`` and bias, norms already folded where the profile folds them.
        key_in, key_out: Ra and Rb, size d.
        key_qkv: M | M^-T | N, size 3d. key_value: N alone, size d.
        stream: randomness for c and e; ``None`` keeps the true biases.
    """
    weight, bias = (t.double() for t in qkv)
    out_weight, out_bias = (t.double() for t in out)
    d = out_weight.shape[0]
    bias_q, bias_k, bias_v = torch.split(bias, d)
    sent_k, sent_v = bias_k, bias_v
    if stream is not None:
        # As large as the biases they replace: larger ones would cost precision, smaller ones would show that they are
        # not.
        sent_k = stream.normal(d) * bias_k.square().mean().sqrt()
        sent_v = stream.normal(d) * bias_v.square().mean().sqrt()
    value_offset = bias_v - sent_v
    keyed = {
        "qkv": key_weight(weight, key_in, key_qkv),
        "qkv_bias": key_qkv.apply(torch.cat([bias_q, sent_k, sent_v])),
        "out": key_weight(out_weight, key_value, key_out),
    }
    return KeyedAttention(keyed, out_bias + value_offset @ out_weight, value_offset)


def key_mlp(
    *, up: tuple[Tensor, Tensor], down: Tensor, key_in: Key, key_hidden: Key, key_out: Key
) -> dict[str, Tensor]:
    r"""Key a whole MLP: ``W1* = Rc^-1 W1 P``, ``b1* = b1 P``, ``W2* = P^T W2 Rf``, with P a permutation of the neurons.

    An elementwise activation commutes with a permutation and with no other key. Returns float64 ``up`` ``[d, h]``,
    ``up_bias`` ``[h]`` and ``down`` ``[h, d]``, which may leave the enclave.
    """
    return {
        "up": key_weight(up[0], key_in, key_hidden),
        "up_bias": key_hidden.apply(up[1].double()),
        "down": key_weight(down, key_hidden, key_out),
    }
