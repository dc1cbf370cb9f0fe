r"""A17, fingerprints: a token's attention to itself, over layers and heads, is the same under keys of heads.

``q_t . k_t`` is free of every key that cancels in q k^T, and of a rotation of both by one position. The list of it over
all layers and heads is looked up among those of a base on public text, the nearest first. Where biases of keys are
replaced (they cancel in the softmax), a row's mean over what it attends to is subtracted; where heads are in a secret
order, each layer's values are sorted.

Where q and k are rotated by position, their keys leave ``conj(q_t) k_t`` of every plane of two numbers as it is, so
that the list has two numbers a plane instead of one a head. A bias of k does not cancel there, and is the true one.

Source: A17 in docs/security.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from obfuscatune.enclave.families import AttentionShape
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, top1


def fingerprints(
    qkv: Callable[[int], Tensor], blocks: int, length: int, shape: AttentionShape, *, hidden: bool
) -> Tensor:
    """Fingerprints ``[n, m]`` of whole texts.

    Args:
        qkv: rows ``[n, q | k | v]`` of a block. hidden: whether keys of heads and a secret order of them are there.
    """
    found = []
    split = [shape.heads, shape.kv_heads, shape.kv_heads]
    for block in range(blocks):
        rows = qkv(block)
        texts = rows[: len(rows) // length * length].unflatten(0, (-1, length)).unflatten(2, (-1, shape.head_dim))  # type: ignore[no-untyped-call]
        q, k, _ = torch.split(texts.transpose(1, 2).float(), split, dim=1)  # [texts, heads, length, width]
        k = k.repeat_interleave(shape.heads // shape.kv_heads, dim=1)
        own = _by_plane(q, k, shape.rotary // 2) if shape.rotary else _by_head(q * shape.scale, k, relative=hidden)
        own = own.transpose(1, 2).flatten(0, 1)  # [n, heads, m]
        found.append((own.sort(dim=1).values if hidden else own).flatten(1))
    return torch.cat(found, dim=1)


def _by_head(q: Tensor, k: Tensor, *, relative: bool) -> Tensor:
    """``q_t . k_t`` ``[texts, heads, length, 1]``; relative: to what else a row attends to."""
    logits = q @ k.mT
    own = logits.diagonal(dim1=2, dim2=3)
    if relative:
        own = own - logits.tril().sum(dim=3) / torch.arange(1, logits.shape[2] + 1)
    return own[..., None]


def _by_plane(q: Tensor, k: Tensor, planes: int) -> Tensor:
    """Real and imaginary parts of ``conj(q_t) k_t`` ``[texts, heads, length, 2 planes]``."""
    (q1, q2), (k1, k2) = (torch.split(x[..., : 2 * planes], planes, dim=3) for x in (q, k))
    return torch.cat([q1 * k1 + q2 * k2, q1 * k2 - q2 * k1], dim=3)


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    base, profile, view = knowledge.base, knowledge.profile, sample.target
    if base is None or not len(view.rows(0, "qkv")):
        raise NotApplicableError("q and k do not cross, and are not computed by the worker")
    length, shape = knowledge.corpus.shape[1], knowledge.design.shape
    hidden = profile.attention == "worker" and profile.head_keys
    streams = knowledge.base_streams()
    # Where q, k, v return to the enclave, their bias is added there; the base's stands for it.
    biases = [0.0 if profile.attention == "worker" else base.bias(block, "qkv") for block in range(view.blocks)]

    def listed(rows: Callable[[int], Tensor]) -> Tensor:
        return fingerprints(lambda block: rows(block) + biases[block], view.blocks, length, shape, hidden=hidden)

    known = listed(lambda block: streams[block, "qkv"])
    wanted = listed(lambda block: view.rows(block, "qkv"))
    spread = known.std(dim=0).clamp_min(1e-12)
    nearest = torch.cdist(wanted / spread, known / spread).argmin(dim=1)
    return knowledge.corpus.flatten()[nearest]


ATTACK = Attack(
    id="A17",
    title="attention fingerprint",
    needs="B",
    source="A17 in docs/security.md",
    metric="share of the target's tokens",
    chance="the most frequent token's share",
    run=_run,
    score=lambda guess, truth: top1(guess, truth.target_tokens),
    fires_on="paper",
    fires_at=0.25,
    by_tokens=False,
)
