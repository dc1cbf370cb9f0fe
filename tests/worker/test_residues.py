"""The worker's products of shares: exact on every path, and what it refuses."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.expand import drawn, expand
from obfuscatune.protocol.native import kernel
from obfuscatune.protocol.residues import EXACT_TERMS, PRIMES, reduce
from obfuscatune.worker import residues
from obfuscatune.worker.few_rows import FEW, few_rows
from obfuscatune.worker.pairs import pairs_product
from obfuscatune.worker.residues import (
    ResidueSegment,
    float_product,
    int8_product,
    int8_products_are_exact,
    parts_of,
    uses_int8_products,
)
from obfuscatune.worker.session import WorkerSession

_NUMBERS = itertools.count()
HAS_PAIRS = kernel() is not None and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def number() -> str:
    return f"{next(_NUMBERS):032x}"


def segment(weight: torch.Tensor, point: int = 1, sharing: str | None = None, **changed: Any) -> ResidueSegment:
    spec = {"primes": list(PRIMES[: len(weight)]), "point": point, "sharing": sharing or number(), **changed}
    return ResidueSegment(spec, {"weight": weight}, {})


def centred_residues(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-44, 45, shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize("path", ["few rows", "pairs", "int8", "float"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 8, 16), (5, 33, 17), (40, 64, 24), (40, 33, 1), (40, 1, 9)]
)
def test_products(rows: int, inputs: int, outputs: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "few rows":
        monkeypatch.setattr(residues, "few_rows", lambda *arguments: False)
    monkeypatch.setattr(residues, "uses_int8_products", lambda device: path in ("few rows", "int8"))
    done = []

    def pairs(*arguments: Any) -> bool:
        done.append(path == "pairs" and pairs_product(*arguments))
        return done[-1]

    monkeypatch.setattr(residues, "pairs_product", pairs)
    weight = centred_residues(3, inputs, outputs)
    served = segment(weight)
    for transpose in (False, True):
        x = centred_residues(3, rows, outputs if transpose else inputs, seed=1)
        torch.full((rows, 64), 7, dtype=torch.int32)  # what memory that nobody writes to would hold next
        y = served.multiply(x, transpose=transpose)
        assert y.dtype == torch.int8
        for i, p in enumerate(PRIMES[:3]):
            w = weight[i].T if transpose else weight[i]
            assert ((x[i].double() @ w.double() - y[i]) % p == 0).all() and int(y[i].abs().max()) <= p // 2
    ways = {"pairs": [HAS_PAIRS], "float": [False]}.get(path, [])
    assert done == 6 * ways


@given(st.integers(0, 7), st.integers(1, 1000), st.integers(1, 100))
@example(6, 512, 16)
@example(6, 512, 4)
def test_parts_cover_every_row_once_and_give_all_threads_as_much(planes: int, rows: int, threads: int) -> None:
    parts = parts_of(range(3, 3 + planes), rows, threads)
    seen = [(plane, row) for plane, part in parts for row in range(part.start, part.stop)]
    assert seen == [(plane, row) for plane in range(3, 3 + planes) for row in range(rows)]
    assert all(part.stop - part.start >= min(rows, 64) for _, part in parts)
    if rows >= 64 * threads and planes:
        assert len(parts) % threads == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
def test_products_are_the_same_on_any_number_of_threads(threads: int) -> None:
    weight, x = centred_residues(3, 40, 24), centred_residues(3, 200, 40, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = segment(weight).multiply(x, transpose=False)
    finally:
        torch.set_num_threads(before)
    for i, p in enumerate(PRIMES[:3]):
        assert ((x[i].double() @ weight[i].double() - y[i]) % p == 0).all()


def test_a_process_of_a_group_that_has_no_plane_adds_nothing() -> None:
    class Group:
        """The second of two processes, and one prime."""

        rank, size = 1, 2

        def share(self, n: int) -> range:
            return range(n, n)

        def sum_(self, y: torch.Tensor) -> torch.Tensor:
            return y

    spec = {"primes": [PRIMES[0]], "point": 1, "sharing": number()}
    served = ResidueSegment(spec, {"weight": centred_residues(1, 8, 8)}, {}, Group())  # type: ignore[arg-type]
    assert not served.multiply(centred_residues(1, 40, 8), transpose=False).any()


def _can_few_rows() -> bool:
    x, w, out = centred_residues(1, 1, 4), centred_residues(1, 4, 4), torch.empty(1, 1, 4, dtype=torch.int8)
    return few_rows(x, w, [251], out)


@pytest.mark.skipif(
    not _can_few_rows(), reason="the kernel of few rows needs a CPU with AVX-512 VNNI, and a C compiler"
)
@given(st.integers(1, FEW), st.integers(1, 300), st.integers(1, 200), st.integers(1, len(PRIMES)), st.booleans())
@example(4, 3072, 768, 2, True)  # as long as GPT-2 small's down product, all residues at their largest
@example(FEW, 64, 64, 7, False)
@example(1, 65, 257, 3, False)  # one more than a group, and than the blocks that are asked for ahead
def test_few_rows_have_the_bits_of_many(rows: int, inputs: int, outputs: int, planes: int, extreme: bool) -> None:
    if extreme:
        x, w = torch.full((planes, rows, inputs), 125), torch.full((planes, inputs, outputs), -125)
        x, w = x.to(torch.int8), w.to(torch.int8)
    else:
        x, w = (
            torch.randint(-125, 126, shape).to(torch.int8)
            for shape in ((planes, rows, inputs), (planes, inputs, outputs))
        )
    found = torch.full((planes, rows, outputs), 99, dtype=torch.int8)
    assert few_rows(x, w, list(PRIMES[:planes]), found)
    expected = torch.empty_like(found)
    for i, p in enumerate(PRIMES[:planes]):
        reduce((x[i].double() @ w[i].double()).int(), p, expected[i])
    assert torch.equal(found, expected)


@pytest.mark.skipif(not HAS_PAIRS, reason="the kernel of pairs needs a CPU with AVX2, and a C compiler")
@given(st.integers(1, 100), st.integers(1, 300), st.integers(1, 200), st.booleans(), st.booleans(), st.integers(0, 99))
@example(17, 3072, 768, True, False, 0)  # as long as GPT-2 small's down product, all residues at their largest
@example(16, 129, 65, False, False, 0)  # few rows, one column and one term more than a block
@example(17, 129, 65, False, True, 0)
@example(17, 128, 128, False, True, 0)  # whole blocks, which are turned by vectors
@example(1025, 64, 66, False, False, 0)  # one row more than are multiplied at a time
@example(1, 1, 1, False, True, 0)
def test_pairs_have_the_bits_of_the_reference(
    rows: int, inputs: int, outputs: int, extreme: bool, turned: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (
        torch.randint(-125, 126, shape, generator=generator).to(torch.int8)
        for shape in ((rows, inputs), (inputs, outputs))
    )
    if extreme:
        x, w = torch.full_like(x, 125), torch.full_like(w, -125)
    if turned:  # as a backward product reads it
        w = w.T.contiguous().T
    for p in (PRIMES[0], PRIMES[-1]):
        found = torch.full((rows, outputs), 99, dtype=torch.int8)
        assert pairs_product(x, w, p, found)
        assert torch.equal(found, reduce((x.double() @ w.double()).int(), p, torch.empty_like(found)))


def test_what_the_kernel_of_pairs_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, out = centred_residues(8, 6), centred_residues(8, 4), torch.zeros(6, 4, dtype=torch.int8)
    assert not pairs_product(x.T, w, 251, out)  # rows that do not lie one after the other
    monkeypatch.setattr("obfuscatune.worker.pairs.kernel", lambda: None)
    assert not pairs_product(x.T.contiguous(), w, 251, out) and not out.any()


def test_what_the_kernel_of_few_rows_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = centred_residues(7, 512, 2048)  # large enough for two threads
    x, out = centred_residues(7, 3, 512), torch.zeros(7, 3, 2048, dtype=torch.int8)
    if _can_few_rows():
        before = torch.get_num_threads()
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert few_rows(x, weight, list(PRIMES[:7]), out)
            results.append(out.clone())
        torch.set_num_threads(before)
        assert torch.equal(*results)
    many = centred_residues(7, FEW + 1, 512)
    assert not few_rows(many, weight, list(PRIMES[:7]), torch.zeros(7, FEW + 1, 2048, dtype=torch.int8))
    assert not few_rows(x, centred_residues(7, 2048, 512).mT, list(PRIMES[:7]), out)
    monkeypatch.setattr("obfuscatune.worker.few_rows.kernel", lambda: None)
    assert not few_rows(x, weight, list(PRIMES[:7]), out)


def test_the_fallback_is_exact_beyond_what_one_float32_product_holds() -> None:
    extreme = torch.full((2, 3 * EXACT_TERMS + 4), 125, dtype=torch.int8)
    assert torch.equal(float_product(extreme, extreme.T.contiguous()), int8_product(extreme, extreme.T.contiguous()))
    one = extreme.float() @ extreme.T.float()
    assert not torch.equal(one.int(), int8_product(extreme, extreme.T.contiguous()))  # the control: all in one is not


def test_the_self_test_passes_here_and_sees_a_product_that_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8_products_are_exact(torch.device("cpu"))
    # Two neighbouring products added in 16 bits, as CPUs without VNNI do it.
    monkeypatch.setattr(residues, "int8_product", lambda x, w: float_product(x, w).clamp(max=2**15 - 1))
    assert not int8_products_are_exact(torch.device("cpu"))


@pytest.fixture
def fresh_choice() -> Iterator[Callable[[], bool]]:
    def choose() -> bool:
        uses_int8_products.cache_clear()
        return uses_int8_products(torch.device("cpu"))

    yield choose
    uses_int8_products.cache_clear()


def test_int8_products_that_are_slow_wrong_or_missing_are_not_used(
    fresh_choice: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = residues.float_product
    monkeypatch.setattr(residues, "float_product", lambda x, w: [torch._int_mm(x, w) for _ in range(9)])
    assert fresh_choice()  # nine times as fast
    monkeypatch.setattr(residues, "int8_product", lambda x, w: exact(x, w).clamp(max=2**15 - 1))
    assert not fresh_choice()
    monkeypatch.setattr(residues, "int8_products_are_exact", lambda device: True)
    assert fresh_choice()
    monkeypatch.setattr(residues, "float_product", lambda x, w: None)  # as if float32 took no time
    assert not fresh_choice()
    monkeypatch.setattr(torch, "_int_mm", missing := Mock(side_effect=RuntimeError("not implemented")))
    assert not fresh_choice() and missing.called


def test_a_reduction_is_exact_on_all_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1], dtype=torch.int64)
    x = torch.cat([ends, torch.randint(-(2**31), 2**31, (100_000,)), torch.arange(-70_000, 70_000)]).int()
    fast = [reduce(x, p, torch.empty(x.shape, dtype=torch.int8)) for p in PRIMES]
    monkeypatch.setattr("obfuscatune.protocol.residues.kernel", lambda: None)
    for p, found in zip(PRIMES, fast, strict=True):
        assert torch.equal(found, reduce(x, p, torch.empty_like(found)))
        assert ((x.long() - found) % p == 0).all() and int(found.abs().max()) == p // 2


def test_a_second_point_of_one_sharing_is_refused_in_the_whole_process() -> None:
    sharing, weight = number(), centred_residues(2, 8, 8)
    segment(weight, 2, sharing)
    segment(weight, 2, sharing)  # the next layer
    with pytest.raises(ProtocolError, match="second point"):
        segment(weight, 3, sharing)
    segment(weight, 3)  # of another sharing
    child = os.fork()  # as a worker that listens does for each session
    if child == 0:
        try:
            segment(weight, 1, sharing)
        except ProtocolError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    ("weight", "spec"),
    [
        (centred_residues(2, 8, 8), {"primes": [251]}),
        (centred_residues(2, 8, 8), {"primes": [251, 127]}),
        (centred_residues(2, 8, 8), {"primes": []}),
        (centred_residues(2, 8, 8), {"primes": [251, 251]}),
        (centred_residues(2, 8, 8), {"primes": [251.0, 241]}),
        (centred_residues(2, 8, 8), {"primes": [[251], 241]}),
        (centred_residues(2, 8, 8), {"primes": None}),
        (centred_residues(2, 8, 8), {"point": 0}),
        (centred_residues(2, 8, 8), {"point": True}),
        (centred_residues(2, 8, 8), {"sharing": 7}),
        (centred_residues(2, 8, 8), {"sharing": "short"}),
        (centred_residues(2, 8, 0), {}),
        (centred_residues(2, 64), {}),
        (centred_residues(2, 8, 8).float(), {}),
        (torch.full((2, 8, 8), 126, dtype=torch.int8), {}),
    ],
)
def test_weights_that_are_refused(weight: torch.Tensor, spec: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        segment(weight, **spec)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 9), torch.zeros(1, 3, 8), torch.zeros(3, 8), torch.zeros(2, 3, 7)])
def test_rows_that_are_refused(x: torch.Tensor) -> None:
    served = segment(centred_residues(2, 8, 9))
    with pytest.raises(ProtocolError):
        served.multiply(x.to(torch.int8), transpose=False)
    with pytest.raises(ProtocolError):
        served.multiply(torch.zeros(2, 3, 8), transpose=False)


def test_weights_and_rows_may_come_as_seeds() -> None:
    session, primes = WorkerSession(torch.device("cpu")), PRIMES[:3]
    spec = {"primes": list(primes), "point": 1, "sharing": number()}
    made = {"weight": drawn(b"w" * 32, primes, (8, 16))}
    session.handle({"op": "define", "segment": "s", "kind": "residues", "spec": spec, "drawn": made}, {})
    request = {"op": "multiply", "segment": "s", "transpose": False}
    _, reply = session.handle({**request, "drawn": {"x": drawn(b"x" * 32, primes, (5, 8))}}, {})
    x, weight = expand(b"x" * 32, primes, (5, 8)), expand(b"w" * 32, primes, (8, 16))
    assert torch.equal(reply["y"], segment(weight).multiply(x, transpose=False))
    assert torch.equal(reply["y"], session.handle(request, {"x": x})[1]["y"])
    with pytest.raises(ProtocolError, match="others than those that are sent"):
        session.handle({**request, "drawn": {"x": drawn(b"x" * 32, primes, (5, 8))}}, {"x": x})


def test_what_is_drawn_stays_within_the_budget() -> None:
    session, primes = WorkerSession(torch.device("cpu"), budget=20_000), PRIMES[:3]
    spec = {"primes": list(primes), "point": 1, "sharing": number()}
    define = {"op": "define", "segment": "s", "kind": "residues", "spec": spec}
    with pytest.raises(ProtocolError, match="24000 bytes"):
        session.handle({**define, "drawn": {"weight": drawn(bytes(32), primes, (80, 100))}}, {})
    session.handle({**define, "drawn": {"weight": drawn(bytes(32), primes, (50, 60))}}, {})
    rows = {"x": drawn(bytes(32), primes, (60, 60))}
    with pytest.raises(ProtocolError, match="tensors to draw"):  # beside what it holds
        session.handle({"op": "multiply", "segment": "s", "transpose": False, "drawn": rows}, {})
