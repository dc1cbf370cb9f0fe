"""A remote linear layer: ``y = x W + b`` with W on the worker, keyed on both sides."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from obfuscatune.enclave.calls import RemoteCall
from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.held import HeldSlot
from obfuscatune.enclave.keys import Key, decode, encode
from obfuscatune.enclave.lora import SplitInput
from obfuscatune.enclave.norm import normalized_rows
from obfuscatune.enclave.session import Session


class RemoteLinear(nn.Module):
    """Stands for a linear layer of the model, or for the base layer within PEFT's LoRA layer.

    Sends ``x* = x R_in``, receives ``y* = x* W*`` with ``W* = R_in^-1 W R_out``, returns ``y* R_out^-1 + b``.

    Args:
        bias: ``[out]``, in the enclave; with folded norms it holds the norm's bias too.
        folded: whether the norm before it is folded into W.
        check: verifies every product, where the profile says so.
        split, held: LoRA of a placement that PEFT's own layer does not compute, if any.
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
        check: Check | None = None,
        split: SplitInput | None = None,
        held: HeldSlot | None = None,
    ) -> None:
        super().__init__()
        self.bias: Tensor
        self.register_buffer("bias", bias, persistent=False)
        self.in_features, self.out_features = key_in.size, key_out.size
        self._session, self._segment, self._layer = session, segment, layer
        self._key_in, self._key_out, self._folded = key_in, key_out, folded
        self._check, self._split, self._held = check, split, held
        if held is not None:
            self.anchor = held.anchor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[..., out]`` for x ``[..., in]``."""
        rows = normalized_rows(x, folded=self._folded, layer=self._layer)
        call = RemoteCall(
            self._session,
            self._segment,
            self._layer,
            tensors={"x": encode(rows, self._key_in)},
            shapes={"y": (*x.shape[:-1], self.out_features)},
            check=self._check,
        )
        add_lora(call, x, split=self._split, held=self._held, slot="main")
        y = decode(call.run()["y"], self._key_out)
        return y + self.bias


def add_lora(call: RemoteCall, x: Tensor, *, split: SplitInput | None, held: HeldSlot | None, slot: str) -> None:
    """Add to a call what its LoRA slot needs on the input side, if it has one in use."""
    if split is not None and (adapter := split.active()) is not None:
        tensors, changed = split.inputs(x, adapter)
        # PEFT keeps the adapter of a bfloat16 model in float32; one call has one dtype.
        call.tensors.update({name: tensor.to(x.dtype) for name, tensor in tensors.items()})
        call.factors.append(f"B.{slot}")
        if changed:
            call.push[f"B.{slot}"] = partial(split.sent, "B")
    elif held is not None and held.begin_forward():
        call.held[slot] = held
