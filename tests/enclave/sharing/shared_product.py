"""One product through shares, without processes: what the enclave and the workers compute, one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.sharing import coding
from obfuscatune.enclave.sharing.check import FieldCheck
from obfuscatune.enclave.sharing.fixed import Fixed, fixed
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform
from obfuscatune.enclave.sharing.weights import weight_shares
from obfuscatune.worker.residues import ResidueSegment


def seeded_uniform(seed: int = 0) -> Uniform:
    return Uniform(MasterSecret.from_insecure_test_seed(seed).stream("masks"))


@dataclass
class Product:
    """A shared weight with its workers."""

    scheme: Scheme
    integers: Fixed
    check: FieldCheck
    uniform: Uniform
    workers: list[ResidueSegment]

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme, *, checks: int | None = None, seed: int = 0) -> "Product":
        uniform = seeded_uniform(seed)
        integers = fixed(weight, scheme, "w")
        _, shares = weight_shares(integers, scheme, uniform)
        workers = []
        for i, share in enumerate(shares):
            number = f"{torch.randint(2**62, ()).item():032x}"
            spec = {"primes": list(scheme.primes), "point": i + 1, "sharing": number}
            workers.append(ResidueSegment(spec, {"weight": share}, {}))
        return cls(scheme, integers, FieldCheck(integers.integers, scheme, uniform, checks), uniform, workers)

    def rows(self, x: Tensor, *, transpose: bool = False) -> coding.Rows:
        side = self.integers.backward if transpose else self.integers.forward
        sides = self.check.sides(transpose=transpose)
        assert sides is not None
        _, drawn = self.uniform.drawn(self.scheme, x.shape)
        return coding.encode(self.scheme, x, side.before, drawn, most=side.most, vectors=sides[0])

    def replies(self, rows: coding.Rows, *, transpose: bool = False) -> list[Tensor]:
        pairs = zip(self.workers, rows.shares, strict=True)
        return [worker.multiply(share, transpose=transpose) for worker, share in pairs]

    def decode(
        self,
        rows: coding.Rows,
        replies: list[Tensor],
        *,
        transpose: bool = False,
        workers: tuple[int, ...] | None = None,
    ) -> Tensor | None:
        side = self.integers.backward if transpose else self.integers.forward
        sides = self.check.sides(transpose=transpose)
        assert sides is not None
        used = tuple(range(self.scheme.needed)) if workers is None else workers
        points = [self.scheme.points[i] for i in used]
        chosen = [replies[i] for i in used]
        return coding.decode(self.scheme, points, chosen, side.after, rows=rows, vectors=sides[1])

    def __call__(self, x: Tensor, *, transpose: bool = False) -> Tensor:
        rows = self.rows(x, transpose=transpose)
        y = self.decode(rows, self.replies(rows, transpose=transpose), transpose=transpose)
        assert y is not None
        return y
