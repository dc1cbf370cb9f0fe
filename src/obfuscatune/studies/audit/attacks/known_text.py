r"""A11, known text: pairs of a plain and a keyed row of one stream give the key, and the key reads all other rows.

    X* = X R + c,   R = argmin |X* - X Q - c|

over orthogonal Q where the key is (Procrustes: Schönemann 1966), over all Q where it is not (least squares). d pairs
decide all; of fewer, only the directions that they span are read. The constant c is that of secret biases. Where rows
are mixed, those of a call are taken for the tokens of its text.

Source: A11 in docs/security.md; known-plaintext attacks on rotations, Liu, Giannella and Kargupta 2006.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.attacks.linking import is_orthogonal
from obfuscatune.studies.audit.text import token_rows

STREAMS = ("attention in", "attention out", "mlp in", "mlp out")
_ROUNDING = 1e-6  # relative size of a direction that pairs do not show


@dataclass(frozen=True, slots=True, repr=False)
class Reader:
    """Plain rows from keyed ones: ``(y - there) back + here``."""

    there: Tensor
    back: Tensor
    here: Tensor

    def read(self, rows: Tensor) -> Tensor:
        """Return plain rows ``[n, d]``."""
        return (rows - self.there) @ self.back + self.here


def fit(plain: Tensor, keyed: Tensor, *, orthogonal: bool) -> Reader:
    """Learn to read from pairs ``[n, d]``."""
    there, here = keyed.mean(dim=0), plain.mean(dim=0)
    if not orthogonal:
        return Reader(there, torch.linalg.pinv(keyed - there, rtol=_ROUNDING) @ (plain - here), here)
    u, sizes, v = torch.linalg.svd((keyed - there).mT @ (plain - here), full_matrices=False)
    return Reader(there, u * (sizes > _ROUNDING * sizes[0]) @ v, here)


def fit_stream(sample: Sample, knowledge: Knowledge, block: int, stream: str) -> Reader:
    """Learn to read a stream of a session from the pairs that an attacker knows."""
    if knowledge.pairs is None:
        raise NotApplicableError("no known text")
    plain = knowledge.pairs[block, stream]
    keyed = token_rows(sample.view, block, stream)
    length = min(len(plain), len(keyed))
    return fit(plain[:length], keyed[:length], orthogonal=is_orthogonal(knowledge.profile))


def _run(sample: Sample, knowledge: Knowledge) -> dict[tuple[int, str], Tensor]:
    places = [(block, stream) for block in range(sample.view.blocks) for stream in STREAMS]
    return {place: fit_stream(sample, knowledge, *place).read(token_rows(sample.target, *place)) for place in places}


def _score(guess: dict[tuple[int, str], Tensor], truth: Truth) -> Score:
    """Means at each position are removed: all texts have them in common."""
    found = []
    for place, rows in guess.items():
        plain, read = (_varying(part, truth.target_shape) for part in (truth.target_streams[place], rows))
        found.append(((plain * read).sum() / (plain.norm() * read.norm()).clamp_min(1e-300)).item())
    return Score(sum(found) / len(found), 0.0)


def _varying(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    texts = rows[: shape[0] * shape[1]].view(*shape, -1)
    return texts - texts.mean(dim=0)


ATTACK = Attack(
    id="A11",
    title="known text",
    needs="P",
    source="A11 in docs/security.md; Liu, Giannella and Kargupta 2006",
    metric="cosine of rows read with the target's, means at each position removed, over blocks and streams",
    chance="0: unrelated rows",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.95,
)
