"""From rows to tokens: what attacks on text share.

The first block's rows depend on token and position alone, so whoever has embeddings has a table of all of them. Shapes
show positions; where rows are mixed they show nothing, and a row is taken for the token that it would be unmixed: were
there no mixing, these attacks would succeed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.attack import Knowledge
from obfuscatune.studies.audit.view import STREAMS_OF, WorkerView

FIRST = (0, "attention in")
FIRST_WEIGHT = (0, "qkv")


def positions(view: WorkerView, stream: str) -> Tensor:
    """Return the position of each row ``[n]`` of `token_rows` of a stream."""
    return torch.cat([torch.arange(length).repeat(texts) for texts, length in _texts(view, 0, stream)])


def length_of(view: WorkerView) -> int:
    """Return how long the texts of a view's first pass are."""
    return _texts(view, *FIRST)[0][1]


def token_rows(view: WorkerView, block: int, stream: str) -> Tensor:
    """Return a stream's rows ``[n, width]``, one for each token: where they are mixed, a call has more of them."""
    if not view.mixed:
        return view.rows(block, stream)
    calls = zip(view.calls(block, _role(stream)), _texts(view, block, stream), strict=True)
    return torch.cat([call.streams()[stream][: texts * length] for call, (texts, length) in calls])


def tokens_of_calls(view: WorkerView) -> list[int]:
    """Return how many tokens each pass has."""
    return [texts * length for texts, length in _texts(view, *FIRST)]


def _texts(view: WorkerView, block: int, stream: str) -> list[tuple[int, int]]:
    """Number and length of the texts of each forward pass: shapes show them, and are padded where rows are mixed."""
    if view.mixed:
        pairs = zip(view.passes, view.texts, strict=True)
        return [texts for calls, texts in pairs if not calls[0].backward]
    shapes = [call.inputs["x"].shape for call in view.calls(block, _role(stream))]
    return [(shape[0], shape[1]) for shape in shapes]


def _role(stream: str) -> str:
    """The role whose segment a stream enters or leaves."""
    return next(role for role, names in STREAMS_OF.items() if stream in names)


def table(knowledge: Knowledge, first_rows: Callable[[Tensor, Tensor], Tensor], name: str) -> Tensor:
    """Return the first rows of all tokens at all positions ``[T, vocabulary, d]``, float32; name: whose they are."""
    if name not in knowledge.cache:
        tokens = torch.arange(knowledge.vocabulary)
        places = range(knowledge.corpus.shape[1])
        knowledge.cache[name] = torch.stack([first_rows(tokens, torch.full_like(tokens, p)).float() for p in places])
    found: Tensor = knowledge.cache[name]
    return found


def look_up(rows: Tensor, places: Tensor, tables: Tensor) -> Tensor:
    """Return the token ``[n]`` of each row ``[n, d]`` at its position ``[n]``: the entry with the largest cosine."""
    tokens = torch.zeros(len(rows), dtype=torch.long)
    for place in places.unique():  # type: ignore[no-untyped-call]
        here = places == place
        tokens[here] = (rows[here].float() @ normalize(tables[place], dim=1).mT).argmax(dim=1)
    return tokens
