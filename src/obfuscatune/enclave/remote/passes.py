"""What all calls of one forward pass share: masks and rotary tables, each sent once, and the number of the pass.

A causal language model hands the same mask and the same cos and sin to every block. A call names them by a number, and
only the first one brings them along; the worker is told to forget them when they are gone here. They tell it positions
and padding, which the shapes and the attention map tell it anyhow, and nothing of the tokens.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.remote.cache import refused_without_mask, take_cache
from obfuscatune.enclave.remote.calls import RemoteCall, version_of
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.protocol.bits import pack_mask


class _Body(threading.local):
    """Where a thread's pass is, with all blocks in one call: several threads may run the model at once.

    Attributes:
        generation: of which the last pass was a step. number: of the pass; no two of any thread have the same.
        shared: tensors that the worker has for this thread's calls, by id.
    """

    is_due = False
    output: weakref.ref[Tensor] | None = None
    generation: object | None = None
    number = 0

    def __init__(self) -> None:
        self.shared: dict[int, _Sent] = {}


class _Running(threading.local):
    """The call of ``generate`` that a thread runs, by an object that is nothing else's."""

    generation: object | None = None


_running = _Running()


@dataclass(frozen=True, slots=True, repr=False)
class _Mask:
    """What calls say of a mask, ``fields``, and its rows that attend to nothing: see `RemoteCall`."""

    fields: dict[str, Any]
    blind: Tensor | None = None
    looked_at: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class _Sent:
    """A tensor that the worker has under a number, as it was in a version and a pass.

    In a pass, because not every change shows in the version: tensors made under ``inference_mode`` have none, and
    writes through numpy do not count.
    """

    tensor: weakref.ref[Tensor]
    version: int
    of_pass: int
    number: int
    mask: _Mask


@contextlib.contextmanager
def one_generation() -> Iterator[None]:
    """The steps in this context belong together: nobody changes the model between two of them."""
    before, _running.generation = _running.generation, object()
    try:
        yield
    finally:
        _running.generation = before


class Passes:
    """Numbers the forward passes of one model, and the tensors that their calls share."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._numbers = itertools.count(1)
        self.number = 0
        self.eager = False  # whether the model's own attention is eager, whose blind rows see all positions alike
        self.config: Any = None  # of the model; says how it makes masks now
        self._body = _Body()

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a pass: a forward pre-hook of the model. The later steps of one ``generate`` count with its first.

        What the worker has a copy of is compared with it by value once in each pass, not at each call: a write to
        ``.data`` shows in nothing else. That takes 1 to 2 ms of a step of GPT-2 small.
        """
        before, self._body.generation = self._body.generation, _running.generation
        cache = take_cache(dict(kwargs))
        goes_on = before is not None and before is _running.generation and cache is not None and cache.get_seq_length()
        if torch.is_grad_enabled() or not goes_on:
            self.number += 1
        self._body.is_due, self._body.number = True, next(self._numbers)

    def enter_body(self) -> bool:
        """Whether the model's pass has come to the call for all blocks, which each pass does once."""
        due, self._body.is_due, self._body.output = self._body.is_due, False, None
        return due

    def leave_body(self, output: Tensor) -> Tensor:
        """Note what that call gave, and return it."""
        self._body.output = weakref.ref(output)
        return output

    def is_of_body(self, hidden_states: Tensor) -> bool:
        """Whether this is what the call for all blocks gave last."""
        return self._body.output is not None and self._body.output() is hidden_states

    def add_mask(self, call: RemoteCall, mask: Tensor | None) -> None:
        """Tell a call of the mask that ``transformers`` gave, in one of its forms.

        Raises:
            UnsupportedModelError: a mask with values other than allowed and forbidden; none, where that is not causal;
            a mask that is to be trained; or rows that allow nothing in several ways.
        """
        if mask is None:
            # The masks that transformers makes for eager attention are never None: some other code took one away.
            if call.rows[1] > 1 and getattr(self.config, "_attn_implementation", None) == "eager":
                raise refused_without_mask(call.layer)
            return
        if mask.requires_grad and torch.is_grad_enabled():
            raise UnsupportedModelError("gradients of an attention mask", where=call.layer, hint="attention=enclave")
        sent = self._find(mask)
        if sent is None:
            allowed = _allowed(mask, call.layer)
            call.extras["mask"] = pack_mask(allowed)
            sent = self._send(call, mask, self._describe(mask, allowed, call.layer))
        call.header["mask"] = {"id": sent.number, **sent.mask.fields}
        call.blind, call.looked_at = sent.mask.blind, sent.mask.looked_at

    def _describe(self, mask: Tensor, allowed: Tensor, layer: str) -> _Mask:
        """Where a row allows nothing, stock attention gives 0; of least numbers it makes equal weights.

        Raises: UnsupportedModelError where it would do both, or prefer some numbers to others, or give NaN.
        """
        fields: dict[str, Any] = {"shape": list(allowed.shape)}
        blind = ~allowed.any(dim=-1)
        if not blind.any():
            return _Mask(fields)
        rows = mask[blind]
        value = rows[0, 0]
        if mask.dtype != torch.bool and ((rows != value).any() or (self.eager and value.isinf())):
            raise UnsupportedModelError(
                "a mask whose rows that allow nothing hold several numbers, or -inf for eager attention",
                where=layer,
                expected="the dtype's least value in all of them",
                hint="a mask of [rows, keys], of which the model makes that",
            )
        if self.eager or (mask.dtype != torch.bool and not value.isinf()):
            return _Mask({**fields, "uniform": True})
        looked_at = allowed[..., allowed.shape[-1] - allowed.shape[-2] :].any(dim=-2) & blind
        return _Mask(fields, blind.transpose(1, 2), bool(looked_at.any()))

    def add_rotary(self, call: RemoteCall, tables: tuple[Tensor, Tensor] | None) -> None:
        """Tell a call of cos and sin ``[1 or B, T, n]``, as the model's own rotary module gave them."""
        if tables is None:
            return
        cos, sin = tables
        sent = self._find(cos)
        if sent is None:
            call.extras |= {"cos": cos.detach().to(call.dtype), "sin": sin.detach().to(call.dtype)}
            sent = self._send(call, cos, _Mask({}))
        call.header["rotary"] = {"id": sent.number}

    def _find(self, tensor: Tensor) -> _Sent | None:
        """What the worker has of a tensor, if it is as it was."""
        sent = self._body.shared.get(id(tensor))
        if sent is None or sent.tensor() is not tensor or sent.of_pass != self._body.number:
            return None
        return sent if sent.version == version_of(tensor) else None

    def _send(self, call: RemoteCall, tensor: Tensor, mask: _Mask) -> _Sent:
        """Number a tensor that goes with a call; it is found again once the worker has answered."""
        key, number, shared = id(tensor), next(self._numbers), self._body.shared

        def forget(_: Any) -> None:
            if key in shared and shared[key].number == number:
                del shared[key]
                self._session.drop("shared", number)

        def remember() -> None:
            if key in shared:  # the same tensor, changed in place or of an earlier pass
                self._session.drop("shared", shared.pop(key).number)
            shared[key] = sent

        sent = _Sent(weakref.ref(tensor, forget), version_of(tensor), self._body.number, number, mask)
        call.brought.append(number)
        call.when_sent.append(remember)
        return sent


def _allowed(mask: Tensor, layer: str) -> Tensor:
    """Return a bool ``[B, 1, T, S]`` mask, True where attention is allowed, from the forms transformers makes."""
    if mask.dtype != torch.bool:
        allowed = mask == 0
        if not (allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            raise UnsupportedModelError(
                "an additive attention bias",
                where=layer,
                expected="0 or the dtype's least value",
                hint="attention=enclave",
            )
        mask = allowed
    if mask.ndim != 4:
        raise UnsupportedModelError(
            "attention mask",
            got=f"{mask.ndim} dimensions",
            expected="4",
            where=layer,
            hint="[rows, 1, queries, keys], or [rows, keys] for the whole model",
        )
    if mask.shape[1] != 1:
        raise UnsupportedModelError(
            "a mask of each head", got=f"{mask.shape[1]} heads", where=layer, hint="attention=enclave"
        )
    return mask
