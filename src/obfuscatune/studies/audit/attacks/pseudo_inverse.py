r"""A7, pseudo-inverse: q, k and v in the clear give the text, whatever the key.

    X W_qkv = QKV,  so  X = (QKV - b) W_qkv^+

W_qkv ``[d, 3d]`` has full row rank. A public base stands for the private weights; the first block's X is then looked up
in the base's table of first rows. Keyed q, k, v (per head, or as one), and mixed ones, are taken for plain.

Source: R2 in docs/security.md.
"""

import torch
from torch import Tensor

from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, top1
from obfuscatune.studies.audit.text import look_up, positions, table, token_rows


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    base, rows = knowledge.base, token_rows(sample.target, 0, "qkv")
    if base is None or not len(rows):
        raise NotApplicableError("q, k and v do not cross, and are not computed by the worker")
    if knowledge.profile.attention == "worker":  # else the bias is added in the enclave
        rows = rows - base.bias(0, "qkv")
    x = rows @ torch.linalg.pinv(base.weight(0, "qkv"))
    places = positions(sample.target, "qkv")
    return look_up(x, places, table(knowledge, base.first_rows, "first rows of the base"))


ATTACK = Attack(
    id="A7",
    title="q,k,v pseudo-inverse",
    needs="B",
    source="R2 in docs/security.md",
    metric="share of the target's tokens",
    chance="the most frequent token's share",
    run=_run,
    score=lambda guess, truth: top1(guess, truth.target_tokens),
    fires_on="paper",
    fires_at=0.9,
    by_tokens=False,
)
