"""Weak keys that must be found: on the fixtures' real weights, and beside a proper key that must not be.

Where one of these tests finds nothing, or finds a Haar key too, the audit cannot tell weak from strong.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.profiles import resolve
from obfuscatune.studies.audit.algebra import procrustes, relative_error
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.reference import Reference

_SEEDS = 64  # that the operator tries
_REFLECTIONS = 4
_PARTS = 4  # width of the first factor of a Kronecker key
_CAUGHT = 0.5  # relative to |W0|; a key that is not found leaves about sqrt(2)
_SHARE = 0.5  # of a matrix' energy in its first term


@dataclass(frozen=True, slots=True)
class Canary:
    """One weak key: whether it was found and a proper one was not."""

    name: str
    caught: bool
    detail: str


def check_canaries(fixtures: Fixtures, seed: int) -> list[Canary]:
    """Key the private model's q,k,v with each weak key, and with a proper one, and try to find both."""
    profile = resolve("paper")
    base = Reference(fixtures.base, profile).weight(0, "qkv")
    private = Reference(fixtures.private, profile).weight(0, "qkv")
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    proper = _haar(len(base), generator).mT @ private

    def keyed(key: Tensor) -> Tensor:
        return key.mT @ private

    left, right = _haar(_PARTS, generator), _haar(len(base) // _PARTS, generator)
    weak = {
        "fixed seed": (keyed(_haar(len(base), torch.Generator().manual_seed(seed % _SEEDS))), _left_by_seeds, _CAUGHT),
        "four reflections": (keyed(_reflections(len(base), generator)), _left_by_low_rank, _CAUGHT),
        "Kronecker product": (keyed(torch.kron(left, right)), _left_by_one_product, 1 - _SHARE),
    }
    found = []
    for name, (weight, measure, limit) in weak.items():
        here, there = measure(weight, base), measure(proper, base)
        detail = f"leaves {here:.2f} unexplained, a proper key {there:.2f}; limit {limit:.2f}"
        found.append(Canary(name, here < limit <= there, detail))
    return found


def _left_by_seeds(weight: Tensor, base: Tensor) -> float:
    """Try small seeds: the key of one of them undoes the weight."""
    keys = (_haar(len(base), torch.Generator().manual_seed(seed)) for seed in range(_SEEDS))
    return min(relative_error(key @ weight, base) for key in keys)


def _left_by_low_rank(weight: Tensor, base: Tensor) -> float:
    """``R^T W - W0`` is ``W - W0`` plus a matrix of the reflections' number as its rank: take that much away."""
    u, s, v = torch.linalg.svd(weight - base, full_matrices=False)
    rest = (u[:, _REFLECTIONS:] * s[_REFLECTIONS:]) @ v[_REFLECTIONS:]
    return (rest.norm() / base.norm()).item()  # type: ignore[no-any-return]


def _left_by_one_product(weight: Tensor, base: Tensor) -> float:
    """Share of the Procrustes estimate that is no Kronecker product (Van Loan and Pitsianis 1993)."""
    key = procrustes(base.mT, weight.mT).mT
    n = len(base) // _PARTS
    s = torch.linalg.svdvals(key.view(_PARTS, n, _PARTS, n).permute(0, 2, 1, 3).reshape(_PARTS**2, n**2))
    return 1 - (s[0].square() / s.square().sum()).item()  # type: ignore[no-any-return]


def _haar(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # type: ignore[no-any-return]


def _reflections(size: int, generator: torch.Generator) -> Tensor:
    key = torch.eye(size, dtype=torch.float64)
    for _ in range(_REFLECTIONS):
        v = torch.randn(size, generator=generator, dtype=torch.float64)
        key = key - torch.outer(key @ v, v) * (2 / v.square().sum())
    return key
