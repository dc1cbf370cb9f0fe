r"""LoRA around and into remote layers, with the optimizer in the enclave (``enclave`` and ``split`` placement).

Plain PEFT computes ``y = x W + s (x A) B``. Where x and y both are in the enclave, PEFT's own layer does that around
the remote linear. Where one of them is not, the product is split, and what crosses is r numbers per token, keyed by a
secret rotation S (:class:`PushedPair`: where neither is, no numbers of a token cross, only both factors):

* :class:`SplitInput` (q,k,v and the MLP's first layer): ``u = s (x A) S`` and ``B* = S^-1 B R`` are sent, ``u B*`` is
  added there;
* :class:`SplitOutput` (attention's and the MLP's output): ``A* = R^-1 A S`` is sent, ``v = x* A*`` comes back, and
  ``s (v S^-1) B`` is added here;
* :class:`PushedPair` (all four, where the whole body is there): ``A* = R_in^-1 A S`` and ``B* = s S^-1 B R_out`` are
  sent, ``(x* A*) B*`` is added there.

All of it is differentiable, so that the gradients of A and B arrive in plain coordinates, and training equals plain
PEFT.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.keys import Key, decode, encode
from obfuscatune.errors import UnsupportedModelError

RankKey = Callable[[int], Key]


class _Split:
    """What all kinds share: PEFT's layer, the active adapter, and the last factors that the worker was sent."""

    def __init__(self, slot: str, layer: nn.Module, path: str, rank_key: RankKey, key: Key) -> None:
        self.slot, self.layer, self.path, self.key = slot, layer, path, key
        self._make_rank_key = rank_key
        self._rank_keys: dict[int, Key] = {}
        self._sent: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

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

    def factor(self, name: str, parameter: Tensor, keyed: Callable[[], Tensor]) -> tuple[Tensor | None, bool]:
        """Return the keyed factor ``name`` (A or B) where it is needed, and whether to send it.

        Compares values, not version counters: ``parameter.data`` can be changed without one.
        """
        changed = name not in self._sent or not torch.equal(parameter, self._sent[name])
        if changed:
            self._pending[name] = parameter.detach().clone()
        needed = changed or (torch.is_grad_enabled() and parameter.requires_grad)
        return (keyed() if needed else None), changed

    def sent(self, name: str) -> None:
        """Note that the factor which :meth:`factor` gave has arrived; until then it is sent again."""
        self._sent[name] = self._pending[name]


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
        factor, changed = self.factor("B", b, lambda: encode(encode(b, rank_key).T, self.key))
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
        factor, changed = self.factor("A", a, lambda: encode(self.key.apply_inverse_transpose(a).T, rank_key))
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


class PushedPair(_Split):
    """LoRA whose input and output both stay on the worker: ``y* += (x* A* + c) B*``.

    ``A* = R_in^-1 diag(gain) A S``, ``c = shift A S`` and ``B* = s S^-1 B R_out``: the true input is
    ``x* R_in^-1 diag(gain) + shift``.

    Args:
        key: R_in. key_out: R_out.
        gain, shift: ``[in]``, None where they are 1 and 0.
        reads, writes: whether input or output is of the centred residual stream; ``diag(gain) A`` or B is centred then.
    """

    def __init__(
        self,
        slot: str,
        layer: nn.Module,
        path: str,
        rank_key: RankKey,
        key: Key,
        *,
        key_out: Key,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        reads: bool = False,
        writes: bool = False,
    ) -> None:
        super().__init__(slot, layer, path, rank_key, key)
        self._key_out, self._gain, self._shift, self._reads, self._writes = key_out, gain, shift, reads, writes

    def inputs(self, adapter: str) -> tuple[dict[str, Tensor], list[str], dict[str, Callable[[], None]]]:
        """Return the factors that are needed, the names of all that the worker uses, and, by name, those to send."""
        layer: Any = self.layer
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        # With its factor: another adapter may have the same values and another factor.
        b = b * layer.scaling[adapter]
        rank_key = self.rank_key(a.shape[0])

        def keyed_a() -> Tensor:
            gained = a if self._gain is None else a * self._gain.to(a.dtype)
            gained = centre(gained) if self._reads else gained
            return encode(self.key.apply_inverse_transpose(gained).T, rank_key)

        def keyed_b() -> Tensor:
            rows = encode(b, rank_key).T
            return encode(centre(rows) if self._writes else rows, self._key_out)

        found: dict[str, Tensor] = {}
        uses = [f"A.{self.slot}", f"B.{self.slot}"]
        push: dict[str, Callable[[], None]] = {}
        for name, parameter, keyed in (("A", a, keyed_a), ("B", b, keyed_b)):
            factor, changed = self.factor(name, parameter, keyed)
            if factor is not None:
                found[f"{name}.{self.slot}"] = factor
            if changed:
                push[f"{name}.{self.slot}"] = partial(self.sent, name)
        if self._shift is not None:
            uses.append(f"c.{self.slot}")
            if f"A.{self.slot}" in found:
                found[f"c.{self.slot}"] = encode(self._shift.to(a.dtype) @ a.T, rank_key)
            if f"A.{self.slot}" in push:
                push[f"c.{self.slot}"] = partial(self.sent, "A")
        return found, uses, push
