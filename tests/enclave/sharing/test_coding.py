"""Products through shares: exact against Python's integers, equal bits of kernel and reference, error as promised."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.enclave.sharing import coding, reference
from obfuscatune.enclave.sharing.fixed import fixed
from obfuscatune.enclave.sharing.scheme import Scheme, lagrange, share_weights
from obfuscatune.errors import UnsupportedModelError, UsageError
from obfuscatune.protocol.native import kernel
from obfuscatune.protocol.residues import PRIMES, centred

from .shared_product import Product, seeded_uniform

SCHEMES = [
    Scheme.make(primes=primes, threshold=threshold, weights=weights, spares=spares)
    for primes, threshold, weights, spares in (
        (6, 1, "shared", 0),
        (4, 1, "shared", 1),
        (7, 1, "shared", 0),
        (5, 2, "shared", 1),
        (6, 1, "open", 0),
        (3, 2, "open", 1),
    )
] + [Scheme(PRIMES[:4], (3, 7, 20, 41, 60), 2)]  # coefficients so large that a sum of three is taken in two steps


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coding, "_kernel_or_warning", lambda: None)
    monkeypatch.setattr("obfuscatune.protocol.expand.kernel", lambda: None)
    monkeypatch.setattr("obfuscatune.protocol.residues.kernel", lambda: None)
    yield


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(scheme: Scheme, product: Product, x: Tensor, *, transpose: bool = False) -> Tensor:
    """The product of the integers, in Python's integers, scaled back."""
    side = product.integers.backward if transpose else product.integers.forward
    half = 0.5 * x.shape[1] ** 0.5
    q, scales = reference.quantize(x, side.before, side.most - half, half)
    w = product.integers.integers.long()
    w = (w.T if transpose else w).tolist()
    out = []
    for row in q.tolist():
        sums = [sum(a * w[i][k] for i, a in enumerate(row)) for k in range(len(w[0]))]
        assert all(2 * abs(s) < scheme.modulus for s in sums)
        out.append(sums)
    return (torch.tensor(out, dtype=torch.float64) * side.after * (1 / scales)[:, None]).float()


def test_the_kernel_is_built() -> None:
    assert kernel() is not None, "make setup builds it where there is a C compiler"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 9), st.integers(4, 40), st.integers(4, 40), st.integers(0, 9))
def test_a_product_is_that_of_the_integers(scheme: Scheme, n: int, width: int, out: int, seed: int) -> None:
    product = Product.of(gaussian(width, out, seed=seed), scheme, seed=seed)
    for transpose, inputs in ((False, width), (True, out)):
        x = gaussian(n, inputs, seed=seed + 1) * 10.0 ** (seed - 4)
        assert torch.equal(product(x, transpose=transpose), exact(scheme, product, x, transpose=transpose))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{len(s.primes)} primes T={s.threshold} {s.shares_weights}")
def test_the_fallback_has_the_same_bits(scheme: Scheme, without_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(11, 70) * torch.logspace(-20, 20, 11)[:, None]
    x[3] = 0
    x[4, 1:] = 0
    product = Product.of(gaussian(70, 50), scheme)
    rows = product.rows(x)
    replies = product.replies(rows)
    y = product.decode(rows, replies)
    monkeypatch.undo()
    assert coding._kernel_or_warning() is not None
    again = Product.of(gaussian(70, 50), scheme)
    fast = again.rows(x)
    for slow_share, fast_share in zip(rows.shares, fast.shares, strict=True):
        assert torch.equal(slow_share, fast_share)
    assert torch.equal(rows.scales, fast.scales) and torch.equal(rows.images, fast.images)
    assert all(torch.equal(a, b) for a, b in zip(replies, again.replies(fast), strict=True))
    z = again.decode(fast, replies)
    assert y is not None and z is not None and torch.equal(y, z)


def test_any_points_of_a_spare_give_the_same_product() -> None:
    scheme = Scheme.make(spares=2)
    product = Product.of(gaussian(30, 20), scheme)
    rows = product.rows(gaussian(5, 30))
    replies = product.replies(rows)
    results = [product.decode(rows, replies, workers=w) for w in ((0, 1, 2), (0, 1, 3), (2, 4, 3), (4, 0, 2))]
    assert all(y is not None and torch.equal(y, results[0]) for y in results)  # type: ignore[arg-type]


def test_bits_depend_on_neither_threads_nor_batches() -> None:
    product = Product.of(gaussian(768, 512), Scheme.make())
    x = gaussian(600, 768)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(product(x))
    finally:
        torch.set_num_threads(before)
    parts = torch.cat([product(part) for part in x.split([1, 255, 4, 300, 40])])
    assert all(torch.equal(y, parts) for y in results)


@pytest.mark.parametrize(("primes", "error"), [(7, 3e-7), (6, 2e-6), (5, 3e-5), (4, 5e-4), (3, 6e-3)])
def test_the_error_is_the_one_that_is_promised(primes: int, error: float) -> None:
    product = Product.of(gaussian(512, 300), Scheme.make(primes=primes))
    for transpose, side, width in ((False, product.integers.forward, 512), (True, product.integers.backward, 300)):
        x = gaussian(64, width, seed=2)
        w = gaussian(512, 300).double()
        true = x.double() @ (w.T if transpose else w)
        found = ((product(x, transpose=transpose) - true).norm() / true.norm()).item()
        assert found < error
        if primes < 7:  # there the rounding to float32 is of the same size
            assert 0.5 * side.error < found < 2 * side.error


def test_what_only_zeros_multiply_costs_no_precision() -> None:
    """The gradient of outputs whose weights are all zero, and activations whose weights are, however large."""
    w, x = gaussian(96, 64), gaussian(32, 96, seed=3)
    w[:, :9], w[5] = 0, 0
    x[:, 5] *= 1e6
    for primes, bound in ((7, 5e-7), (6, 4e-6), (3, 1e-2)):
        product = Product.of(w, Scheme.make(primes=primes))
        for transpose, rows in ((False, x), (True, gaussian(32, 64, seed=4))):
            true = rows.double() @ (w.T if transpose else w).double()
            assert (product(rows, transpose=transpose) - true).norm() < bound * true.norm()


@pytest.mark.parametrize("primes", [2, 3, 4])
def test_a_weight_that_leaves_no_room_for_rows_is_refused(primes: int) -> None:
    """The room, most - half, would be zero or less of still wider ones: where it is not refused, there is enough."""
    refused = 0
    for width in (2**k for k in range(2, 18)):
        for shape in ((width, 1), (1, width)):
            try:
                integers = fixed(torch.ones(shape), Scheme.make(primes=primes), "layer")
            except UsageError as error:
                assert "too few primes" in str(error)
                refused += 1
                continue
            for side, inputs in ((integers.forward, shape[0]), (integers.backward, shape[1])):
                assert side.most - 0.5 * inputs**0.5 > 0.5 * inputs**0.5
    assert refused or primes > 2


CAPABILITIES = """
import sys, hashlib, numpy, torch
from obfuscatune.enclave.sharing.fixed import fixed
from obfuscatune.enclave.sharing.scheme import Scheme
torch.set_num_threads(int(sys.argv[1]))
for shape in ((768, 512), (511, 1025), (3, 9001)):
    w = torch.from_numpy(numpy.random.default_rng(1).standard_normal(shape, dtype="float32"))
    f = fixed(w, Scheme.make(), "layer")
    sides = (f.forward.before, f.forward.after, f.backward.before, f.backward.after)
    digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in (f.columns, f.integers, *sides)))
    print(digest.hexdigest(), f.forward.most.hex(), f.backward.most.hex())
"""


@pytest.mark.slow  # processes with instruction sets of their own
def test_a_weight_has_the_same_scales_with_any_instructions_and_threads() -> None:
    found = set()
    order = ["DEFAULT", "AVX2", "AVX512"]  # torch does not ask whether the CPU has what it is told to use
    there = torch.backends.cpu.get_cpu_capability()
    for capability in order[: order.index(there) + 1] if there in order else [there]:
        for threads in (1, 2):
            environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, "-c", CAPABILITIES, str(threads)]
            run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)  # noqa: S603
            found.add(run.stdout)
    assert len(found) == 1


def test_integers_of_a_tall_weight_stay_within_32_bits() -> None:
    w, dy = gaussian(4000, 2), torch.eye(2)
    true = dy.double() @ w.T.double()
    product = Product.of(w, Scheme.make(primes=7))
    assert product.integers.backward.most <= 2**30
    assert (product(dy, transpose=True) - true).norm() < 5e-7 * true.norm()


def test_a_channel_of_large_activations_and_small_weights_costs_no_precision() -> None:
    w, x = gaussian(512, 256), gaussian(64, 512, seed=3)
    x[:, 7] *= 1000
    w[7] /= 1000
    true = x.double() @ w.double()
    errors = [
        ((Product.of(w, s)(x) - true).norm() / true.norm()).item() for s in (Scheme.make(), Scheme.make(primes=7))
    ]
    assert errors[0] < 4e-6 and errors[1] < 5e-7  # without the balance 2e-5 and more
    w[7] *= 1000  # nothing in the weight tells of it now: relative to the rest of a row, one prime more is needed
    product = Product.of(w, Scheme.make(primes=7))
    rest = (x.double() @ w.double() - product(x)).norm() / (x[:, :7].double() @ w[:7].double()).norm()
    assert rest < 2e-4


@given(st.integers(-(2**40), 2**40), st.sampled_from(PRIMES))
def test_residues_are_centred(x: int, p: int) -> None:
    r = centred(torch.tensor([x]), p).item()
    assert abs(r) <= p // 2 and (x - r) % p == 0


@given(st.sampled_from(PRIMES), st.lists(st.integers(1, 80), min_size=2, max_size=5, unique=True), st.data())
def test_interpolation(p: int, points: list[int], data: st.DataObject) -> None:
    f = data.draw(st.lists(st.integers(0, p - 1), min_size=len(points), max_size=len(points)))
    at = data.draw(st.integers(0, 80).filter(lambda t: t not in points))
    value = [sum(c * t**k for k, c in enumerate(f)) for t in [*points, at]]
    c = lagrange(tuple(points), at, p)
    assert (sum(a * b for a, b in zip(c, value, strict=False)) - value[-1]) % p == 0


def test_all_sums_of_16_bits_are_reduced_exactly() -> None:
    """The kernel's reduction is the definition, for all inputs that its loops can make of hostile replies."""
    scheme = Scheme.make(primes=7)
    ends = torch.tensor([-128, -127, -125, -1, 0, 1, 124, 125, 126, 127], dtype=torch.int8)
    grid = torch.cartesian_prod(ends, ends, ends).T.contiguous()
    replies = [g.expand(7, 1, -1).contiguous() for g in grid]
    images, none = torch.zeros(1, 7, 0, dtype=torch.int16), torch.zeros(7, 0, grid.shape[1], dtype=torch.int16)
    rows = coding.Rows([], torch.ones(1, dtype=torch.float64), images)
    column = torch.ones(grid.shape[1], dtype=torch.float64)
    y = coding.decode(scheme, (1, 2, 3), replies, column, rows=rows, vectors=none)
    expected = []
    for p in scheme.primes:
        c = lagrange((1, 2, 3), 0, p)
        expected.append([sum(a * b for a, b in zip(c, v, strict=True)) % p for v in grid.T.tolist()])
    assert y is not None
    M = scheme.modulus  # noqa: N806
    for j, value in enumerate(zip(*expected, strict=True)):
        true = sum(r * (M // p) for r, p in zip(value, scheme.primes, strict=True)) % M
        true = true - M if true > M // 2 else true
        assert y[0, j].item() == torch.tensor(float(true), dtype=torch.float64).float().item()


@pytest.mark.parametrize("p", PRIMES)
def test_the_quotients_of_16_bits(p: int) -> None:
    """The two divisions of the kernel, for every number that they may get."""
    v = torch.arange(2**16)
    up, down = (2**22 + p - 1) // p, 2**22 // p
    assert up < 2**16
    assert torch.equal(v[:16385] * up >> 16 >> 6, v[:16385] // p)
    short = v // p - (v * down >> 16 >> 6)
    assert short.min() >= 0 and short.max() <= 1


def test_what_is_refused() -> None:
    for bad in (
        lambda: Scheme.make(primes=1),
        lambda: Scheme.make(primes=8),
        lambda: Scheme((251, 241), (1, 2)),
        lambda: Scheme((251, 241), (1, 1, 2)),
        lambda: Scheme((251, 241), (0, 1, 2)),
        lambda: Scheme((251, 127), (1, 2, 3)),
        lambda: Scheme.make(threshold=3),
        lambda: fixed(gaussian(65536, 4), Scheme.make(primes=2), "w"),
    ):
        with pytest.raises(UsageError):
            bad()
    with pytest.raises(UnsupportedModelError):
        fixed(torch.full((4, 4), torch.inf), Scheme.make(), "w")


def test_rows_that_are_not_finite_give_nan_and_shares_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product.of(gaussian(30, 20), Scheme.make())
    x = gaussian(5, 30)
    right = product(x)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        x[row, 2] = value
    for native in (True, False):
        if not native:
            monkeypatch.setattr(coding, "_kernel_or_warning", lambda: None)
        rows = product.rows(x)
        a, b, _ = (share[:, :3].int() for share in rows.shares)
        assert all((plane % p == 0).all() for plane, p in zip(2 * a - b, product.scheme.primes, strict=True))
        y = product.decode(rows, product.replies(rows))
        assert y is not None and y[:3].isnan().all() and torch.equal(y[3:], right[3:])


def test_the_first_shares_are_what_was_drawn() -> None:
    scheme = Scheme.make(threshold=2)
    drawn = torch.stack([seeded_uniform().draw(scheme, 3, 8) for _ in range(2)])
    none = torch.zeros(6, 0, 8, dtype=torch.int16)
    rows = coding.encode(scheme, gaussian(3, 8), torch.ones(8).double(), drawn, most=1e6, vectors=none)
    assert torch.equal(rows.shares[0], drawn[0]) and torch.equal(rows.shares[1], drawn[1])
    assert all(len(rule) == 3 and len(w) == 3 for rule in [share_weights(scheme, 251)] for w in rule)
