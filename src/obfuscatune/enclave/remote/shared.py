"""Remote linear layers of `shared`: each call is a product of secret shares, made anew, forward and backward alike."""

from collections.abc import Sequence

from torch import Tensor

from obfuscatune.enclave.remote.linear import Placed
from obfuscatune.enclave.remote.product import ProductGroup
from obfuscatune.enclave.sharing.workers import SharedWeight, Workers


class SharedGroup(ProductGroup):
    """Layers that share one input, side by side in one weight.

    Forward and backward are two products, with the weight's shares and with their transposes, under independent masks;
    the workers keep nothing between them.
    """

    def __init__(self, placed: Placed, widths: Sequence[int], *, workers: Workers, weight: SharedWeight) -> None:
        super().__init__(placed, widths)
        self._workers, self._weight = workers, weight

    def product(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` ``[..., out]``, or ``x W^T`` ``[..., in]``, in x's dtype."""
        width = self.placed.key_in.size if transpose else self.placed.key_out.size
        rows = x.reshape(-1, x.shape[-1]).float()
        y = self._workers.product(self._weight, rows, transpose=transpose)
        return y.view(*x.shape[:-1], width).to(x.dtype)
