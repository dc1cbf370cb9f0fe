r"""A17, fingerprints: a token's attention to itself, over layers and heads, is the same under keys of heads.

``q_t . k_t`` is free of every key that cancels in q k^T. The list of it over all layers and heads is looked up among
those of a base on public text, the nearest first. Where biases of keys are replaced (they cancel in the softmax), a
row's mean over what it attends to is subtracted; where heads are in a secret order, each layer's values are sorted.

Source: A17 in docs/security.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, top1


def fingerprints(
    qkv: Callable[[int], Tensor], blocks: int, length: int, heads: int, *, relative: bool, ordered: bool
) -> Tensor:
    """Fingerprints ``[n, blocks * heads]`` of whole texts.

    Args:
        qkv: rows ``[n, 3d]`` of a block. relative: to what else a row attends to. ordered: sort those of a layer.
    """
    found = []
    for block in range(blocks):
        rows = qkv(block)
        texts = rows[: len(rows) // length * length].unflatten(0, (-1, length)).unflatten(2, (3, heads, -1))  # type: ignore[no-untyped-call]
        q, k, _ = texts.permute(2, 0, 3, 1, 4).float()  # [texts, heads, length, width]
        logits = q @ k.mT / q.shape[3] ** 0.5
        own = logits.diagonal(dim1=2, dim2=3)
        if relative:
            own = own - logits.tril().sum(dim=3) / torch.arange(1, length + 1)
        own = own.transpose(1, 2).flatten(0, 1)
        found.append(own.sort(dim=1).values if ordered else own)
    return torch.cat(found, dim=1)


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    base, profile, view = knowledge.base, knowledge.profile, sample.target
    if base is None or not len(view.rows(0, "qkv")):
        raise NotApplicableError("q and k do not cross, and are not computed by the worker")
    length, heads = knowledge.corpus.shape[1], knowledge.heads
    hidden = profile.attention == "worker" and profile.head_keys
    streams = knowledge.base_streams()
    # Where q, k, v return to the enclave, their bias is added there; the base's stands for it.
    biases = [0.0 if profile.attention == "worker" else base.bias(block, "qkv") for block in range(view.blocks)]

    def listed(rows: Callable[[int], Tensor]) -> Tensor:
        return fingerprints(
            lambda block: rows(block) + biases[block], view.blocks, length, heads, relative=hidden, ordered=hidden
        )

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
