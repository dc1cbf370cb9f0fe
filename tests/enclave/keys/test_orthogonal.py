"""Haar keys have the moments of the uniform distribution on O(n), and QR alone does not."""

import math

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.keys import MasterSecret, haar
from obfuscatune.enclave.keys.orthogonal import haar_blocks

SIGMAS = 6.0  # with about 60 statistics a test, a false failure has chance 1e-7
COUNT = 20_000


def haar_faults(q: Tensor) -> set[str]:
    """The statistics of q [count, n, n] that are more than `SIGMAS` standard errors from their Haar values."""
    count, n = len(q), q.shape[-1]
    second = 1 / n
    fourth = 3 / (n * (n + 2))
    eighth = 105 / (n * (n + 2) * (n + 4) * (n + 6))
    trace = q.diagonal(dim1=-2, dim2=-1).sum(-1)
    statistics = {  # values, their mean, their variance
        "entry mean": (q, 0.0, second),
        "entry variance": (q**2, second, fourth - second**2),
        "fourth moment": (q**4, fourth, eighth - fourth**2),
        "trace mean": (trace, 0.0, 1.0),
        "trace variance": (trace**2, 1.0, 2.0),  # E tr^4 = 3 for n >= 2
        "determinant sign": (torch.linalg.det(q).sign(), 0.0, 1.0),
    }
    return {
        name
        for name, (values, mean, variance) in statistics.items()
        if (values.mean(0) - mean).abs().max().item() > SIGMAS * math.sqrt(variance / count)
    }


@pytest.mark.parametrize("n", [2, 3, 4])
def test_haar_moments(master: MasterSecret, n: int) -> None:
    blocks = haar_blocks(master.stream("haar", str(n)), COUNT, n)
    assert haar_faults(blocks) == set()
    rotation, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert haar_faults(blocks @ rotation) == set()  # invariance, in a basis that the construction does not know


def test_qr_without_the_sign_correction_fails(master: MasterSecret) -> None:
    q, _ = torch.linalg.qr(master.stream("haar", "4").normal(COUNT, 4, 4))
    assert {"entry mean", "trace mean", "determinant sign"} <= haar_faults(q)


def test_qr_of_uniform_noise_fails(master: MasterSecret) -> None:
    q, r = torch.linalg.qr(master.stream("uniform").uniform(COUNT, 4, 4))
    assert haar_faults(q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


def test_key_is_orthogonal_and_counts_its_cost(master: MasterSecret) -> None:
    key = haar(master.stream("x"), 33)
    r = key.dense()
    assert (r @ r.T - torch.eye(33)).abs().max().item() < 1e-14  # measured 1e-15
    assert (key.family, key.size) == ("haar", 33)


def test_key_of_size_one_has_both_signs(master: MasterSecret) -> None:
    stream = master.stream("one")
    assert {haar(stream, 1).dense().item() for _ in range(60)} == {-1.0, 1.0}
