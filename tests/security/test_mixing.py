"""Why each part of row mixing is there: with it a small attack is at chance, without it the same attack succeeds.

The views are those of calls on rows that an attacker would like: a strong common direction, equal rows, a known row.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.keys.rows import RowMixer
from obfuscatune.enclave.mixing import mix

from .recording import record

TOKENS, WIDTH, NOISE = 24, 32, 40
GENERATOR = torch.Generator().manual_seed(0)
MIXER = RowMixer(MasterSecret.from_insecure_test_seed(4).stream("rows"))
DIRECTION = torch.nn.functional.normalize(torch.randn(WIDTH, generator=GENERATOR), dim=0).double()

View = Callable[[Tensor], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).double()


def rows() -> Tensor:
    """Rows with a strong direction, whose strength differs from call to call."""
    return normal(TOKENS, WIDTH) + 3 * normal(1).abs() * normal(TOKENS, 1) * DIRECTION


def orthogonal(z: Tensor) -> Tensor:
    return torch.linalg.qr(normal(len(z), len(z)))[0] @ z


def as_it_is_built(x: Tensor) -> Tensor:
    return mix(x, MIXER, 512).sent[0]


def without_noise(x: Tensor) -> Tensor:
    return orthogonal(x)


def isotropic_noise(x: Tensor) -> Tensor:
    return orthogonal(torch.cat([x, normal(NOISE, WIDTH)]))


# The mean of X^T X over calls, known exactly: more than a running estimate can have.
_MEAN = sum(x.T @ x for x in (rows() for _ in range(2000))) / 2000
_VALUES, _VECTORS = torch.linalg.eigh(1.05 * torch.linalg.eigvalsh(_MEAN)[-1] * torch.eye(WIDTH) - _MEAN)
_FACTOR = _VECTORS * (_VALUES.sqrt() / NOISE**0.5) @ _VECTORS.T


def noise_that_is_isotropic_on_average(x: Tensor) -> Tensor:
    return orthogonal(torch.cat([x, normal(NOISE, WIDTH) @ _FACTOR]))


def gram_direction(view: View, calls: int = 300) -> float:
    """|cosine| of the strong direction with the top eigenvector of the mean of Y^T Y (A15, A26)."""
    mean = sum(y.T @ y for y in (view(rows()) for _ in range(calls))) / calls
    return abs(torch.linalg.eigh(mean).eigenvectors[:, -1] @ DIRECTION).item()


def change_direction(view: View, calls: int = 300) -> float:
    """|cosine| with the direction in which Y^T Y changes most from call to call."""
    grams = torch.stack([y.T @ y for y in (view(rows()) for _ in range(calls))])
    changes = grams - grams.mean(0)
    return abs(torch.linalg.eigh((changes @ changes).mean(0)).eigenvectors[:, -1] @ DIRECTION).item()


CHANCE = 0.6  # 3.4 standard deviations of a cosine in 32 dimensions


def test_second_moments_show_nothing() -> None:
    assert gram_direction(as_it_is_built) < CHANCE
    assert gram_direction(isotropic_noise) > 0.95  # the control: orthogonal mixing keeps the Gram matrix


def test_changes_of_second_moments_show_nothing() -> None:
    """Why noise completes each call, and does not follow a running covariance."""
    assert change_direction(noise_that_is_isotropic_on_average) > 0.95
    assert change_direction(as_it_is_built) < CHANCE


def outside(row: Tensor, view: Tensor) -> float:
    """How much of a row is outside the span of the view's rows (A23)."""
    basis = torch.linalg.svd(view, full_matrices=False)
    kept = basis.Vh[basis.S / basis.S[0] > 1e-9]
    return ((row - kept.T @ (kept @ row)).norm() / row.norm()).item()


def test_a_candidate_row_cannot_be_checked() -> None:
    x, other = rows(), normal(WIDTH)
    assert outside(x[3], without_noise(x)) < 1e-9 and outside(other, without_noise(x)) > 0.1
    assert outside(x[3], as_it_is_built(x)) < 1e-9 and outside(other, as_it_is_built(x)) < 1e-9


def test_equal_calls_are_not_told_from_others() -> None:
    x = rows()
    views = [as_it_is_built(x) for _ in range(2)] + [as_it_is_built(rows())]
    spectra = [torch.linalg.svdvals(y) for y in views]
    assert all((s - 1).abs().max() < 1e-12 for s in spectra)
    assert views[0].shape == views[1].shape and (views[0] - views[1]).abs().max() > 0.1


def leverage_variance(x: Tensor, calls: int) -> Tensor:
    return torch.stack([mix(x, MIXER, 512).sent[0].square().sum(1).var() for _ in range(calls)])


def auc(a: Tensor, b: Tensor) -> float:
    return (a[:, None] > b[None]).double().mean().item()


def test_norms_of_mixed_rows_do_not_tell_equal_rows_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two rounds would: A is not a Haar matrix, and this is the statistic in which that shows first."""
    equal, flat = torch.ones(128, 128), torch.randn(128, 128, generator=GENERATOR)
    found = auc(leverage_variance(equal, 100), leverage_variance(flat, 100))
    assert 0.5 - 0.13 < found < 0.5 + 0.13  # 3.2 standard errors
    monkeypatch.setattr("obfuscatune.enclave.keys.rows.ROUNDS", 1)
    assert auc(leverage_variance(equal, 40), leverage_variance(flat, 40)) > 0.9


def rounding_along(view: View, calls: int = 300) -> float:
    """How far the rounding errors of Y^T Y along the strong direction are from those along others, in deviations."""
    errors = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for _ in range(calls):
        y = view(rows()).double()
        error = y.T @ y - torch.eye(WIDTH)
        errors += error @ error
    others = torch.nn.functional.normalize(normal(WIDTH, 200), dim=0)
    along = (others * (errors @ others)).sum(0)
    return ((DIRECTION @ errors @ DIRECTION - along.mean()) / along.std()).abs().item()


def test_rounding_errors_show_nothing() -> None:
    def rounded_before(x: Tensor) -> Tensor:  # the control: float32 arithmetic on what is not mixed yet
        y = mix(x, MIXER, 512)
        z = y._mixing.unmix(y.sent, torch.ones(1), y.sent.shape[1])[None].float()
        return y._mixing.mix(z.double() + 1e-7 * z.abs().amax() * (z @ DIRECTION.float())[..., None])[0]

    assert rounding_along(lambda x: mix(x.float(), MIXER, 512).sent[0]) < 4
    assert rounding_along(rounded_before) > 4


def test_what_really_crosses_is_an_isometry_in_every_call(tmp_path: Path) -> None:
    recording = record("strict", {}, tmp_path)
    calls = [tensors["x"] for fields, tensors in recording.frames("to worker") if fields["op"] == "multiply"]
    assert len(calls) > 40  # two training steps and three tokens, eight layers each
    shapes = {tuple(x.shape) for x in calls}
    assert len(shapes) <= 12, "row counts tell lengths only up to the padding"
    for x in calls:
        gram = x.double().mT @ x.double()
        assert (gram - torch.eye(x.shape[2])).abs().max() < 3e-6
