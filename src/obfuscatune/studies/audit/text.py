"""From rows to tokens: what attacks on text share.

The first block's rows depend on token and position alone, so whoever has embeddings has a table of all of them. Shapes
show positions; where rows are mixed they show nothing, and a row is taken for the token that it would be unmixed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.enclave.keys.rows import mixed_rows
from obfuscatune.enclave.mixing import padded_rows
from obfuscatune.studies.audit.attack import Knowledge
from obfuscatune.studies.audit.view import STREAMS_OF, WorkerView

FIRST = (0, "attention in")
FIRST_WEIGHT = (0, "qkv")


def positions(view: WorkerView, stream: str, length: int) -> Tensor:
    """Return the position of each row ``[n]`` of a stream; length: of the texts, where shapes do not show it."""
    role = next(role for role, names in STREAMS_OF.items() if stream in names)
    shapes = [call.inputs["x"].shape for call in view.calls(0, role)]
    return torch.cat([torch.arange(s[1]) % length if view.mixed else torch.arange(s[1]).repeat(s[0]) for s in shapes])


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


def tokens_of_calls(view: WorkerView, total: int) -> list[int]:
    """Return how many tokens each pass has, of a text of known length.

    Mixed calls have padded sizes with noise rows; of the sizes that fit, those that add up to the total are taken.
    """
    shapes = [call.inputs["x"].shape for call in view.calls(*FIRST_WEIGHT)]
    if not view.mixed:
        return [shape[0] * shape[1] for shape in shapes]
    sizes = [size for size in range(8, max(shape[1] for shape in shapes) + 1) if padded_rows(size) == size]
    fitting = [[size for size in sizes if mixed_rows(size + shape[2]) == shape[1]] for shape in shapes]
    counts = [found[-1] for found in fitting]
    for i, found in enumerate(fitting):
        counts[i] = next(size for size in found if sum(counts) - counts[i] + size >= min(total, sum(counts)))
    return counts


def rows_of_calls(view: WorkerView, block: int, stream: str, counts: list[int]) -> Tensor:
    """Return so many rows of each call ``[sum, width]``, where a mixed call has more of them than tokens."""
    role = next(role for role, names in STREAMS_OF.items() if stream in names)
    calls = view.calls(block, role)
    return torch.cat([call.streams()[stream][:count] for call, count in zip(calls, counts, strict=False)])
