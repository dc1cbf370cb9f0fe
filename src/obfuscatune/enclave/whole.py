"""Whole submodules on the worker: attention with its KV cache, and the MLP with its activation.

Both key one input, get one output, and split the LoRA of their two linear layers: what enters the first one as
low-rank numbers, what leaves the second one likewise. They keep PEFT's layers as children under their old names, so
that parameters and state-dict keys are those of the plain model.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.cache import CacheMirror
from obfuscatune.enclave.calls import RemoteCall
from obfuscatune.enclave.held import HeldSlot
from obfuscatune.enclave.keys import Key, decode, encode
from obfuscatune.enclave.linear import add_lora
from obfuscatune.enclave.lora import SplitInput, SplitOutput
from obfuscatune.enclave.norm import normalized_rows
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.protocol.bits import pack_mask


@dataclass(slots=True)
class WholeSlots:
    """LoRA of a whole submodule: at most one of split and held at each of its two linear layers."""

    first: str
    last: str
    split_first: SplitInput | None = None
    split_last: SplitOutput | None = None
    held_first: HeldSlot | None = None
    held_last: HeldSlot | None = None


class RemoteWhole(nn.Module):
    """Base of both: ``y = decode(worker(encode(x))) + b``, and LoRA.

    Args:
        bias: ``[d]``, added here. folded: whether the norm before it is folded. children: PEFT's layers by old name.
    """

    def __init__(
        self,
        session: Session,
        *,
        segment: str,
        layer: str,
        key_in: Key,
        key_out: Key,
        bias: Tensor,
        folded: bool,
        slots: WholeSlots,
        children: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self.bias: Tensor
        self.register_buffer("bias", bias, persistent=False)
        self._session, self._segment, self._layer = session, segment, layer
        self._key_in, self._key_out, self._folded, self._slots = key_in, key_out, folded, slots
        for name, child in children.items():
            self.add_module(name, child)
        for held, name in ((slots.held_first, slots.first), (slots.held_last, slots.last)):
            if held is not None:
                self.register_parameter(f"anchor_{name}", held.anchor)

    def remote(self, x: Tensor, header: dict[str, Any], mask: Tensor | None) -> Tensor:
        """Do the call for x ``[..., d]`` and return ``[..., d]``."""
        slots = self._slots
        rows = normalized_rows(x, folded=self._folded, layer=self._layer)
        call = RemoteCall(
            self._session,
            self._segment,
            self._layer,
            tensors={"x": encode(rows, self._key_in)},
            shapes={"y": (*x.shape[:-1], self._key_out.size)},
            header=header,
            mask=mask,
        )
        add_lora(call, x, split=slots.split_first, held=slots.held_first, slot=slots.first)
        adapter = slots.split_last.active() if slots.split_last is not None else None
        if slots.split_last is not None and adapter is not None:
            tensors, changed = slots.split_last.inputs(adapter)
            call.tensors.update({name: tensor.to(x.dtype) for name, tensor in tensors.items()})
            call.factors.append(f"A.{slots.last}")
            call.shapes[f"v.{slots.last}"] = (*x.shape[:-1], slots.split_last.rank(adapter))
            if changed:
                call.push[f"A.{slots.last}"] = partial(slots.split_last.sent, "A")
        if slots.held_last is not None and slots.held_last.begin_forward():
            call.held[slots.last] = slots.held_last
        outputs = call.run()
        y: Tensor = decode(outputs["y"], self._key_out) + self.bias
        if slots.split_last is not None and adapter is not None:
            y = y + slots.split_last.product(outputs[f"v.{slots.last}"], adapter).to(y.dtype)
        return y


class RemoteMlp(RemoteWhole):
    """The MLP on the worker. ``dropout``: the family's dropout on its output, in the enclave."""

    def __init__(self, session: Session, *, dropout: nn.Module, **parts: Any) -> None:
        super().__init__(session, **parts)
        self.dropout = dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``[..., d]``."""
        output: Tensor = self.dropout(self.remote(hidden_states, {}, None))
        return output


class RemoteAttention(RemoteWhole):
    """Attention on the worker, its KV cache too. ``dropout``: the family's dropout on its output, in the enclave."""

    def __init__(self, session: Session, *, dropout: nn.Module, mirror: CacheMirror, index: int, **parts: Any) -> None:
        super().__init__(session, **parts)
        self.dropout, self._mirror, self._index = dropout, mirror, index

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return ``[B, T, d]`` and None: attention weights never come back.

        Raises:
            UnsupportedModelError: cross-attention, a mask with values other than allowed and forbidden, an unknown
            kind of cache, or gradients through a cache filled by an earlier call.
        """
        if encoder_hidden_states is not None:
            raise UnsupportedModelError("cross-attention", where=self._layer)
        header, mask = mask_fields(attention_mask, self._layer)
        if past_key_values is not None:
            trains = torch.is_grad_enabled() and (
                hidden_states.requires_grad or any(p.requires_grad for p in self.parameters())
            )
            batch, new, _ = hidden_states.shape
            header["cache"] = self._mirror.request(
                past_key_values, self._index, batch, new, self._layer, continued=not trains
            )
        return self.dropout(self.remote(hidden_states, header, mask)), None


def mask_fields(attention_mask: Tensor | None, layer: str) -> tuple[dict[str, Any], Tensor | None]:
    """Return the fields of a forward request that tell of a mask in one of transformers' forms, and the mask packed.

    Raises:
        UnsupportedModelError: a mask with values other than allowed and forbidden.
    """
    if attention_mask is None:
        return {"causal": True}, None
    allowed = _allowed(attention_mask, layer)
    return {"causal": False, "mask_shape": list(allowed.shape)}, pack_mask(allowed)


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
        raise UnsupportedModelError("attention mask", got=f"{mask.ndim} dimensions", expected="4", where=layer)
    return mask
