"""Attention on the worker: ``y = softmax(q k^T scale) v Wo`` with ``[q|k|v] = x W + b``, grouped and rotated or not."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.cpu import attends_in
from obfuscatune.protocol.threads import threads_for
from obfuscatune.worker.kv import Tokens
from obfuscatune.worker.parallel import Split
from obfuscatune.worker.segments import Call, PartSegment

# One row attends at the memory's speed: a cached number takes it as long as so many multiply-adds take a product.
_READING = 8


class AttentionSegment(PartSegment):
    """Attention with H query heads and G heads of k and v; query head j attends with kv head ``j // (H / G)``."""

    def prepare(self, spec: dict[str, Any]) -> None:
        """Read the counts of heads, and what is done with them."""
        self.heads, self.kv_heads = _count(spec, "heads"), _count(spec, "kv_heads")
        width, out = self.weight["first"].shape[0], self.weight["last"].shape[1]
        all_heads = self.heads + 2 * self.kv_heads
        if self.heads % self.kv_heads or width % all_heads or out * all_heads != width * self.heads:
            got = f"{self.heads} and {self.kv_heads} for {width} columns"
            raise ProtocolError("heads of an attention segment", got=got, expected="heads that divide the columns")
        self.head_dim = width // all_heads
        self.scale, self.rotary, self.softcap = float(spec["scale"]), int(spec["rotary"]), spec.get("softcap")
        if not math.isfinite(self.scale) or not 0 <= self.rotary <= self.head_dim or self.rotary % 2:
            raise ProtocolError("scale or rotary part of an attention segment", got=f"{self.scale}, {self.rotary}")
        if self.softcap is not None and not (isinstance(self.softcap, float) and 0 < self.softcap < math.inf):
            raise ProtocolError("soft cap of an attention segment", expected="a positive float or nil")

    def parts(self) -> tuple[list[Split] | None, Split | None]:
        """This process's heads of k and v, and the query heads that attend with them."""
        if self.group.size == 1 or self.kv_heads < self.group.size:
            return None, None
        share, size, kv = self.heads // self.kv_heads, self.head_dim, self.group.share(self.kv_heads)
        queries = Split(kv.start * share * size, kv.stop * share * size)
        k, v = ((self.heads + self.kv_heads * i) * size for i in range(2))
        columns = [queries, *(Split(s + kv.start * size, s + kv.stop * size) for s in (k, v))]
        self.kv_heads = kv.stop - kv.start
        self.heads = share * self.kv_heads
        return columns, queries

    def heads_of(self, first: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Q ``[B, H, T, n]``, k and v ``[B, G, T, n]`` of the first product ``[B, T, ...]``, rotated by position."""
        heads = torch.unflatten(first, -1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.rotary:
            if call.rotary is None or call.rotary[0].shape[-1] != self.rotary:
                raise ProtocolError("rotary tables", got="none, or of another width", expected=f"{self.rotary} numbers")
            q, k = rotate(q, *call.rotary), rotate(k, *call.rotary)
        return q, k, v

    def between(self, first: Tensor, call: Call) -> Tensor:
        """Return the heads' output ``[B, T, H n]`` and set ``call.present``."""
        q, k, v = self.heads_of(first, call)
        if call.past is None:
            call.present = (Tokens.of(k, v),)
        else:
            (k, v), present = call.past[0].append(k, v)
            call.present = (present,)
        h = attend(q, k, v, mask=call.mask, uniform=call.uniform, scale=self.scale, softcap=self.softcap)
        return h.transpose(1, 2).flatten(2)


def _count(spec: dict[str, Any], name: str) -> int:
    value = spec.get(name)
    if type(value) is not int or value < 1:
        raise ProtocolError(name, got=repr(value)[:20], expected="1 or more")
    return value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the planes ``(i, i + n / 2)`` of each head's first n numbers; x ``[B, H, T, ...]``, tables ``[., T, n]``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    uniform: bool = False,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(q k^T scale) v ``[B, H, T, n]`` for q ``[B, H, T, n]``, k and v ``[B, G, S, n]``.

    Args:
        mask: bool ``[B, 1, T, S]``; None: the last of T positions sees all S, and each one before it one less.
        uniform: whether rows that may attend to nothing attend to all S alike; they give 0 otherwise.
    """
    new, tokens = q.shape[2], k.shape[2]
    share = q.shape[1] // k.shape[1]
    if share > 1:
        if new == 1:  # the query heads of a kv head are rows that attend to the same tokens
            q = q.reshape(q.shape[0], k.shape[1], share, q.shape[3])
        else:
            k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    dtype = q.dtype
    in_one = softcap is None and not uniform
    if mask is None and new > 1 and (tokens > new or not in_one):
        mask = torch.ones(new, tokens, dtype=torch.bool, device=q.device).tril(tokens - new)
    with threads_for((_READING if new == 1 else 1) * 2 * q.numel() * tokens):
        if new == 1 and dtype.itemsize == 2 and q.is_cpu and not (in_one and attends_in(dtype)):
            q, k, v = q.float(), k.float(), v.float()
        if in_one:
            causal = mask is None and new > 1
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        else:
            h = _in_steps(q, k, v, mask, uniform, scale, softcap)
        h = h.to(dtype)
    return h.reshape(h.shape[0], -1, new, h.shape[3]) if share > 1 and new == 1 else h


def _in_steps(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, uniform: bool, scale: float, softcap: float | None
) -> Tensor:
    """Attention whose logits may be capped, ``c tanh(logits / c)``; half dtypes in float32 from the softmax on."""
    logits = (q @ k.mT) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if mask is None:
        return wide.softmax(-1).to(v.dtype) @ v
    least = torch.finfo(wide.dtype).min
    if uniform:  # added, as eager attention does: where all are at the least, each still has a gradient
        weights = (wide + torch.zeros_like(wide).masked_fill(~mask, least)).softmax(-1)
    else:
        weights = wide.masked_fill(~mask, least).softmax(-1).masked_fill(~mask, 0)
    return weights.to(v.dtype) @ v
