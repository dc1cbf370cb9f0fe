"""The connection: tensors over real sockets, partial transfers, hostile and dying peers, timeouts."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.protocol.connection import Connection, Frame
from obfuscatune.protocol.frames import DTYPES, PREFIX, TensorSpec, decode_frame, encode_head
from obfuscatune.protocol.limits import Limits

Tap = Callable[[str, bytes], None]


@contextmanager
def pair(*, limits: Limits = Limits(), taps: tuple[Tap | None, Tap | None] = (None, None)) -> Iterator[tuple]:  # noqa: B008
    left, right = socket.socketpair()
    ends = [Connection(s, limits=limits, peer=p, tap=t) for s, p, t in zip((left, right), "ab", taps, strict=True)]
    for end in ends:
        end.settimeout(20)
    with closing(ends[0]), closing(ends[1]):
        yield ends[0], ends[1]


@contextmanager
def raw_peer(*, limits: Limits = Limits()) -> Iterator[tuple[Connection, socket.socket]]:  # noqa: B008
    """A connection and the bare socket at its other end."""
    left, right = socket.socketpair()
    connection = Connection(left, limits=limits, peer="worker w")
    connection.settimeout(20)
    with closing(connection), right:
        yield connection, right


@contextmanager
def running(target: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=target)
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=30)
        assert not thread.is_alive()


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
tensors_maps = st.dictionaries(
    st.sampled_from(["x", "u.q", "A.v", "mask"]),
    st.builds(tensor_of, st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 9)),
)


@given(tensors_maps)
def test_round_trip(tensors: dict[str, torch.Tensor]) -> None:
    with pair() as (a, b):
        size = a.send({"id": 1}, tensors)
        fields, got = b.receive()
        assert fields == {"id": 1}
        assert list(got) == list(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
        assert size == a.bytes_sent == b.bytes_received


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_views_and_parameters(dtype: torch.dtype) -> None:
    base = tensor_of(dtype, (4, 6), 0)
    tensors = {
        "t": base.T,
        "s": base[1:, ::2],
        "e": base[:1].expand(3, 6),
        "o": base[2:],  # contiguous, at an offset
        "0": base[0, 0],
        "n": base[:0],
    }
    if dtype.is_floating_point:
        tensors["p"] = torch.nn.Parameter(base.clone())
    with pair() as (a, b):
        a.send({}, tensors)
        _, got = b.receive()
    for name, tensor in tensors.items():
        torch.testing.assert_close(got[name], tensor.detach(), rtol=0, atol=0)


def test_special_values_survive_bit_by_bit() -> None:
    bits = torch.tensor([0x7FC1, 0x8000, 0x7F80, 0x0001, -0x8000], dtype=torch.int32).to(torch.int16)
    with pair() as (a, b):
        a.send({}, {"b": bits.view(torch.bfloat16), "h": bits.view(torch.float16)})
        _, got = b.receive()
    assert all(torch.equal(t.view(torch.int16), bits) for t in got.values())


def test_each_tensor_has_its_own_memory() -> None:
    with pair() as (a, b):
        a.send({}, {"x": torch.ones(3), "y": torch.ones(3)})
        _, got = b.receive()
    got["x"].zero_()
    assert got["y"].tolist() == [1, 1, 1]
    assert got["x"].untyped_storage().nbytes() == 12


def test_no_activation_is_in_a_repr() -> None:
    assert repr(Frame({"secret": 1}, {"x": torch.ones(3)}, 300)) == "Frame(300 bytes)"


def test_the_default_device_is_not_asked() -> None:
    with pair() as (a, b):
        a.send({}, {"x": torch.ones(3)})
        with torch.device("meta"):
            _, got = b.receive()
    assert got["x"].device.type == "cpu"


def test_frames_follow_each_other() -> None:
    with pair() as (a, b):
        for i in range(3):
            a.send({"id": i}, {"x": torch.full((i,), i)})
        for i in range(3):
            fields, got = b.receive()
            assert fields["id"] == i
            assert got["x"].tolist() == [i] * i


@pytest.mark.parametrize("taps", [False, True])
def test_small_buffers(taps: bool) -> None:
    """Many partial sends and reads, in pieces that end in the middle of elements."""
    recorded: dict[str, list[bytes]] = {"sent": [], "got": []}
    left, right = socket.socketpair()
    a = Connection(left, peer="b", tap=(lambda way, raw: recorded["sent"].append(raw)) if taps else None)
    b = Connection(right, peer="a", tap=(lambda way, raw: recorded["got"].append(raw)) if taps else None)
    for sock in (left, right):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    tensors = {f"x{i}": tensor_of(torch.float32, (i, 1237), i) for i in range(12)}
    with closing(a), closing(b):
        left.settimeout(20)  # Python's timeout makes the socket non-blocking, so that every send is a partial one
        with running(lambda: [send_all(a, tensors), send_all(a, tensors)]):
            for _ in range(2):
                _, got = b.receive()
                assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
        assert a.bytes_sent == b.bytes_received
    if taps:
        assert b"".join(recorded["sent"]) == b"".join(recorded["got"])
        assert len(b"".join(recorded["sent"])) == a.bytes_sent


def send_all(connection: Connection, tensors: dict[str, torch.Tensor]) -> None:
    connection.send({}, tensors)


def test_more_tensors_than_one_system_call_takes() -> None:
    empty_ones = {f"e{i}": torch.empty(0) for i in range(1100)}
    tensors = {**empty_ones, **{f"x{i}": torch.tensor([i]) for i in range(2500)}}
    with pair() as (a, b):
        with running(lambda: a.send({}, tensors)):
            _, got = b.receive()
        assert [int(got[f"x{i}"]) for i in range(2500)] == list(range(2500))
        assert len(got) == 3600


def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    big = tensor_of(torch.float64, (500, 1000), 3)
    with closing(Connection(left, peer="b")) as a, closing(Connection(right, peer="a")) as b:
        assert left.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for sock in (left, right):  # a host that vanishes is noticed
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        with running(lambda: a.send({"id": 1}, {"x": big})):
            _, got = b.receive()
    assert torch.equal(got["x"], big)


def test_tap_sees_every_byte_of_both_directions() -> None:
    seen: list[tuple[str, bytes]] = []
    with pair(taps=(lambda way, raw: seen.append((way, raw)), None)) as (a, b):
        a.send({"id": 1}, {"x": torch.tensor([1.5]), "e": torch.empty(0)})
        b.receive()
        b.send({"id": 1, "ok": True}, {"y": torch.tensor([2.5])})
        a.receive()
    for way, name, value in (("out", "x", 1.5), ("in", "y", 2.5)):
        fields, tensors = decode_frame(b"".join(raw for direction, raw in seen if direction == way))
        assert fields["id"] == 1
        assert bytes(tensors[name][1]) == struct.pack("<f", value)


# Hostile and dying peers


def frame_of(table: list, payload: bytes) -> bytes:
    """A frame with a right prefix around any tensor table."""
    header = msgpack.packb({"tensors": table})
    return PREFIX.pack(b"OBFT", 2, b"\0\0\0", len(header), len(payload)) + header + payload


def closed(connection: Connection) -> bool:
    try:
        connection.send({})
    except ConnectionClosedError:
        return True
    return False


def allocations(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    return calls


@pytest.mark.parametrize("row", [["x", "float64", [2**40]], ["x", "uint8", [2**32, 2**32]], ["x", "uint8", [-1]]])
def test_nothing_is_allocated_for_a_refused_frame(row: list, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = allocations(monkeypatch)
    with raw_peer() as (connection, peer):
        peer.sendall(frame_of([["ok", "uint8", [2]], row], b"\0\0"))
        with pytest.raises(ProtocolError, match="worker w, tensor x"):
            connection.receive()
        assert calls == []
        assert closed(connection)
    with raw_peer() as (connection, peer):  # the control: the patch sees what is allocated
        peer.sendall(frame_of([["ok", "uint8", [2]]], b"\0\0"))
        connection.receive()
        assert calls == [((2,),)]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_nothing_is_allocated_beyond_the_bound_of_one_receive(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = allocations(monkeypatch)
    with raw_peer() as (connection, peer):
        peer.sendall(frame_of([["x", "uint8", [2]], ["e", "float64", [0, 9]]], b"\0\0"))
        if most == 2:  # the control: exactly the bound is taken, and an empty tensor counts nothing
            assert connection.receive(max_payload=most)[1].keys() == {"x", "e"}
            return
        with pytest.raises(ProtocolError, match=f"payload too long: got 2, expected at most {most}"):
            connection.receive(max_payload=most)
        assert calls == []
        assert closed(connection)


def test_no_memory_for_a_frame_ends_the_session_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with raw_peer() as (connection, peer):
        peer.sendall(frame_of([["x", "uint8", [2]]], b"\0\0"))
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(ProtocolError, match="does not fit in memory"):
            connection.receive()
        assert closed(connection)


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=60), st.booleans())
def test_arbitrary_bytes(raw: bytes, after_magic: bool) -> None:
    with raw_peer(limits=Limits(max_payload_bytes=10_000)) as (connection, peer):
        peer.sendall(b"OBFT\2\0\0\0" * after_magic + raw)
        peer.close()
        with pytest.raises(ProtocolError):
            connection.receive()
        assert closed(connection)


HEAD, LENGTH = encode_head({"id": 3}, [TensorSpec("x", torch.float32, (2,)), TensorSpec("m", torch.bool, (3,))])
FRAME = HEAD + bytes(LENGTH)


@pytest.mark.parametrize("length", range(len(FRAME)))
def test_a_frame_cut_short_is_a_closed_connection(length: int) -> None:
    with raw_peer() as (connection, peer):
        peer.sendall(FRAME[:length])
        peer.close()
        with pytest.raises(ConnectionClosedError, match="worker w"):
            connection.receive()
        assert connection.bytes_received == length


@settings(max_examples=100)
@given(st.integers(0, len(HEAD) * 8 - 1))
def test_flipped_bits(bit: int) -> None:
    frame = bytearray(FRAME)
    frame[bit // 8] ^= 1 << bit % 8
    with raw_peer(limits=Limits(max_payload_bytes=10_000)) as (connection, peer):
        peer.sendall(frame)
        peer.close()
        try:
            connection.receive()
        except ProtocolError:
            assert closed(connection)
        else:
            assert bytes(frame) != FRAME  # another valid header: another id, name or dtype of the same size


def test_bytes_after_a_refused_frame_are_never_read_as_one() -> None:
    with raw_peer() as (connection, peer):
        peer.sendall(frame_of([["m", "bool", [1]]], b"\2") + FRAME)
        with pytest.raises(ProtocolError, match="bool"):
            connection.receive()
        with pytest.raises(ConnectionClosedError):
            connection.receive()


def test_sending_to_a_dead_peer() -> None:
    with raw_peer() as (connection, peer):
        peer.close()
        with pytest.raises(ConnectionClosedError, match="worker w"):
            connection.send({}, {"x": torch.ones(3)})


def test_reset_by_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
    right.close()
    with closing(Connection(left, peer="w")) as connection, pytest.raises(ConnectionClosedError):
        connection.receive()


def test_a_frame_that_cannot_be_sent_leaves_the_connection_open() -> None:
    with pair(limits=Limits(max_payload_bytes=8)) as (a, b):
        for tensors in ({"x": torch.ones(3)}, {"x": torch.ones(1, dtype=torch.complex64)}):
            with pytest.raises(UsageError, match="frame cannot be sent"):
                a.send({}, tensors)
        a.send({"id": 1}, {"x": torch.ones(2)})
        assert b.receive()[0] == {"id": 1}


# Timeouts and closing


def test_waiting_for_a_frame_leaves_the_connection_open() -> None:
    with raw_peer() as (connection, peer):
        connection.settimeout(0.01)
        with pytest.raises(TimeoutError, match=r"worker w was silent for 0\.01 s"):
            connection.receive()
        peer.sendall(FRAME)
        assert connection.receive()[0] == {"id": 3}


@pytest.mark.parametrize("length", [1, 19, 20, 30, len(HEAD), len(FRAME) - 1])
def test_a_late_rest_is_never_read(length: int) -> None:
    with raw_peer() as (connection, peer):
        connection.settimeout(0.01)
        peer.sendall(FRAME[:length])
        with pytest.raises(TimeoutError):
            connection.receive()
        with pytest.raises(ConnectionClosedError):
            connection.receive()


def test_a_trickle_does_not_hold_a_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_peer() as (connection, peer):
        connection.settimeout(20)
        clock = iter([0.0, 19.0, 21.0])  # the start, then after each short read
        monkeypatch.setattr("obfuscatune.protocol.connection.time.monotonic", lambda: next(clock))
        real = connection._step_in
        monkeypatch.setattr(connection, "_step_in", lambda buffers, wait: real([memoryview(buffers[0])[:1]], wait=wait))
        peer.sendall(FRAME)
        with pytest.raises(TimeoutError):
            connection.receive()
        assert connection.bytes_received == 2


def test_a_peer_that_does_not_read() -> None:
    with raw_peer() as (connection, _):
        connection.settimeout(0.01)
        with pytest.raises(TimeoutError):
            connection.send({}, {"x": torch.zeros(16 * 1024**2, dtype=torch.uint8)})
        assert closed(connection)


def test_a_peer_that_reads_slowly_does_not_hold_a_send_for_ever() -> None:
    with raw_peer() as (connection, peer):
        connection.settimeout(0.5)
        end = threading.Event()

        def trickle() -> None:
            while not end.wait(0.1):
                peer.recv(64 * 1024)

        with running(trickle):
            started = time.monotonic()
            try:
                with pytest.raises(TimeoutError):
                    connection.send({}, {"x": torch.zeros(24 * 1024**2, dtype=torch.uint8)})
            finally:
                end.set()
        assert time.monotonic() - started < 5
        assert closed(connection)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_wrong_timeouts(seconds: float) -> None:
    with raw_peer() as (connection, _), pytest.raises(UsageError, match="wrong timeout"):
        connection.settimeout(seconds)


def test_close_twice_and_use_after_it() -> None:
    with pair() as (a, b):
        a.close()
        a.close()
        for use in (lambda: a.send({}), a.receive, b.receive, lambda: a.settimeout(1)):
            with pytest.raises(ConnectionClosedError):
                use()


def test_close_wakes_a_blocked_receive() -> None:
    with pair() as (a, _):
        a.settimeout(None)
        entered, errors = threading.Event(), []

        def wait() -> None:
            entered.set()
            with pytest.raises(ConnectionClosedError):
                a.receive()
            errors.append("raised")

        with running(wait):
            assert entered.wait(20)
            a.close()
        assert errors == ["raised"]


def test_close_ends_the_stream_although_somebody_else_holds_the_socket() -> None:
    """As a thread blocked in its receive does, or a forked child."""
    with raw_peer() as (connection, peer):
        holder = connection._stream._sock.dup()
        with holder:
            connection.close()
            peer.settimeout(5)
            assert peer.recv(1) == b""


def test_an_interrupt_within_a_frame_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_peer() as (connection, peer):
        peer.sendall(FRAME)

        def interrupted(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("obfuscatune.protocol.connection.decode_header", interrupted)
        with pytest.raises(KeyboardInterrupt):
            connection.receive()
        assert closed(connection)
