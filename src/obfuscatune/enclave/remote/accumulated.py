"""A gradient that the worker has, as its norm in the gradient of a parameter here, its *anchor*.

Training code reads, scales and clears gradients, and here the worker has them. The anchor's gradient is ``n (1, s)``: n
is the Euclidean norm of what the worker has accumulated, and s, the *stamp*, is drawn anew at each backward pass. So it
is known of every gradient that is found in the anchor by which factor training code has scaled what the worker has now:
one of an earlier pass, a sum with one, and a value of another origin have another direction, and are refused.
"""

import math
import secrets
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.errors import UsageError

# A stamp's square is below float64's rounding, so that norms over anchors are those over the numbers n alone, and a
# bound on each number that does nothing to n does nothing to s n either.
_STAMP = 1e-9
_TURNED = 1e-9  # relative; of a stamp. A clip or a scale is off by 1e-15; two stamps are as near once in 1e9 passes.
_ROUNDING = 1e-13  # relative to the largest norm of a sum; measured 1e-16 a term


class Accumulated:
    """The anchor of one LoRA pair.

    Attributes:
        anchor: a parameter ``[2]``, float64: the clipping factor is a quotient of two norms, and must be exactly 1
            where nothing is clipped. Its values stay 0; its gradient tells the worker's norm, which tells of the data.
        factors: the factors of the pair that have a gradient on the worker.
    """

    def __init__(self, where: str) -> None:
        self.anchor = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.factors: frozenset[str] = frozenset()
        self._where = where
        self._expected = (0.0, 0.0)  # the anchor's gradient, if nobody touches it
        self._base: tuple[float, float] | None = None  # the same before the pass that has begun
        self._pass, self._stamp, self._largest = -1, 0.0, 0.0

    def begin(self) -> float | None:
        """Return what the worker multiplies its gradient with before it adds to it; None to clear it.

        Asked in the backward and not in the forward, because training code may clear gradients between the two. Within
        one backward pass autograd sums the increments of all calls before the anchor gets them, so the first call of a
        pass settles it.

        Raises:
            UsageError: as :meth:`scale`.
        """
        if self._pass == (current := _backward_pass()):
            return 1.0
        scale = self.scale()
        self._pass, self._base = current, self._found()
        return scale

    def add(self, norm: float, factors: tuple[str, ...]) -> Tensor:
        """Return the gradient of the anchor for one more call, after which the worker's gradient has this norm."""
        if self._base is not None:  # not before the worker has answered: a call that was not sent changes nothing
            self._expected, self._largest, self._base = self._base, abs(self._base[0]), None
            self._stamp = _STAMP * (0.5 + secrets.randbelow(1 << 32) / (1 << 33))
            if self.anchor.grad is None:
                self.factors = frozenset()
        before, self._expected = self._expected, (norm, norm * self._stamp)
        self._largest = max(norm, self._largest)
        self.factors |= set(factors)
        return torch.tensor([self._expected[0] - before[0], self._expected[1] - before[1]], dtype=torch.float64)

    def lose(self) -> None:
        """Note that the worker may have added what the anchor never got: it is refused until it has been cleared."""
        self._expected, self._base = (math.nan, math.nan), None

    def scale(self) -> float | None:
        """Return the factor by which training code has scaled the worker's gradient; None where it was cleared.

        Raises:
            UsageError: what is found is no multiple of what the worker has.
        """
        if self.anchor.grad is None:
            return None
        (found, turned), (norm, second) = self._found(), self._expected
        slack = _ROUNDING * self._largest
        if abs(found - norm) <= slack and abs(turned - second) <= slack * _STAMP:
            return 1.0
        scale = found / norm if norm else math.nan
        if not abs(turned - scale * second) <= _TURNED * abs(scale * second) + slack * _STAMP:
            raise UsageError(
                "the gradient of LoRA that the worker trains is not, up to one factor, the one that the worker has",
                where=self._where,
                hint="clip_grad_norm_ instead of clip_grad_value_, and zero_grad after a pass that was not for this "
                "step; gradients that are kept, put back or made noisy need lora_placement='enclave'",
            )
        return scale

    def settle(self) -> None:
        """Note that the worker scaled its gradient, or dropped it, as :meth:`scale` said."""
        self._expected = self._found()

    def _found(self) -> tuple[float, float]:
        gradient = self.anchor.grad
        return (0.0, 0.0) if gradient is None else (float(gradient[0]), float(gradient[1]))


def _backward_pass() -> int:
    """Number of the backward pass that runs; torch has no public name for it."""
    return torch._C._current_graph_task_id()


def is_wanted(accumulator: Any) -> bool:
    """Whether the backward pass that runs gives a leaf its gradient, or returns it.

    ``autograd.grad`` and ``backward(inputs=...)`` may be for other tensors, and leave the leaf alone.

    Args:
        accumulator: the leaf's node in the graph.
    """
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:  # what torch says of a leaf that `autograd.grad` was asked for
        return True
