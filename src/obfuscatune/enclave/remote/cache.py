"""The KV cache: kept on the worker, mirrored in the enclave by a stock ``DynamicCache`` of stubs.

``generate`` and its relatives reorder, crop, repeat and select the rows of a cache, and windows forget its first
tokens. Rather than follow each of these, the enclave keeps in the stock cache a stub of four numbers a token: as its
key the row and the position that it had on the worker at the last call, as its value the cache's number and how many
rows there were. At the next call it reads off them which rows, and which tokens, the worker must go on from.
"""

import inspect
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask

from obfuscatune.enclave.session import Session
from obfuscatune.errors import UnsupportedModelError

_ITS_OWN = "let the model make the cache, and pass it on as it came"
_STUBS = (DynamicLayer, DynamicSlidingWindowLayer)
# From transformers 5.24 on; before, where an argument `cache` is that of continuous batching alone.
_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of a forward's arguments, whatever ``transformers`` calls it; None where there is none."""
    cache, of_block = arguments.pop(_NAME, None), arguments.pop("layer_past", None)
    return cache if cache is not None else of_block


def refused_without_mask(layer: str) -> UnsupportedModelError:
    """Return what several tokens without a mask are refused with, where stock attention is not causal then.

    Eager attention forbids nothing, and torch's fused one leaves out the newest tokens, if there are cached ones.
    """
    return UnsupportedModelError(
        "no attention mask, where stock attention is not causal without one",
        where=layer,
        hint="a mask of [rows, 1, queries, keys], such as the model hands to its blocks",
    )


class CacheMirror:
    """Gives the worker's caches numbers, and tells it what became of them in the enclave."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._numbers = itertools.count(1)
        self._known: weakref.WeakKeyDictionary[DynamicCache, int] = weakref.WeakKeyDictionary()
        self._made: tuple[tuple[tuple[int, int, int, int], Tensor, Tensor], ...] = ()

    def request(
        self,
        cache: Any,
        layer_index: int,
        batch: int,
        new: int,
        layer: str,
        *,
        continued: bool,
        masked: bool,
        passed: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Return the ``cache`` field of a forward request, and append ``new`` tokens to the stubs of this layer.

        A call that trains must not go on from an earlier one (``continued=False``): the worker keeps keys and values
        without their graph. ``masked``: whether it has a mask. ``passed``: indices of later layers whose tokens are in
        the same cache of the worker. Their windows get stubs that are never read, because ``transformers`` cannot crop
        a window that was not filled.

        Raises:
            UnsupportedModelError: not a plain DynamicCache, or one that this model did not fill, that was put together
            by hand, or that must not be gone on from; or several tokens that go on from cached ones without a mask.
        """
        if type(cache) is not DynamicCache or not all(type(stub) in _STUBS for stub in cache.layers):
            kind = type(cache).__name__
            hint = "let generate make the cache: leave cache_implementation out"
            raise UnsupportedModelError("kind of KV cache", got=kind, expected="DynamicCache", where=layer, hint=hint)
        number, start, length, rows = self._known.get(cache), 0, 0, None
        stub: Any = cache.layers[layer_index] if layer_index < len(cache.layers) else None
        if stub is not None and stub.is_initialized and stub.keys.numel():
            length = stub.keys.shape[2]
            start, rows = self._read(stub, number, batch, layer)
            if not continued:
                raise UnsupportedModelError(
                    "gradients through a KV cache of an earlier call", where=layer, hint="use torch.no_grad()"
                )
            if new > 1 and not masked:
                raise refused_without_mask(layer)
        if number is None:
            number = next(self._numbers)
            self._known[cache] = number
            weakref.finalize(cache, self._session.drop, "caches", number)
        attended, _ = cache.update(*self._stubs(number, batch, length, new), layer_index)
        if attended.shape[2] != length + new:
            raise UnsupportedModelError("a KV cache that keeps more than is attended to", where=layer, hint=_ITS_OWN)
        for index in passed:
            if index < len(cache.layers) and type(cache.layers[index]) is DynamicSlidingWindowLayer:
                cache.update(*self._stubs(number, batch, length, new), index)
        stub = cache.layers[layer_index]
        kept = stub.keys.shape[2]  # a window keeps the last tokens only
        if rows is not None or start:  # where the worker has the earlier tokens now
            keys, values = self._stubs(number, batch, length + new - kept, kept)
            stub.keys.copy_(keys)
            stub.values.copy_(values)
        return {"id": number, "start": start, "length": length, "rows": rows}

    def _read(self, stub: Any, number: int | None, batch: int, layer: str) -> tuple[int, list[int] | None]:
        """Return from which token, and from which rows, the worker is to go on; None for all rows as they are there.

        Every token is looked at: rows of two caches joined by hand would go on from those of one.
        """
        keys, values, length = stub.keys, stub.values, stub.keys.shape[2]
        if number is not None and values[0, 0, 0, 0] == number:
            start = int(keys[0, 0, 0, 1])
            if all(map(_are_same, (keys, values), self._stubs(number, batch, start, length))):
                return start, None  # as in nearly all steps
            rows, positions = keys[:, 0, :, 0], keys[:, 0, :, 1]
            if (
                (values[:, 0, :, 0] == number).all()
                and (positions == torch.arange(start, start + length)).all()
                and (rows == rows[:, :1]).all()
            ):
                return start, [int(row) for row in rows[:, 0].tolist()]
        raise UnsupportedModelError(
            "a KV cache that this model did not fill, a copy of one, or one that was put together of several",
            where=layer,
            hint='pass the cache itself; of prefix tuning, which makes its own, attention="enclave"',
        )

    def _stubs(self, number: int, batch: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Stubs of ``count`` tokens from position ``first`` on, as keys and values; not to be written to."""
        asked = (number, batch, first, count)
        for made, keys, values in self._made:  # all layers of a step ask for the same, the old tokens and the new
            if made == asked:
                return keys, values
        rows = torch.arange(batch, dtype=torch.float64).view(batch, 1, 1).expand(batch, 1, count)
        positions = torch.arange(first, first + count, dtype=torch.float64).expand(batch, 1, count)
        keys = torch.stack([rows, positions], dim=-1)
        values = torch.tensor([number, batch], dtype=torch.float64).expand_as(keys)
        self._made = ((asked, keys, values), *self._made[:3])  # a new tuple, as several threads may ask
        return keys, values


def _are_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
