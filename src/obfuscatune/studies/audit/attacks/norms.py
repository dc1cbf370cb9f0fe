"""A8, norms: an orthogonal key keeps the norm of each row, and the embedding tables tell each token's.

The first block's row of a token at a position has one norm; the entry with the nearest norm is taken. Where norms are
folded, rows are normalized and only the epsilon of the norm is left: ``|x|^2 = d var / (var + eps)``. With the small
variance of embeddings this still differs by more than the rounding of float32.

Source: A8 in docs/security.md.
"""

from torch import Tensor

from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, top1
from obfuscatune.studies.audit.text import FIRST, positions, table, token_rows


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    if knowledge.embeddings is None:
        raise NotApplicableError("no embedding tables")
    norms = table(knowledge, knowledge.embeddings.first_rows, "first rows").double().norm(dim=2)
    rows, places = token_rows(sample.target, *FIRST).norm(dim=1), positions(sample.target, FIRST[1])
    return (norms[places] - rows[:, None]).abs().argmin(dim=1)  # type: ignore[no-any-return]


ATTACK = Attack(
    id="A8",
    title="row norms",
    needs="E",
    source="A8 in docs/security.md",
    metric="share of the target's tokens",
    chance="the most frequent token's share",
    run=_run,
    score=lambda guess, truth: top1(guess, truth.target_tokens),
    fires_on="paper",
    fires_at=0.8,
    by_tokens=False,
)
