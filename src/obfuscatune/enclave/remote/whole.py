"""Whole parts on the worker: attention with its KV cache, and the MLP with its activation.

Both key one input, get one output, and split the LoRA of their layers: what enters the first ones as low-rank numbers,
what leaves the last one likewise. They keep PEFT's layers as children under their old names, so that parameters and
state-dict keys are those of the plain model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.keys import decode, encode
from obfuscatune.enclave.remote.cache import CacheMirror, take_cache
from obfuscatune.enclave.remote.calls import RemoteCall, without_autocast
from obfuscatune.enclave.remote.held import HeldSlot
from obfuscatune.enclave.remote.linear import Placed
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.remote.slot import Slot
from obfuscatune.enclave.remote.standing import Standing
from obfuscatune.enclave.remote.withdrawn import Standin
from obfuscatune.errors import UnsupportedModelError

# Arguments that reach a decoder block and mean nothing to it: what masks, rotary tables and the cache say already, what
# the loss takes, and outputs whose hooks refuse them where they cannot be given (`protect`).
_KNOWN = frozenset({"position_ids", "cache_position", "use_cache"})
_KNOWN |= {"num_items_in_batch", "shift_labels", "output_attentions", "output_hidden_states"}
# What packed rows bring for kernels that read no mask, and what tokenizers and `generate` hand on.
_KNOWN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_KNOWN |= {"token_type_ids", "tokenizer", "assistant_tokenizer"}
_AS_EVER = {"is_causal": True}  # arguments that say in this value what is so anyhow


class RemotePart(Standin):
    """Base of both: ``y = decode(worker(encode(x))) + b``, and LoRA.

    Args:
        bias: ``[d]``, added here; None for none. dropout: the model's own on the part's output, here too.
        slots: LoRA of the part's layers. children: what stands for its layers, by old name.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        bias: Tensor | None,
        dropout: nn.Module | None,
        slots: Sequence[Slot],
        children: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        # No buffer: of attention it depends on this enclave's secret, and data parallel training gives every rank the
        # buffers of the first.
        self.bias = bias
        self.placed, self.path, self._dropout, self._slots = placed, placed.path, dropout, slots
        for name, child in children.items():
            self.add_module(name, child)
        self._standing = Standing(self, children, placed.path)
        for slot in slots:
            slot.holder = self
            if isinstance(slot, HeldSlot):
                self.register_parameter(f"anchor_{slot.name}", slot.anchor)

    def _dtype(self) -> torch.dtype:
        return self.placed.dtype

    def call(self, x: Tensor) -> RemoteCall:
        """Return the call for x ``[..., d]``, with what LoRA contributes to it."""
        self._standing.require()
        placed = self.placed
        call = RemoteCall(
            placed.session,
            placed.segment,
            placed.path,
            tensors={"x": encode(placed.rows(x), placed.key_in)},
            shapes={"y": (*x.shape[:-1], placed.key_out.size)},
        )
        for slot in self._slots:
            slot.contribute(call, x)
        return call

    def _bias_of(self, call: RemoteCall) -> Tensor | None:
        return self.bias

    def finish(self, call: RemoteCall) -> Tensor:
        """Do the call and return the part's output ``[..., d]``."""
        outputs = call.run()
        y = decode(outputs["y"], self.placed.key_out)
        bias = self._bias_of(call)
        y = y if bias is None else y + bias
        for add in call.added:
            y = y + add(outputs, call.blind).to(y.dtype)
        return y if self._dropout is None else self._dropout(y)


class RemoteMlp(RemotePart):
    """The MLP on the worker."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``[..., d]``."""
        if hidden_states.ndim == 1:  # a vector, which no call can be of
            return self.forward(hidden_states[None])[0]
        with without_autocast():
            return self.finish(self.call(hidden_states))


class RemoteAttention(RemotePart):
    """Attention on the worker, its KV cache too.

    Args:
        index: of the layer in the cache. own_bias: what is added in the place of ``bias`` to a row that attends to
            nothing: its heads give 0, and neither the bias of v nor the secret one is in that.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        mirror: CacheMirror,
        passes: Passes,
        index: int,
        own_bias: Tensor | None,
        **parts: Any,
    ) -> None:
        super().__init__(placed, **parts)
        self._mirror, self._passes, self._index, self._own_bias = mirror, passes, index, own_bias

    def _bias_of(self, call: RemoteCall) -> Tensor | None:
        if call.blind is None or self.bias is None:
            return self.bias
        own = torch.zeros_like(self.bias) if self._own_bias is None else self._own_bias
        return torch.where(call.blind, own, self.bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return ``[B, T, d]`` and None: attention weights never come back.

        Raises:
            UnsupportedModelError: an argument that is not understood, a mask with values other than allowed and
            forbidden, an unknown kind of cache, or gradients through a cache filled by an earlier call.
        """
        cache = take_cache(kwargs)
        refuse_unknown(kwargs, self.placed.path)
        with without_autocast():
            call = self.call(hidden_states)
            self._passes.add_mask(call, attention_mask)
            self._passes.add_rotary(call, position_embeddings)
            if cache is not None:
                add_cache(call, self._mirror, cache, self._index)
            return self.finish(call), None


def add_cache(call: RemoteCall, mirror: CacheMirror, cache: Any, index: int, passed: Sequence[int] = ()) -> None:
    """Tell a call of ``[B, T, d]`` rows from which cached tokens it goes on; ``passed``: see `CacheMirror.request`."""
    batch, new = call.rows
    call.header["cache"] = mirror.request(
        cache,
        index,
        batch,
        new,
        call.layer,
        continued=not call.trains(),
        masked="mask" in call.header,
        passed=passed,
    )


def refuse_unknown(arguments: dict[str, Any], layer: str) -> None:
    """Refuse arguments of a forward that nothing here would heed, by name.

    Raises:
        UnsupportedModelError: an argument other than None that is not known to say nothing new.
    """
    given = {name: value for name, value in arguments.items() if value is not None and name not in _KNOWN}
    unknown = sorted(name for name, value in given.items() if value is not _AS_EVER.get(name))
    if unknown:
        raise UnsupportedModelError(
            "an argument of the model's forward is not understood where attention runs on the worker",
            got=", ".join(unknown),
            where=layer,
            hint='leave it out, or protect with attention="enclave"',
        )
