"""Remote linear layers of `strict`: each call's keyed rows are mixed with noise rows by a secret that is used once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.keys.rows import RowMixer
from obfuscatune.enclave.mixing import mix, tile_starts
from obfuscatune.enclave.remote.linear import Placed
from obfuscatune.enclave.remote.product import ProductGroup
from obfuscatune.enclave.replies import refuse_not_finite


class MixedGroup(ProductGroup):
    """Layers that share one input, mixed.

    Forward and backward are two products, with W* and with its transpose, mixed independently; the worker keeps nothing
    between them and is not told that they belong together.

    Args:
        wire_dtype: of rows and weight on the worker, float32 or float64.
        mixer: of the session. tile: the profile's ``mix_tile``. check: verifies every product, if any.
    """

    def __init__(
        self,
        placed: Placed,
        widths: Sequence[int],
        *,
        wire_dtype: torch.dtype,
        mixer: RowMixer,
        tile: int,
        check: Check | None,
    ) -> None:
        super().__init__(placed, widths)
        self._dtype, self._mixer, self._tile, self._check = wire_dtype, mixer, tile, check

    def product(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` ``[..., out]``, or ``x W^T`` ``[..., in]``, from one call."""
        placed = self.placed
        into, out = placed.key_in, placed.key_out
        if transpose:  # dx = dy R_out^-T W*^T R_in^T
            rows, width = out.apply_inverse_transpose(x.to(self._dtype)), into.size
        else:
            rows, width = into.apply(x.to(self._dtype)), out.size
        rows = rows.flatten(0, -2)
        refuse_not_finite({"x": rows}, placed.path)  # before they are mixed with noise
        mixed = mix(rows, self._mixer, self._tile)
        header = {"segment": placed.segment, "transpose": transpose}
        expected = {"y": ((*mixed.sent.shape[:2], width), self._dtype)}
        _, outputs = placed.session.request("multiply", placed.path, header, {"x": mixed.sent}, expected)
        if self._check is not None:
            starts = tile_starts(rows.shape[1], mixed.sent.shape[2])
            self._check.require(
                placed.session, placed.path, mixed.sent, outputs["y"], transpose=transpose, starts=starts
            )
        y = mixed.restore(outputs["y"])
        y = into.apply_transpose(y) if transpose else out.apply_inverse(y)
        return y.view(*x.shape[:-1], width).to(x.dtype)
