"""What every key owes, whatever its family: the four products, dtypes, gradients, hygiene."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.enclave.keys import (
    FAMILIES,
    ConcatKey,
    HaarKey,
    IdentityKey,
    Key,
    MasterSecret,
    OrthogonalKey,
    PermutationKey,
    build,
    check_orthogonal,
    decode,
    encode,
    head_keys,
)
from obfuscatune.errors import KeyFaultError, UsageError

# Relative to the largest entry, times the condition number. Measured: 1.5e-15, 2.6e-7, 3.5e-3.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
ORTHOGONAL = ["identity", "haar", "monarch", "permutation"]


def make(family: str, size: int, seed: int = 0) -> Key:
    """A key of any family of the package; blocks of 4, so that small sizes have several and remainders."""
    stream = MasterSecret.from_insecure_test_seed(seed).stream("test", family)
    if family == "per_head":
        return head_keys(stream, heads=size, kv_heads=size, head_dim=3, rotary=0, kappa=4.0).q
    if family == "concat":
        return ConcatKey([build("monarch", stream, size, block=4), build("conditioned", stream, 3, kappa=9.0)])
    return build(family, stream, size, block=4, kappa=4.0)


ALL = [*FAMILIES, "per_head", "concat"]
keys = st.builds(make, st.sampled_from(ALL), st.integers(1, 14), st.integers(0, 1000))
small = settings(deadline=None, max_examples=40)


def close(got: Tensor, expected: Tensor, key: Key, dtype: torch.dtype = torch.float64) -> bool:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (got.double() - expected.double()).abs()
    return not error.numel() or error.max().item() <= TOLERANCE[dtype] * scale * key.condition_number


def rows(key: Key, *shape: int) -> Tensor:
    return torch.randn(*shape, key.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@given(keys)
@small
def test_products_are_those_of_the_dense_matrix(key: Key) -> None:
    r, x = key.dense(), rows(key, 5)
    inverse = torch.linalg.inv(r)
    assert r.shape == (key.size, key.size) and r.dtype == torch.float64
    assert close(key.apply(x), x @ r, key)
    assert close(key.apply_transpose(x), x @ r.T, key)
    assert close(key.apply_inverse(x), x @ inverse, key)
    assert close(key.apply_inverse_transpose(x), x @ inverse.T, key)


@given(keys)
@small
def test_inverse_is_exact(key: Key) -> None:
    x = rows(key, 5)
    assert close(key.apply_inverse(key.apply(x)), x, key)
    assert close(key.apply_transpose(key.apply_inverse_transpose(x)), x, key)


def test_another_key_does_not_decode() -> None:
    for family in ALL:
        key, other = make(family, 12), make(family, 12, seed=1)
        x = rows(key, 5)
        assert close(other.apply_inverse(key.apply(x)), x, key) == (family == "identity")


@given(keys, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@small
def test_lower_dtypes_are_kept_and_close(key: Key, dtype: torch.dtype) -> None:
    x = rows(key, 4).to(dtype)
    y = key.apply(x)
    assert y.dtype == dtype
    assert close(y, key.apply(x.double()), key, torch.bfloat16 if dtype == torch.float16 else dtype)
    if dtype == torch.float32:
        assert close(key.apply_inverse(y), x, key, dtype)


@given(keys, st.sampled_from([(), (0,), (1,), (2, 3), (2, 0, 3)]))
@small
def test_leading_shapes_are_kept(key: Key, shape: tuple[int, ...]) -> None:
    x = rows(key, *shape)
    assert key.apply(x).shape == key.apply_inverse(x).shape == x.shape
    assert close(key.apply(x), x @ key.dense(), key)
    strided = torch.stack([x, x], dim=-1)[..., 0]  # not contiguous
    assert torch.equal(key.apply(strided), key.apply(x))


@pytest.mark.parametrize("family", ALL)
def test_wrong_input_is_refused(family: str) -> None:
    key = make(family, 6)
    for wrong in (torch.zeros(2, key.size + 1), torch.zeros(()), torch.zeros(2, key.size, dtype=torch.int64)):
        with pytest.raises(UsageError, match="does not fit"):
            key.apply(wrong)


@given(keys)
@small
def test_condition_number_is_that_of_the_matrix(key: Key) -> None:
    true = torch.linalg.cond(key.dense()).item()
    assert key.condition_number == pytest.approx(true, rel=1e-9 * max(1.0, true))


@pytest.mark.parametrize("family", ORTHOGONAL)
def test_orthogonal_families_pass_the_check(family: str) -> None:
    key = make(family, 130)
    check_orthogonal(key)
    assert key.condition_number == 1.0


class Unchecked(OrthogonalKey):
    """A key that claims to be orthogonal and is the given matrix."""

    family = "unchecked"

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), (matrix,))

    def _product(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[0]

    def _transpose(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return x @ factors[0].mT


@pytest.mark.parametrize("kind", [HaarKey, lambda matrix: check_orthogonal(Unchecked(matrix))])
@pytest.mark.parametrize("fault", [1e-4, float("nan")])
def test_a_key_that_is_not_orthogonal_is_refused(kind: Callable[[Tensor], object], fault: float) -> None:
    matrix = make("haar", 8).dense()
    kind(matrix)
    matrix[2, 3] += fault
    with pytest.raises(KeyFaultError, match="not orthogonal"):
        kind(matrix)


@given(keys)
@settings(deadline=None, max_examples=20)
def test_gradients(key: Key) -> None:
    for function, matrix in ((encode, key.dense()), (decode, torch.linalg.inv(key.dense()))):
        x = rows(key, 2).requires_grad_()
        weight = rows(key, 2).flip(0)
        (got,) = torch.autograd.grad((function(x, key) * weight).sum(), x)
        (expected,) = torch.autograd.grad(((x @ matrix) * weight).sum(), x)
        assert close(got, expected, key)
        if key.condition_number < 100:  # finite differences lose the digits that the condition number does
            assert torch.autograd.gradcheck(lambda t, f=function: f(t, key), (x,))


def test_gradient_keeps_dtype_and_graph_is_spared_without_grad() -> None:
    key = make("monarch", 12)
    x = torch.randn(3, 12, dtype=torch.bfloat16, requires_grad=True)
    encode(x, key).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    with torch.no_grad():
        assert encode(x, key).grad_fn is None
    assert encode(x.detach(), key).grad_fn is None


def test_identity_is_no_copy() -> None:
    key, x = IdentityKey(4), torch.zeros(2, 4, requires_grad=True)
    assert encode(x, key) is x and decode(x, key) is x


def test_cast_factors_are_cached() -> None:
    key = make("monarch", 12)
    key.apply(torch.zeros(1, 12))
    first = key._factors_for(torch.float32, torch.device("cpu"))
    key.apply(torch.zeros(1, 12, dtype=torch.float16))
    assert key._factors_for(torch.float32, torch.device("cpu")) is first


@pytest.mark.parametrize("family", ALL)
def test_keys_hide_and_do_not_travel(family: str) -> None:
    key = make(family, 6)
    assert f"{key!r} {key} {key:}" == " ".join([f"<{key.family} key of size {key.size}>"] * 3)
    for leave in (lambda: pickle.dumps(key), lambda: copy.copy(key), lambda: copy.deepcopy(key)):
        with pytest.raises(KeyFaultError, match="pickled or copied") as caught:
            leave()
        assert not any(f"{value:.4f}" in str(caught.value) for value in key.dense().flatten().tolist())


def test_build_refuses_what_it_does_not_know(master: MasterSecret) -> None:
    stream = master.stream("x")
    with pytest.raises(UsageError, match=r"unknown key family: got hadamard, expected one of identity, haar"):
        build("hadamard", stream, 4)
    for family in FAMILIES:
        with pytest.raises(UsageError, match="impossible size"):
            build(family, stream, 0)


@pytest.mark.parametrize("family", ["haar", "monarch", "gaussian", "conditioned"])
def test_keys_of_other_labels_are_independent(master: MasterSecret, family: str) -> None:
    def dense(*labels: str) -> Tensor:
        matrix = build(family, master.stream(*labels), 96, block=16, kappa=4.0).dense()
        return matrix / matrix.norm() * 96**0.5

    reference = dense("m", "p", "0", "layer.1", "in")
    assert torch.equal(dense("m", "p", "0", "layer.1", "in"), reference)
    for other in (("layer.2", "in"), ("layer.1", "out"), ("layer.1i", "n")):
        overlap = (dense("m", "p", "0", *other) * reference).sum().item()  # mean 0, variance 1; 96 for equal keys
        assert abs(overlap) < 6


def test_permutation_key_is_the_permutation(master: MasterSecret) -> None:
    key = PermutationKey(torch.tensor([2, 0, 1]))
    assert key.apply(torch.tensor([10.0, 11.0, 12.0])).tolist() == [12.0, 10.0, 11.0]
