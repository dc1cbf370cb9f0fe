r"""A15, outliers: features much larger than the others are principal directions, and these show rows of the key.

Where one feature has most of the energy, the first principal direction of X R is the row of R of that feature. Tried on
every stream that has a key of its own; the first few directions of each are the guess. Where none has, as in `shared`,
the features themselves are what is looked for.

Source: A15 in docs/security.md; outlier features: Dettmers et al., arXiv 2208.07339.
"""

import torch
from torch import Tensor

from obfuscatune.studies.audit.attack import Attack, Knowledge, Sample, Score, Truth
from obfuscatune.studies.audit.view import STREAMS

_DIRECTIONS = 3
_DRAWS = 64  # of random directions

Guess = dict[tuple[int, str], Tensor]


def _run(sample: Sample, knowledge: Knowledge) -> Guess:
    """Directions ``[3, width]`` by block and stream."""
    view = sample.view
    places = [(block, stream) for block in range(view.blocks) for stream in STREAMS]
    return {place: _principal(view.rows(*place)) for place in places}


def _principal(rows: Tensor) -> Tensor:
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -_DIRECTIONS:].mT  # type: ignore[no-any-return]


def _score(guess: Guess, truth: Truth) -> Score:
    """How much one row of the key a direction is, at the most; of the stream where it is most above chance.

    Chance is what random directions give there, and by how much the best of the streams is above that by luck.
    """
    found: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    keyed = {place for place, key in truth.keys.items() if not torch.equal(key, torch.eye(len(key), dtype=key.dtype))}
    for place, directions in guess.items():
        key = truth.keys.get(place)
        if key is None or (keyed and place not in keyed):
            continue
        drawn = torch.randn(_DRAWS, len(key), _DIRECTIONS, generator=generator, dtype=key.dtype)
        found.setdefault(place[1], []).append(_most(key, torch.cat([directions[None], torch.linalg.qr(drawn).Q.mT])))
    table = torch.stack([torch.stack(part).mean(dim=0) for part in found.values()])  # [streams, 1 + draws]
    usual = table[:, 1:].mean(dim=1)
    above = table - usual[:, None]
    best = above[:, 0].argmax()
    return Score(table[best, 0].item(), (usual[best] + above[:, 1:].amax(dim=0).mean()).item())


def _most(key: Tensor, directions: Tensor) -> Tensor:
    """Largest cosine of one of ``[n, 3, width]`` with a row of the key, ``[n]``."""
    return (torch.nn.functional.normalize(key, dim=1) @ directions.mT).abs().amax(dim=(1, 2))


ATTACK = Attack(
    id="A15",
    title="outlier features",
    needs="N",
    source="A15 in docs/security.md; arXiv 2208.07339",
    metric="cosine of a principal direction with a row of the key",
    chance="that of random directions, some .3",
    run=_run,
    score=_score,
    fires_on="balanced+attention=enclave+mlp=enclave",
    fires_at=0.5,
    by_tokens=False,
)
