r"""LoRA that is computed in part on the worker: what each slot contributes to a call.

Plain PEFT computes ``y = x W + s (x A) B``. Where x and y both are in the enclave, PEFT's own layer does that around
the remote linear. Where one of them is not, a *slot* of the call (`slot.py`) does it, and says what crosses. Rotated by
a secret S of the r low-rank numbers:

* :class:`SplitInput` (the first layers of a part): ``u = s (x A) S`` and ``B* = S^-1 B R`` are sent, ``u B*`` is added
  there; where the layers are the model's own to call, and dropout draws, it is all added here;
* :class:`SplitOutput` (the last layer of a part): ``A* = R^-1 A S`` is sent, ``v = x* A*`` comes back, and
  ``s (v S^-1) B`` is added here;
* :class:`PushedPair` (all layers, where the whole body is there): ``A* = R_in^-1 A S`` and ``B* = s S^-1 B R_out`` are
  sent, ``(x* A*) B*`` is added there; no numbers of a token cross;
* ``HeldSlot`` (`held.py`): the worker has both factors, and trains them.

The first three are differentiable, so that the gradients of A and B arrive in plain coordinates, and training equals
plain PEFT.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families import Layer
from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.keys import Key, decode, encode
from obfuscatune.enclave.remote.calls import RemoteCall, version_of
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.remote.slot import Slot

RankKey = Callable[[int], Key]


@dataclass(slots=True, repr=False)  # a repr would show a factor
class _Sent:
    """A factor as the worker has it: of which parameter, in which version and value, compared in which pass."""

    parameter: Tensor
    version: int
    scale: float
    value: Tensor
    number: int

    def is_of(self, parameter: Tensor, scale: float, number: int) -> bool:
        """Whether the worker still has this parameter's value.

        A version counter tells of most changes at once. One of ``parameter.data`` it does not, so values are compared
        too, once in each pass.
        """
        if self.parameter is not parameter or self.version != version_of(parameter) or self.scale != scale:
            return False
        if self.number != number:
            if not torch.equal(parameter, self.value):
                return False
            self.number = number
        return True


class _Pushing(Slot):
    """Slots of which a keyed factor is pushed to the worker whenever it changed."""

    def __init__(self, name: str, layer: Layer, passes: Passes, rank_key: RankKey) -> None:
        super().__init__(name, layer)
        self._passes, self._make_rank_key = passes, rank_key
        self._rank_keys: dict[int, Key] = {}
        self._sent: dict[str, _Sent] = {}

    def rank_key(self, rank: int) -> Key:
        """S: a secret rotation of the r low-rank numbers, one per rank in use."""
        if rank not in self._rank_keys:
            self._rank_keys[rank] = self._make_rank_key(rank)
        return self._rank_keys[rank]

    def columns(self, b: Tensor) -> Tensor:
        """B ``[out, r]`` with its outputs in canonical order."""
        return b if self.layer.columns is None else b.index_select(0, self.layer.columns)

    def push(
        self, call: RemoteCall, name: str, parameter: Tensor, keyed: dict[str, Callable[[], Tensor]], scale: float = 1.0
    ) -> None:
        """Add keyed factors of one parameter to a call, where they are needed: because they changed, or for a gradient.

        Args:
            name: of the parameter in this slot. keyed: by kind (``A``, ``B``, ``c``), how each factor is made of it.
            scale: a number that is in the factor too.
        """
        sent = self._sent.get(name)
        changed = sent is None or not sent.is_of(parameter, scale, self._passes.number)
        for kind, make in keyed.items():
            wire = f"{kind}.{self.name}"
            call.factors.append(wire)
            if changed or (torch.is_grad_enabled() and parameter.requires_grad):
                call.tensors[wire] = make().to(call.dtype)
            if changed:
                call.push.add(wire)
        if changed:
            # From here on the worker may have either value: one whose reply was not used has taken the new one.
            self._sent.pop(name, None)
            now = _Sent(parameter, version_of(parameter), scale, parameter.detach().clone(), self._passes.number)
            # Until the worker has answered it is sent again.
            call.when_sent.append(lambda: self._sent.update({name: now}))


class SplitInput(_Pushing):
    """LoRA whose output stays on the worker.

    Args:
        key: R, under which the layer's columns are there.
        apart: whether the model calls the layer by itself, and the call is of others too, of which any may come first.
            A dropout draws its numbers when the plain model's would, so it cannot be part of that call.
    """

    calls_dropout = True

    def __init__(
        self, name: str, layer: Layer, passes: Passes, rank_key: RankKey, key: Key, *, apart: bool = False
    ) -> None:
        super().__init__(name, layer, passes, rank_key)
        self._key, self._apart = key, apart

    def contribute(self, call: RemoteCall, x: Tensor | None) -> None:
        """Send ``u`` ``[..., r]`` and, where needed, ``B*`` ``[r, out]``."""
        adapter = self.active()
        if adapter is None or x is None or self._waits(adapter):
            return
        a, b = self.lora.lora_A[adapter].weight, self.lora.lora_B[adapter].weight
        rank_key = self.rank_key(a.shape[0])
        call.tensors[f"u.{self.name}"] = encode(self._low_rank(adapter, x), rank_key).to(call.dtype)
        self.push(call, "B", b, {"B": lambda: encode(encode(self.columns(b), rank_key).T, self._key)})

    def late(self, x: Tensor) -> Tensor | None:
        """Return ``s (x A) B`` ``[..., out]`` where the call had to leave it out, when the model calls the layer."""
        if not self._apart or not any(_draws(dropout) for dropout in self.lora.lora_dropout.values()):
            return None  # as in each step of a decoding
        adapter = self.active()
        if adapter is None or not self._waits(adapter):
            return None
        product: Tensor = self._low_rank(adapter, x) @ self.columns(self.lora.lora_B[adapter].weight).T
        return product

    def _low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """``s (x A)`` ``[..., r]``."""
        a = self.lora.lora_A[adapter].weight
        low_rank: Tensor = (self.lora.lora_dropout[adapter](x.to(a.dtype)) @ a.T) * self.lora.scaling[adapter]
        return low_rank

    def _waits(self, adapter: str) -> bool:
        return self._apart and _draws(self.lora.lora_dropout[adapter])


def _draws(dropout: nn.Module) -> bool:
    return type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.training)


class SplitOutput(_Pushing):
    """LoRA whose input stays on the worker. ``key``: R, under which that input is there.

    ``offset`` is what the true input has more than the worker's, ``[in]`` (see ``folding.key_attention``).
    """

    def __init__(
        self, name: str, layer: Layer, passes: Passes, rank_key: RankKey, key: Key, offset: Tensor | None = None
    ) -> None:
        super().__init__(name, layer, passes, rank_key)
        self._key, self._offset = key, offset

    def contribute(self, call: RemoteCall, x: Tensor | None) -> None:
        """Send, where needed, ``A*`` ``[in, r]``, ask for ``v`` ``[..., r]``, and add ``s (x A) B``."""
        adapter = self.active()
        if adapter is None:
            return
        a = self.lora.lora_A[adapter].weight
        rank_key = self.rank_key(a.shape[0])
        self.push(call, "A", a, {"A": lambda: encode(self._key.apply_inverse_transpose(a).T, rank_key)})
        call.shapes[f"v.{self.name}"] = (*call.rows, a.shape[0])
        # Not of ``call`` itself: the two would keep each other, and the worker the call, until the collector comes.
        call.added.append(lambda outputs, blind: self._added(outputs[f"v.{self.name}"], adapter, a, rank_key, blind))

    def _added(self, v: Tensor, adapter: str, a: Tensor, rank_key: Key, blind: Tensor | None) -> Tensor:
        """Return ``s (x A) B`` ``[..., out]``, from the worker's v ``[..., r]``."""
        low_rank = decode(v.to(a.dtype), rank_key)
        if self._offset is not None:
            more = self._offset.to(a.dtype) @ a.T
            low_rank = low_rank + (more if blind is None else more * ~blind)
        product: Tensor = (low_rank * self.lora.scaling[adapter]) @ self.lora.lora_B[adapter].weight.T
        return product


class PushedPair(_Pushing):
    """LoRA whose input and output both stay on the worker: ``y* += (x* A* + c) B*``.

    ``A* = R_in^-1 diag(gain) A S``, ``c = shift A S`` and ``B* = s S^-1 B R_out``: the true input is
    ``x* R_in^-1 diag(gain) + shift``.

    Args:
        key_in: R_in. key_out: R_out.
        gain, shift: ``[in]``, None where they are 1 and 0.
        centred_in, centred_out: whether input or output is of a centred residual stream; ``diag(gain) A`` or B is
            centred then.
    """

    def __init__(
        self,
        name: str,
        layer: Layer,
        passes: Passes,
        rank_key: RankKey,
        *,
        key_in: Key,
        key_out: Key,
        gain: Tensor | None = None,
        shift: Tensor | None = None,
        centred_in: bool = False,
        centred_out: bool = False,
    ) -> None:
        super().__init__(name, layer, passes, rank_key)
        self._key_in, self._key_out, self._gain, self._shift = key_in, key_out, gain, shift
        self._centred_in, self._centred_out = centred_in, centred_out

    def contribute(self, call: RemoteCall, x: Tensor | None) -> None:
        """Send the factors that are needed."""
        adapter = self.active()
        if adapter is None:
            return
        a, b = self.lora.lora_A[adapter].weight, self.lora.lora_B[adapter].weight
        scale = float(self.lora.scaling[adapter])
        rank_key = self.rank_key(a.shape[0])

        def keyed_a() -> Tensor:
            gained = a if self._gain is None else a * self._gain.to(a.dtype)
            gained = centre(gained) if self._centred_in else gained
            return encode(self._key_in.apply_inverse_transpose(gained).T, rank_key)

        def keyed_b() -> Tensor:
            rows = encode(self.columns(b) * scale, rank_key).T
            return encode(centre(rows) if self._centred_out else rows, self._key_out)

        of_a: dict[str, Callable[[], Tensor]] = {"A": keyed_a}
        if (shift := self._shift) is not None:
            of_a["c"] = lambda: encode(shift.to(a.dtype) @ a.T, rank_key)
        self.push(call, "A", a, of_a)
        self.push(call, "B", b, {"B": keyed_b}, scale)
