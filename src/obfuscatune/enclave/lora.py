r"""LoRA around and into remote layers, with the optimizer in the enclave (``enclave`` and ``split`` placement).

Plain PEFT computes ``y = x W + s (x A) B``. Where x and y both are in the enclave, PEFT's own layer does that around
the remote linear. Where one of them is not, the product is split, and what crosses is r numbers per token, keyed by a
secret rotation S:

* :class:`SplitInput` (q,k,v and the MLP's first layer): ``u = s (x A) S`` and ``B* = S^-1 B R`` are sent, ``u B*`` is
  added there;
* :class:`SplitOutput` (attention's and the MLP's output): ``A* = R^-1 A S`` is sent, ``v = x* A*`` comes back, and
  ``s (v S^-1) B`` is added here.

All of it is differentiable, so that the gradients of A and B arrive in plain coordinates, and training equals plain
PEFT.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.errors import UnsupportedModelError
from obfuscatune.keys import Key, decode, encode

RankKey = Callable[[int], Key]


class _Split:
    """What both kinds share: PEFT's layer, the active adapter, and the last factor that the worker was sent."""

    def __init__(self, slot: str, layer: nn.Module, path: str, rank_key: RankKey, key: Key) -> None:
        self.slot, self.layer, self.path, self.key = slot, layer, path, key
        self._make_rank_key = rank_key
        self._rank_keys: dict[int, Key] = {}
        self._sent: Tensor | None = None
        self._pending: Tensor | None = None

    def active(self) -> str | None:
        """Name of the adapter in use, or None where adapters are disabled."""
        layer: Any = self.layer
        refuse_rows_of_adapters(layer, self.path)
        if layer.disable_adapters or not layer.active_adapters:
            return None
        if len(layer.active_adapters) != 1 or layer.merged:
            raise UnsupportedModelError(
                "more than one active adapter, or a merged one", where=self.path, hint="model.set_adapter(NAME)"
            )
        name: str = layer.active_adapters[0]
        return name if name in layer.lora_A else None

    def rank(self, adapter: str) -> int:
        """R of that adapter here."""
        layer: Any = self.layer
        return int(layer.lora_A[adapter].weight.shape[0])

    def rank_key(self, rank: int) -> Key:
        """S: a secret rotation of the r low-rank numbers, one per rank in use."""
        if rank not in self._rank_keys:
            self._rank_keys[rank] = self._make_rank_key(rank)
        return self._rank_keys[rank]

    def factor(self, parameter: Tensor, keyed: Callable[[], Tensor]) -> tuple[Tensor | None, bool]:
        """Return the keyed factor where it is needed, and whether to send it.

        Compares values, not version counters: ``parameter.data`` can be changed without one.
        """
        changed = self._sent is None or not torch.equal(parameter, self._sent)
        if changed:
            self._pending = parameter.detach().clone()
        needed = changed or (torch.is_grad_enabled() and parameter.requires_grad)
        return (keyed() if needed else None), changed

    def sent(self) -> None:
        """Note that the factor which :meth:`factor` gave has arrived; until then it is sent again."""
        self._sent = self._pending


def refuse_rows_of_adapters(layer: nn.Module, path: str) -> None:
    """Refuse another adapter for each row of a batch: PEFT tells its layers by a hook, and they are not called here."""
    if layer._forward_pre_hooks:
        raise UnsupportedModelError("adapter_names, or another hook on a LoRA layer", where=path)


class SplitInput(_Split):
    """LoRA whose output stays on the worker. ``key``: R, under which the segment's inner output is."""

    def inputs(self, x: Tensor, adapter: str) -> tuple[dict[str, Tensor], bool]:
        """Return ``u`` ``[..., r]`` and, where needed, ``B*`` ``[r, out]``; and whether B* is new to the worker."""
        layer: Any = self.layer
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        rank_key = self.rank_key(a.shape[0])
        product = layer.lora_dropout[adapter](x.to(a.dtype)) @ a.T
        tensors = {f"u.{self.slot}": encode(product * layer.scaling[adapter], rank_key)}
        factor, changed = self.factor(b, lambda: encode(encode(b, rank_key).T, self.key))
        if factor is not None:
            tensors[f"B.{self.slot}"] = factor
        return tensors, changed


class SplitOutput(_Split):
    """LoRA whose input stays on the worker. ``key``: R, under which that input is there.

    ``offset`` is what the true input has more than the worker's, ``[in]`` (see ``folding.key_attention``).
    """

    def __init__(
        self, slot: str, layer: nn.Module, path: str, rank_key: RankKey, key: Key, offset: Tensor | None = None
    ) -> None:
        super().__init__(slot, layer, path, rank_key, key)
        self.offset = offset

    def inputs(self, adapter: str) -> tuple[dict[str, Tensor], bool]:
        """Return, where needed, ``A*`` ``[in, r]``; and whether it is new to the worker."""
        layer: Any = self.layer
        a = layer.lora_A[adapter].weight
        rank_key = self.rank_key(a.shape[0])
        factor, changed = self.factor(a, lambda: encode(self.key.apply_inverse_transpose(a).T, rank_key))
        return ({} if factor is None else {f"A.{self.slot}": factor}), changed

    def product(self, v: Tensor, adapter: str) -> Tensor:
        """Return ``s (x A) B`` from what came back, ``v`` ``[..., r]``."""
        layer: Any = self.layer
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        low_rank = decode(v.to(a.dtype), self.rank_key(a.shape[0]))
        if self.offset is not None:
            low_rank = low_rank + self.offset.to(a.dtype) @ a.T
        product: Tensor = (low_rank * layer.scaling[adapter]) @ b.T
        return product
