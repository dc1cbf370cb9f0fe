"""What a key is: a secret invertible linear map of the feature axis, rows are tokens, x* = x R.

Master factors are float64. Products run in the dtype of x (half dtypes in float32, unless a family says otherwise), on
factors cast once per dtype and device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.errors import KeyFaultError, UsageError
from obfuscatune.protocol.threads import threads_for

ORTHOGONALITY_TOLERANCE = 1e-5  # max |R^T R - I| of the float32 copy; measured 4e-7 at sizes 768 and 1600

Factors = tuple[Tensor, ...]
RowProduct = Callable[[Tensor, Factors], Tensor]  # rows [rows, size] and cast factors to rows
Product = Callable[[Tensor], Tensor]  # one bound method of a key: apply, apply_inverse, ...


class Key(Secret, ABC):
    """A secret invertible matrix R [size, size], known by its products with rows.

    A subclass gives the products of rows [rows, size] with its factors in the dtype and on the device of the rows.

    Args:
        size: width of the feature axis.
        factors: float64 master factors, and int64 index tensors, which keep their dtype.
        singular_range: smallest and largest singular value of R.
    """

    family: str

    def __init__(self, size: int, factors: Factors, *, singular_range: tuple[float, float] = (1.0, 1.0)) -> None:
        if size < 1:
            raise UsageError("a key has an impossible size", got=size, expected="at least 1")
        self.size, self.singular_range = size, singular_range
        self._factors = factors
        self._cast: dict[tuple[torch.dtype, torch.device], Factors] = {}

    def __repr__(self) -> str:
        return f"<{self.family} key of size {self.size}>"

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value: how much R may amplify a relative float error."""
        smallest, largest = self.singular_range
        return largest / smallest

    @property
    def parts(self) -> "tuple[Key, ...]":
        """Independent keys of consecutive columns, which together are this one."""
        return (self,)

    def apply(self, x: Tensor) -> Tensor:
        """Return x R, for x [..., size] of any float dtype, in that dtype. Raises: `UsageError` for another shape."""
        return self._run(self._product, x)

    def apply_inverse(self, x: Tensor) -> Tensor:
        """Return x R^-1; shapes and dtypes as `apply`."""
        return self._run(self._inverse, x)

    def apply_transpose(self, x: Tensor) -> Tensor:
        """Return x R^T; shapes and dtypes as `apply`."""
        return self._run(self._transpose, x)

    def apply_inverse_transpose(self, x: Tensor) -> Tensor:
        """Return x R^-T; shapes and dtypes as `apply`."""
        return self._run(self._inverse_transpose, x)

    def dense(self) -> Tensor:
        """R itself, float64 [size, size]. Secrecy: the whole secret; for folding and tests."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    @abstractmethod
    def _product(self, x: Tensor, factors: Factors) -> Tensor: ...

    @abstractmethod
    def _transpose(self, x: Tensor, factors: Factors) -> Tensor: ...

    @abstractmethod
    def _inverse(self, x: Tensor, factors: Factors) -> Tensor: ...

    @abstractmethod
    def _inverse_transpose(self, x: Tensor, factors: Factors) -> Tensor: ...

    def _check(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.size,) or not x.is_floating_point():
            raise UsageError(
                f"a {self.family} key does not fit",
                got=f"{x.dtype} {list(x.shape)}",
                expected=f"a float dtype and [..., {self.size}]",
            )

    def _run(self, product: RowProduct, x: Tensor) -> Tensor:
        self._check(x)
        rows = x.reshape(-1, self.size)
        dtype = self._compute_dtype(rows)
        rows = rows.to(dtype)
        factors = self._factors_for(dtype, x.device)
        with threads_for(rows.shape[0] * sum(f.numel() for f in factors)):
            if not torch.is_autocast_enabled(x.device.type):
                return product(rows, factors).view(x.shape).to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):  # keys in bfloat16 would cost five digits
                return product(rows, factors).view(x.shape).to(x.dtype)

    def _compute_dtype(self, rows: Tensor) -> torch.dtype:
        """The dtype in which rows are multiplied."""
        return rows.dtype if rows.dtype == torch.float64 else torch.float32

    def _factors_for(self, dtype: torch.dtype, device: torch.device) -> Factors:
        cast = self._cast.get((dtype, device))
        if cast is None:
            cast = tuple(f.to(device, dtype if f.is_floating_point() else None) for f in self._factors)
            self._cast[dtype, device] = cast
        return cast


class OrthogonalKey(Key):
    """A key with R^-1 = R^T: the inverse is exact, the condition number is 1, row norms are kept (and so leak)."""

    def _inverse(self, x: Tensor, factors: Factors) -> Tensor:
        return self._transpose(x, factors)

    def _inverse_transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return self._product(x, factors)


class IdentityKey(OrthogonalKey):
    """No key at all, for the baseline `plain`: every product is x itself, not a copy."""

    family = "identity"

    def __init__(self, size: int) -> None:
        super().__init__(size, ())

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        return x

    _transpose = _product

    def _run(self, product: RowProduct, x: Tensor) -> Tensor:
        self._check(x)
        return x


def check_orthogonal_blocks(family: str, blocks: Tensor) -> None:
    """Refuse blocks [..., n, n] whose float32 copy Q has max |Q^T Q - I| above `ORTHOGONALITY_TOLERANCE`.

    Raises: `KeyFaultError`, which names the family and the size of the error only.
    """
    q = blocks.float()
    error = (q.mT @ q - torch.eye(q.shape[-1], device=q.device)).abs().max().item()
    if not error <= ORTHOGONALITY_TOLERANCE:  # written so that NaN is refused too
        raise KeyFaultError(
            f"a {family} key is not orthogonal", got=f"{error:.1e}", expected=f"at most {ORTHOGONALITY_TOLERANCE:.0e}"
        )


def check_orthogonal(key: Key) -> None:
    """Refuse a key whose float32 product has max |R^T R - I| above `ORTHOGONALITY_TOLERANCE`; costs size^3.

    Raises: `KeyFaultError`.
    """
    check_orthogonal_blocks(key.family, key.apply(torch.eye(key.size)))


class _LinearMap(torch.autograd.Function):
    """y = product(x), dx = adjoint(dy); linear, so nothing is saved for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, adjoint: Product) -> Tensor:
        ctx.adjoint = adjoint
        return product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grad), None, None


def encode(x: Tensor, key: Key) -> Tensor:
    """Return x R, differentiable: dx = dy R^T. Shapes: [..., size]. Secrecy: the result may leave the enclave."""
    return _differentiable(x, key, key.apply, key.apply_transpose)


def decode(y: Tensor, key: Key) -> Tensor:
    """Return y R^-1, differentiable: dy = dx R^-T. Shapes: [..., size]. Secrecy: the result stays inside."""
    return _differentiable(y, key, key.apply_inverse, key.apply_inverse_transpose)


def decode_parts(y: Tensor, key: Key) -> list[Tensor]:
    """Return y R^-1 as one tensor for each of the key's parts, differentiable: as `decode`, but none a piece of y."""
    pieces = torch.unsafe_split_with_sizes(y, [part.size for part in key.parts], dim=-1)
    return [decode(piece, part) for piece, part in zip(pieces, key.parts, strict=True)]


def _differentiable(x: Tensor, key: Key, product: Product, adjoint: Product) -> Tensor:
    if isinstance(key, IdentityKey) or not (x.requires_grad and torch.is_grad_enabled()):
        return product(x)
    result: Tensor = _LinearMap.apply(x, product, adjoint)  # type: ignore[no-untyped-call]
    # A view within is one for autograd too, and could not be changed in place, as a caller's hook on a layer may do.
    return torch.unsafe_split_with_sizes(result, [key.size], dim=-1)[0]
