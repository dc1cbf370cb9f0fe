"""Memory that both sides share: what may lie where, and what is refused."""

import fcntl
import gc
import os
import socket
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.arena import ALIGNMENT, Arena, Places, own
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import DTYPES, TensorSpec

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")
SIZE = 1 << 16
Tap = Callable[[str, bytes], None]


def unix_pair(tap: Tap | None = None) -> tuple[Connection, Connection]:
    ours, theirs = socket.socketpair()
    return Connection(ours, peer="worker", tap=tap), Connection(theirs, peer="enclave")


def descriptors() -> int:
    gc.collect()  # a mapping ends with the last tensor in it
    return len(os.listdir("/proc/self/fd"))


def both_ends() -> tuple[Arena, Arena]:
    made = Arena.create(SIZE)
    assert made is not None
    received = Arena.received(made[1], SIZE)
    assert received is not None
    return made[0], received


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_one_side_writes_the_other_one_reads(dtype: torch.dtype) -> None:
    ours, theirs = both_ends()
    tensor = torch.randint(0, 2, (3, 5)).to(dtype)
    ours.view(TensorSpec("x", dtype, (3, 5)), 128).copy_(tensor)
    row = ["x", next(name for name, each in DTYPES.items() if each is dtype), [3, 5], 128]
    seen = theirs.read([row])["x"]
    assert torch.equal(seen, tensor) and seen.dtype == dtype
    assert theirs.row("x", seen) == row
    kept = own({"x": seen})["x"]
    ours.view(TensorSpec("x", torch.uint8, (SIZE,)), 0).zero_()
    assert torch.equal(kept, tensor) and not seen.any()  # a copy is nobody else's; a view is


BAD_ROWS = {
    "no list": {"x": 1},
    "three": [["x", "int8", [4]]],
    "beyond the end": [["x", "int8", [64], SIZE]],
    "over the end": [["x", "int8", [ALIGNMENT + 1], SIZE - ALIGNMENT]],
    "negative": [["x", "int8", [4], -64]],
    "not aligned": [["x", "int8", [4], 8]],
    "a bool": [["x", "int8", [4], False]],
    "a float": [["x", "int8", [4], 64.0]],
    "twice": [["x", "int8", [4], 0], ["x", "int8", [4], 64]],
    "huge": [["x", "int8", [2**32, 2**32], 0]],
    "negative size": [["x", "int8", [-4], 0]],
    "dtype": [["x", "object", [4], 0]],
    "the same bytes again and again": [[f"x{i}", "int8", [SIZE // 2], 0] for i in range(3)],
}


@pytest.mark.parametrize("rows", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_table_that_breaks_a_rule_is_refused(rows: object) -> None:
    _, theirs = both_ends()
    with pytest.raises(ProtocolError):
        theirs.read(rows)


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner, max_size=5)))
def test_any_table_is_read_within_the_arena_or_refused(rows: object) -> None:
    _, theirs = both_ends()
    try:
        found = theirs.read(rows)
    except ProtocolError:
        return
    assert all(tensor.numel() == 0 or theirs.offset_of(tensor) is not None for tensor in found.values())


def test_a_descriptor_that_could_shrink_or_is_none_of_a_memfd_is_refused_and_closed() -> None:
    before = descriptors()
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    reader, writer = os.pipe()
    os.close(writer)
    made = Arena.create(SIZE)
    assert made is not None
    for descriptor, size in ((unsealed, SIZE), (reader, SIZE), (made[1], SIZE + 4096)):
        with pytest.raises(ProtocolError):
            Arena.received(descriptor, size)
    assert descriptors() == before
    for wrong in (0, -1, None, 1.5, 2**60):
        with pytest.raises(ProtocolError):
            Arena.received(os.memfd_create("test"), wrong)
    assert descriptors() == before


def test_a_sealed_memfd_keeps_its_size() -> None:
    made = Arena.create(SIZE)
    assert made is not None
    for size in (SIZE // 2, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(made[1], size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(made[1], fcntl.F_ADD_SEALS, 0)
    os.close(made[1])


@pytest.mark.parametrize("call", ["os.memfd_create", "os.ftruncate", "fcntl.fcntl", "torch.from_file"])
def test_a_system_that_refuses_it_has_none(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    before = descriptors()
    monkeypatch.setattr(call, refuse)
    assert Arena.create(SIZE) is None
    assert descriptors() == before


def test_a_worker_that_cannot_map_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    made, before = Arena.create(SIZE), descriptors()
    assert made is not None

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file </proc/self/fd/9>")

    monkeypatch.setattr("torch.from_file", refuse)
    assert Arena.received(made[1], SIZE) is None
    assert descriptors() == before - 1


def test_a_descriptor_goes_with_its_frame_and_is_closed_with_the_connection() -> None:
    before = descriptors()
    ours, theirs = unix_pair()
    with closing(ours), closing(theirs):
        made = Arena.create(SIZE)
        assert made is not None and ours.shares_memory
        ours.send({"id": 1}, descriptor=made[1])  # nobody expects it: the system drops it
        assert theirs.receive()[0] == {"id": 1} and theirs.take_descriptor() is None
        theirs.expect_descriptor()
        for number in (2, 3):
            ours.send({"id": number}, {"x": torch.ones(70_000)}, descriptor=made[1])
            fields, tensors = theirs.receive()
            assert fields == {"id": number} and bool(tensors["x"].all())
        os.close(made[1])
        taken = theirs.take_descriptor()
        assert taken is not None and theirs.take_descriptor() is None
        received = Arena.received(taken, SIZE)
        assert received is not None
        received.view(TensorSpec("x", torch.int8, (SIZE,)), 0).fill_(7)
        assert bool((made[0].view(TensorSpec("x", torch.int8, (SIZE,)), 0) == 7).all())
        ours.send({"id": 4}, descriptor=(left := os.memfd_create("left")))
        os.close(left)
        theirs.receive()
    del made
    assert descriptors() == before


def test_a_recorded_connection_shares_no_memory() -> None:
    ours, theirs = unix_pair(tap=lambda way, run: None)
    with closing(ours), closing(theirs):
        assert not ours.shares_memory  # or the recording would lack what is placed


@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=60))
def test_places_never_overlap_and_come_back(steps: list[tuple[int, bool]]) -> None:
    places, taken = Places(SIZE), dict[int, int]()
    for length, free in steps:
        if free and taken:
            offset = next(iter(taken))
            places.free([offset])
            del taken[offset]
        offset_found = places.take(length)
        if offset_found is None:
            gaps = [*sorted(taken.items()), (SIZE, 0)]
            ends = [0, *(start + size for start, size in gaps[:-1])]
            assert all(start - end < length + ALIGNMENT for (start, _), end in zip(gaps, ends, strict=True))
            continue
        assert offset_found % ALIGNMENT == 0 and offset_found + length <= SIZE
        assert all(offset_found >= start + size or start >= offset_found + length for start, size in taken.items())
        taken[offset_found] = length
    places.free(list(taken))
    assert places.take(SIZE) == 0


def test_a_mapping_lives_as_long_as_a_tensor_in_it() -> None:
    ours, theirs = both_ends()
    tensor = ours.view(TensorSpec("x", torch.int8, (64,)), 0)
    del ours
    theirs.view(TensorSpec("x", torch.int8, (64,)), 0).fill_(3)
    assert bool((tensor == 3).all())
