"""The record of a sharing: primes, points, how many may collude, and how many replies make up a product.

    X(t) = X + t R1 + .. + t^T RT mod p        T numbers drawn for each number shared, fresh each time
    W(t) likewise (``weights="shared"``), or W itself (``"open"``)
    X(t) W(t) is a polynomial of degree 2T (T) in t; its value at 0 is X W

One worker for each point. Any T of them together see uniformly random numbers. Source: Shamir, "How to share a secret",
CACM 1979; products of shares: Ben-Or, Goldwasser, Wigderson, STOC 1988; Yu et al., arXiv 1806.00939.
"""

import functools
import math
from dataclasses import dataclass

from obfuscatune.errors import UsageError
from obfuscatune.protocol.residues import PRIMES

FEWEST_PRIMES, MOST_PRIMES = 2, len(PRIMES)
MOST_COLLUDING = 2  # what the kernel's sums of 16 bits hold


@dataclass(frozen=True, slots=True)
class Scheme:
    """How numbers are shared.

    Attributes:
        primes: of the residues. points: one for each worker, distinct and not zero. threshold: T, how many workers may
            collude. shares_weights: whether the weights are shared too, or only what they are multiplied by.
    """

    primes: tuple[int, ...]
    points: tuple[int, ...]
    threshold: int = 1
    shares_weights: bool = True

    def __post_init__(self) -> None:
        if not set(self.primes) <= set(PRIMES) or len(set(self.primes)) != len(self.primes) or len(self.primes) < 2:
            raise UsageError("primes of a sharing", got=self.primes, expected=f"two or more of {PRIMES}")
        if not 1 <= self.threshold <= MOST_COLLUDING:
            raise UsageError("colluding workers", got=self.threshold, expected=f"1 to {MOST_COLLUDING}")
        points = set(self.points)
        if len(points) != len(self.points) or not all(0 < t < min(self.primes) for t in points):
            raise UsageError("points of a sharing", got=self.points, expected="distinct, above 0, below each prime")
        if len(points) < self.needed:
            raise UsageError(
                "too few workers", got=len(points), expected=f"{self.needed}, so that {self.threshold} may collude"
            )

    @classmethod
    def make(cls, *, primes: int = 6, threshold: int = 1, weights: str = "shared", spares: int = 0) -> "Scheme":
        """The scheme of so many primes, from the largest on, at the points 1, 2, 3, ..

        Raises: `UsageError` where it cannot be.
        """
        if not FEWEST_PRIMES <= primes <= MOST_PRIMES:
            raise UsageError("primes of a sharing", got=primes, expected=f"{FEWEST_PRIMES} to {MOST_PRIMES}")
        needed = threshold * (2 if weights == "shared" else 1) + 1
        return cls(PRIMES[:primes], tuple(range(1, needed + spares + 1)), threshold, weights == "shared")

    @property
    def degree(self) -> int:
        """Of the product as a polynomial in t."""
        return self.threshold * (2 if self.shares_weights else 1)

    @property
    def needed(self) -> int:
        """How many replies give a product."""
        return self.degree + 1

    @property
    def spares(self) -> int:
        """How many workers may be missing."""
        return len(self.points) - self.needed

    @property
    def modulus(self) -> int:
        """M, the product of the primes: integers of size below M / 2 are told apart."""
        return math.prod(self.primes)


@functools.cache
def lagrange(points: tuple[int, ...], at: int, p: int) -> tuple[int, ...]:
    """Return centred c with ``f(at) = sum c_i f(points_i) mod p`` for all polynomials of degree below the count."""
    found = []
    for i, t in enumerate(points):
        c = 1
        for j, u in enumerate(points):
            if i != j:
                c = c * (at - u) * pow(t - u, -1, p) % p
        found.append(centre(c, p))
    return tuple(found)


def centre(x: int, p: int) -> int:
    """The residue of x modulo p that is nearest to zero."""
    return (x + p // 2) % p - p // 2


def share_weights(scheme: Scheme, p: int) -> list[tuple[int, ...]]:
    """Coefficients of the secret and of the T first shares, in each of the others.

    The first T shares are drawn, uniform and independent of the secret, and the polynomial of degree T through them and
    the secret gives the rest. It is the same distribution as with drawn coefficients, because those and the first T
    values determine each other.
    """
    T = scheme.threshold  # noqa: N806
    drawn = (0, *scheme.points[:T])
    return [lagrange(drawn, t, p) for t in scheme.points[T:]]


def lift_factor(scheme: Scheme, p: int) -> int:
    """The inverse c of M / p mod p, of the Chinese remainder theorem: Y is ``sum_p (c Y mod p) M / p mod M``."""
    return pow(scheme.modulus // p, -1, p)
