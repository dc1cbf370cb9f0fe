"""The whole decoder body on the worker, in one call: the rotated residual stream (`stream`).

What enters and leaves is the centred residual stream under one secret rotation, ``x* = x C R`` with ``C = I - 11^T/d``.
The mean of a row that C takes away is not seen by any LayerNorm, and neither by the final one, in the enclave; so all
that is computed after it is that of the plain model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.cache import CacheMirror
from obfuscatune.enclave.calls import RemoteCall
from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.keys import Key, decode, encode
from obfuscatune.enclave.lora import PushedPair
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.whole import mask_fields
from obfuscatune.errors import UnsupportedModelError


class RemoteBody(nn.Module):
    """Stands in the place of the first block that is on the worker, and does the work of all of them.

    Sends ``x C R`` and returns ``y R^-1``, whose rows are centred: the plain body's less their mean.

    Args:
        key: R, orthogonal.
        index: of the block, which is also the layer of the enclave's cache that mirrors all of the worker's.
        pairs: LoRA of all blocks.

    Attributes:
        gradient_checkpointing: set by ``transformers``, as on its own blocks; the worker recomputes then.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        session: Session,
        *,
        segment: str,
        layer: str,
        key: Key,
        mirror: CacheMirror,
        index: int,
        pairs: list[PushedPair],
    ) -> None:
        super().__init__()
        self._session, self._segment, self._layer = session, segment, layer
        self._key, self._mirror, self._index, self._pairs = key, mirror, index, pairs

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return ``[B, T, d]``.

        Raises:
            UnsupportedModelError: cross-attention, a mask with values other than allowed and forbidden, an unknown
            kind of cache, or gradients through a cache filled by an earlier call.
        """
        if encoder_hidden_states is not None:
            raise UnsupportedModelError("cross-attention", where=self._layer)
        header, mask = mask_fields(attention_mask, self._layer)
        header["recompute"] = self.gradient_checkpointing and self.training
        call = RemoteCall(
            self._session,
            self._segment,
            self._layer,
            tensors={"x": encode(centre(hidden_states), self._key)},
            shapes={"y": tuple(hidden_states.shape)},
            header=header,
            mask=mask,
        )
        self._add_lora(call, hidden_states.dtype)
        if past_key_values is not None:
            trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors.values())
            batch, new, _ = hidden_states.shape
            header["cache"] = self._mirror.request(
                past_key_values, self._index, batch, new, self._layer, continued=not trains
            )
        return decode(call.run()["y"], self._key)

    def _add_lora(self, call: RemoteCall, dtype: torch.dtype) -> None:
        for pair in self._pairs:
            if (adapter := pair.active()) is None:
                continue
            factors, uses, push = pair.inputs(adapter)
            # PEFT keeps the adapter of a bfloat16 model in float32; one call has one dtype.
            call.tensors.update({name: factor.to(dtype) for name, factor in factors.items()})
            call.factors += uses
            call.push |= push


class PassedBlock(nn.Module):
    """Stands in the place of every later block of the body: gives what it gets."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``hidden_states``."""
        return hidden_states


def adopt(shell: nn.Module, block: nn.Module, parts: dict[str, dict[str, nn.Module]]) -> nn.Module:
    """Give ``shell`` the children of ``block``, so that parameters keep their names, and return it.

    Args:
        parts: by name of a child that has left, what stays of its own children: PEFT's layers.
    """
    for name, child in block.named_children():
        shell.add_module(name, nn.ModuleDict(parts[name]) if name in parts else child)
    return shell
