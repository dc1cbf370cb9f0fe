"""Uniform residues: the masks, each of a seed of 32 bytes from the operating system's generator that is used once.

ChaCha20 makes the residues (`protocol/expand.py`). A call, a weight and a check have seeds of their own, so that no two
ever share a mask, in a forked process neither.
"""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret, Stream
from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.protocol.expand import SEED_BYTES, expand


class Uniform(Secret):
    """Draws seeds and residues; for any number of threads.

    Args:
        test_stream: gives the seeds instead of the system's generator: for tests only.
    """

    def __init__(self, test_stream: Stream | None = None) -> None:
        self._bytes = secrets.token_bytes if test_stream is None else test_stream.bytes

    def number(self) -> str:
        """Return the number of a sharing, which is not secret: 32 hexadecimal digits that no other has."""
        return self._bytes(16).hex()

    def seed(self) -> bytes:
        """Return a new seed, secret but to the one worker whose share it stands for."""
        return self._bytes(SEED_BYTES)

    def drawn(self, scheme: Scheme, shape: Sequence[int]) -> tuple[list[bytes], Tensor]:
        """Return T seeds and the shares that they stand for, int8 ``[T, L, *shape]``."""
        seeds = [self.seed() for _ in range(scheme.threshold)]
        planes = [expand(seed, scheme.primes, shape) for seed in seeds]
        return seeds, planes[0][None] if len(planes) == 1 else torch.stack(planes)

    def draw(self, scheme: Scheme, *shape: int) -> Tensor:
        """Return uniform centred residues, int8 ``[L, *shape]``, of a seed that nobody else has."""
        return expand(self.seed(), scheme.primes, shape)
