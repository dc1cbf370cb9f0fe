"""A remote linear layer of `strict`: each call's keyed rows are mixed with noise rows by a secret that is used once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.keys import Key
from obfuscatune.enclave.keys.rows import RowMixer
from obfuscatune.enclave.mixing import mix, tile_starts
from obfuscatune.enclave.norm import normalized_rows
from obfuscatune.enclave.session import Session


class MixedLinear(nn.Module):
    """Stands for a linear layer of the model, or for the base layer within PEFT's LoRA layer.

    Forward and backward are two products, with W* and with its transpose, mixed independently; the worker keeps nothing
    between them and is not told that they belong together.

    Args:
        bias: ``[out]``, in the enclave. folded: whether the norm before it is folded into W.
        wire_dtype: of rows and weight on the worker, float32 or float64.
        mixer: of the session. tile: the profile's ``mix_tile``. check: verifies every product, if any.
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
        wire_dtype: torch.dtype,
        mixer: RowMixer,
        tile: int,
        check: Check | None,
    ) -> None:
        super().__init__()
        self.bias: Tensor
        self.register_buffer("bias", bias, persistent=False)
        self.in_features, self.out_features = key_in.size, key_out.size
        self._session, self._segment, self._layer = session, segment, layer
        self._key_in, self._key_out, self._folded = key_in, key_out, folded
        self._dtype, self._mixer, self._tile, self._check = wire_dtype, mixer, tile, check

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[..., out]`` for x ``[..., in]``."""
        rows = normalized_rows(x, folded=self._folded, layer=self._layer)
        y: Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        return y + self.bias

    def product(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` ``[..., out]``, or ``x W^T`` ``[..., in]``, from one call."""
        into, out = self._key_in, self._key_out
        if transpose:  # dx = dy R_out^-T W*^T R_in^T
            rows, width = out.apply_inverse_transpose(x.to(self._dtype)), into.size
        else:
            rows, width = into.apply(x.to(self._dtype)), out.size
        rows = rows.flatten(0, -2)
        if not len(rows):
            return x.new_empty(*x.shape[:-1], width)
        mixed = mix(rows, self._mixer, self._tile)
        header = {"segment": self._segment, "transpose": transpose}
        expected = {"y": ((*mixed.sent.shape[:2], width), self._dtype)}
        _, outputs = self._session.request("multiply", self._layer, header, {"x": mixed.sent}, expected)
        if self._check is not None:
            starts = tile_starts(rows.shape[1], mixed.sent.shape[2])
            self._check.require(
                self._session, self._layer, mixed.sent, outputs["y"], transpose=transpose, starts=starts
            )
        y = mixed.restore(outputs["y"])
        y = into.apply_transpose(y) if transpose else out.apply_inverse(y)
        return y.view(*x.shape[:-1], width).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: MixedLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.product(grad, transpose=True), None
