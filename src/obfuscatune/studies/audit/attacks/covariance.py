r"""A26, covariance matching: a key turns second moments, and a public base shows what they were.

The covariance of rows X R is R^T cov(X) R, so its eigenvectors are R^T times those of X in the same order; the base's
streams on public text give those of X, up to sign. The signs are those under which means and third moments agree. Means
by position are turned by the same key, and are added. What is near right is then refined: the first block's rows depend
on token and position alone, so the base makes a table of all of them; each row's likely tokens under the present key,
with their frequencies in public text as the prior, give a better key by Procrustes, and so on (expectation
maximization, then the best match alone). The tokens read there give the base's rows of all other blocks. Where rows
do not fit the table, other blocks are matched with the base's rows on public text.

Where rows are mixed, their second moments are constant by construction. Tried instead: what rounding left of them,
their change from call to call, and moments weighted by the squares of norms.

Source: R10 in docs/security.md; the refinement is that of unsupervised alignment (Grave et al., arXiv 1805.11222).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.algebra import centred, polar, procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth, top1
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.text import length_of, token_rows
from obfuscatune.studies.audit.view import STREAMS_OF, WorkerView

STREAMS = ("attention in", "mlp in")
Place = tuple[int, str]
_ROWS = 1024  # rows that are matched
_MEANS = 3.0  # weight of the means by position against that of the principal directions
_SHARPNESS = [5.0 * 1.2**step for step in range(20)]  # of the likelihood in a cosine, growing
_MATCHES = 20
_TRUSTED = 0.8  # mean cosine of the first block's rows with the table's, from which its tokens are believed


@dataclass(frozen=True, slots=True, repr=False)
class Matched:
    """Keys ``[d, d]`` by block and stream, and the target's tokens ``[n]``."""

    keys: dict[Place, Tensor]
    tokens: Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Known:
    """What rows could be: ``tables`` ``[P, m, d]``, one for each of P groups of rows, and log frequencies ``[m]``."""

    tables: Tensor
    prior: Tensor

    def means(self) -> Tensor:
        """Mean row of each group ``[P, d]``."""
        return torch.einsum("m,pmd->pd", self.prior.softmax(dim=0), self.tables)


def match_moments(second: Tensor, rows: Tensor, known: "Known", base: Tensor) -> Tensor:
    """The key under which principal directions, their signs and means agree.

    Args:
        second: moment ``[d, d]`` under the key. rows: ``[P, n, d]``, by group. base: the base's rows ``[n, d]``.
    """
    flat, means, base_means = rows.flatten(0, 1), rows.mean(dim=1), known.means()
    size, there = torch.linalg.eigh(second * (flat.var(dim=0).sum() / second.trace()))
    base_size, here = torch.linalg.eigh(torch.cov(base.T))
    odd = ((means @ there) * (base_means @ here)).mean(dim=0) / (size * base_size).clamp_min(1e-30).sqrt()
    odd = odd + _skewness(flat @ there) * _skewness(base @ here)
    spreads = (size * base_size).clamp_min(0).sqrt() * torch.where(odd < 0, -1.0, 1.0)
    return polar(here * spreads @ there.mT + _MEANS * base_means.mT @ means / len(rows))


def _skewness(x: Tensor) -> Tensor:
    return (centred(x) / x.std(dim=0).clamp_min(1e-30)).pow(3).mean(dim=0)


def _seconds(view: WorkerView, place: Place) -> Iterator[Tensor]:
    """The second moments to try."""
    rows = view.rows(*place)
    yield torch.cov(rows.T)
    if view.mixed:
        yield torch.cov(token_rows(view, *place).T)
        yield rows.mT @ (rows * rows.square().sum(dim=1, keepdim=True))
        role = next(role for role, streams in STREAMS_OF.items() if place[1] in streams)
        parts = [call.streams()[place[1]] for call in view.calls(place[0], role)]
        changes = [a[: len(b)] - b[: len(a)] for a, b in pairwise(parts)]
        if changes:
            yield torch.stack([change.mT @ change for change in changes]).sum(dim=0)


def refine(key: Tensor, rows: Tensor, known: Known) -> tuple[Tensor, float]:
    """Match rows ``[P, n, d]`` under the key with what they could be, solve for the key, and again.

    In the end the best match of the better half of the rows counts. Returns the key and the mean cosine of the last
    matches.
    """
    normalized, flat = normalize(known.tables, dim=2), rows.flatten(0, 1)
    for sharpness in _SHARPNESS:
        likely = (sharpness * (normalize(rows @ key.mT, dim=2) @ normalized.mT) + known.prior).softmax(dim=2)
        key = procrustes(flat, (likely @ known.tables).flatten(0, 1))
    for _ in range(_MATCHES):
        cosines, index = (normalize(rows @ key.mT, dim=2) @ normalized.mT).max(dim=2)
        matched = known.tables.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2])).flatten(0, 1)
        better = cosines.flatten() >= cosines.median()
        key = procrustes(flat[better], matched[better])
    return key, _fit(key, rows, normalized)


def _fit(key: Tensor, rows: Tensor, normalized: Tensor) -> float:
    return (normalize(rows @ key.mT, dim=2) @ normalized.mT).amax(dim=2).mean().item()


def _match(view: WorkerView, place: Place, rows: Tensor, base: Tensor, known: Known) -> tuple[Tensor, float]:
    """The key of a stream, and its fit; rows ``[P, n, d]`` as in `refine`, base ``[n, d]``."""
    seconds = [second.to(rows.dtype) for second in _seconds(view, place)]
    keys = [match_moments(second, rows, known, base.to(rows.dtype)) for second in seconds]
    if len(keys) > 1:
        normalized = normalize(known.tables, dim=2)
        keys.sort(key=lambda key: _fit(key, rows, normalized), reverse=True)
    return refine(keys[0], rows, known)


def _by_position(rows: Tensor, length: int, most: int | None = None) -> Tensor:
    """Rows ``[n, d]`` of whole texts as ``[length, texts, d]``, float32, of at most so many rows."""
    texts = max(1, min(len(rows), most or len(rows)) // length)
    return rows[: texts * length].float().view(texts, -1, rows.shape[1]).transpose(0, 1).contiguous()


def _table(knowledge: Knowledge, base: Reference) -> Known:
    """The base's first rows of every token, by position, and how frequent tokens are in public text."""
    if "first rows and their frequencies" not in knowledge.cache:
        tokens = torch.arange(knowledge.vocabulary)
        places = range(knowledge.corpus.shape[1])
        tables = [base.first_rows(tokens, torch.full_like(tokens, place)).float() for place in places]
        counts = knowledge.library.flatten().bincount(minlength=len(tokens)) + 0.1
        knowledge.cache["first rows and their frequencies"] = Known(torch.stack(tables), (counts / counts.sum()).log())
    found: Known = knowledge.cache["first rows and their frequencies"]
    return found


def _read(key: Tensor, rows: Tensor, known: Known) -> Tensor:
    """Tokens ``[texts, T]`` of rows ``[T, texts, d]``."""
    tables = normalize(known.tables[: len(rows)], dim=2)
    return (normalize(rows @ key.mT, dim=2) @ tables.mT).argmax(dim=2).mT


def _run(sample: Sample, knowledge: Knowledge) -> Matched:
    view, base = sample.view, knowledge.base
    if base is None:
        raise NotApplicableError("no base")
    streams, table = knowledge.base_streams(), _table(knowledge, base)
    first, *others = [(block, stream) for block in range(view.blocks) for stream in STREAMS]
    rows = _by_position(token_rows(view, *first), length_of(view), _ROWS)
    key, fit = _match(view, first, rows, streams[first], Known(table.tables[: len(rows)], table.prior))
    keys = {first: key.double()}
    tokens = _read(key, _by_position(token_rows(sample.target, *first), length_of(sample.target)), table).flatten()
    if fit > _TRUSTED:
        texts = _read(key, rows, table)
        plain = base.streams([texts], STREAMS)
        keys |= {place: procrustes(token_rows(view, *place)[: texts.numel()], plain[place]) for place in others}
        return Matched(keys, tokens)
    for place in others:
        some, could_be = (_some(part, _ROWS // 2)[None].float() for part in (token_rows(view, *place), streams[place]))
        known = Known(could_be, torch.zeros(could_be.shape[1]))
        keys[place] = _match(view, place, some, streams[place], known)[0].double()
    return Matched(keys, tokens)


def _some(rows: Tensor, most: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]


def _score(guess: Matched, truth: Truth) -> Score:
    """The correlation weighs directions by their energy."""
    found = []
    for place, key in guess.keys.items():
        plain = centred(truth.streams[place])
        read = plain @ truth.keys[place] @ key.mT
        found.append(((plain * read).sum() / (plain.norm() * read.norm())).item())
    return Score(sum(found) / len(found), 0.0, top1(guess.tokens, truth.target_tokens).success)


ATTACK = Attack(
    id="A26",
    title="covariance matching",
    needs="B",
    source="R10 in docs/security.md; arXiv 1805.11222",
    metric="correlation of activations under the guessed keys with the private ones, means removed; value: token top-1",
    chance="0: random directions",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.5,
)
