"""The server under requests that are broken on purpose: each is answered, and the next good one is served."""

import copy
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.errors import ConnectionClosedError
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import DTYPES, PREFIX
from obfuscatune.protocol.limits import Limits
from obfuscatune.worker.server import serve_connection

CPU = torch.device("cpu")
Request = tuple[dict[str, Any], dict[str, Tensor]]


@contextmanager
def served(*, limits: Limits = Limits()) -> Iterator[Connection]:  # noqa: B008
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve_connection, args=(Connection(theirs, peer="enclave", limits=limits), CPU))
    thread.start()
    with closing(Connection(ours, peer="worker")) as connection:
        connection.settimeout(60)
        yield connection
    thread.join(timeout=60)
    assert not thread.is_alive()


def ask(connection: Connection, header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Request:
    connection.send(header, tensors or {})
    return connection.receive()


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


# One valid request of each kind, in an order in which all succeed.
VALID: list[Request] = [
    ({"op": "hello"}, {}),
    ({"op": "define", "segment": "s0", "kind": "linear", "spec": {}}, {"weight": ones(4, 4)}),
    ({"op": "define", "segment": "s1", "kind": "attention",
      "spec": {"heads": 2, "kv_heads": 1, "scale": 0.5, "rotary": 2, "softcap": None, "widths": [4, 2, 2]}},
     {"first": ones(4, 8), "first_bias": ones(8), "last": ones(4, 4)}),
    ({"op": "define", "segment": "s2", "kind": "mlp", "spec": {"activation": "gelu_new", "gated": False}},
     {"first": ones(4, 8), "first_bias": ones(8), "last": ones(8, 4)}),
    ({"op": "hold", "segment": "s2", "slot": "in0", "scale": 2.0}, {"a": ones(4, 2), "b": ones(2, 8)}),
    ({"op": "forward", "segment": "s0", "keep": True, "factors": ["B.in0"], "held": []},
     {"x": ones(2, 3, 4), "u.in0": ones(2, 3, 2), "B.in0": ones(2, 4)}),
    ({"op": "backward", "segment": "s0", "call": 106, "wants": ["x", "B.in0"], "fresh": []}, {"y": ones(2, 3, 4)}),
    ({"op": "forward", "segment": "s1", "keep": False, "factors": [], "held": [], "rotary": {"id": 1},
      "cache": {"id": 1, "start": 0, "length": 0, "rows": None}},
     {"x": ones(2, 3, 4), "cos": ones(1, 3, 2), "sin": ones(1, 3, 2)}),
    ({"op": "forward", "segment": "s1", "keep": False, "factors": [], "held": [], "rotary": {"id": 2},
      "mask": {"id": 3, "shape": [2, 1, 1, 4]}, "cache": {"id": 1, "start": 0, "length": 3, "rows": [1, 0]}},
     {"x": ones(2, 1, 4), "mask": torch.tensor([255], dtype=torch.uint8), "cos": ones(1, 1, 2), "sin": ones(1, 1, 2)}),
    ({"op": "forward", "segment": "s2", "keep": True, "factors": [], "held": ["in0"]}, {"x": ones(2, 3, 4)}),
    ({"op": "backward", "segment": "s2", "call": 110, "wants": ["x"], "fresh": ["in0"]}, {"y": ones(2, 3, 4)}),
    ({"op": "optimizer", "action": "step", "kind": "adamw", "options": {"lr": 0.1}, "lr": 0.1,
      "scales": {"s2.in0": 1.0}}, {}),
    ({"op": "optimizer", "action": "export"}, {}),
    ({"op": "optimizer", "action": "import", "kind": "adamw", "options": {"lr": 0.1}}, {"s2.in0.a": ones(4, 2)}),
    ({"op": "stats", "drop": {"calls": [1], "caches": [1], "shared": [1]}}, {}),
]  # fmt: skip


def run_valid(connection: Connection, upto: int) -> None:
    for number, (header, tensors) in enumerate(VALID[:upto], start=101):
        reply, _ = ask(connection, {"id": number, **header}, tensors)
        assert reply["ok"] is True, (header, reply)
        assert reply["id"] == number


def test_the_valid_requests_are_valid() -> None:
    with served() as connection:
        run_valid(connection, len(VALID))


words = sorted({word for header, tensors in VALID for word in [*header, *tensors]})
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    scalars | st.integers(-3, 12) | st.sampled_from([*words, "s0", "s1", "s2", ""]) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=3),
    max_leaves=4,
)
tensors = st.builds(
    lambda dtype, shape: torch.ones(shape).to(dtype),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 4), max_size=5),
)


@st.composite
def broken_requests(draw: st.DrawFn) -> tuple[int, Request]:
    """A valid request, and the number of those before it, with one to three things changed."""
    index = draw(st.integers(0, len(VALID) - 1))
    header, arrays = copy.deepcopy(VALID[index])
    header["id"] = 101 + index
    for _ in range(draw(st.integers(1, 3))):
        target: dict[str, Any] = header
        nested = [key for key, value in header.items() if isinstance(value, dict)]
        if nested and draw(st.booleans()):
            target = header[draw(st.sampled_from(nested))]
        change = draw(st.sampled_from(["value", "value", "remove", "add", "tensor", "tensor", "no tensor"]))
        if change == "value" and target:
            target[draw(st.sampled_from(sorted(target)))] = draw(values)
        elif change == "remove" and target:
            del target[draw(st.sampled_from(sorted(target)))]
        elif change == "add":
            target[draw(st.sampled_from(words))] = draw(values)
        elif change == "tensor":
            arrays[draw(st.sampled_from([*words, "u.up", "A.down", "z"]))] = draw(tensors)
        elif arrays:
            del arrays[draw(st.sampled_from(sorted(arrays)))]
    header.pop("tensors", None)
    return index, (header, arrays)


@given(broken_requests())
@settings(max_examples=250)
def test_a_broken_request_is_answered_and_the_next_is_served(case: tuple[int, Request]) -> None:
    index, (header, arrays) = case
    with served() as connection:
        if index == 0 and any(tensor.numel() for tensor in arrays.values()):
            connection.send(header, arrays)  # a greeting has no payload
            with pytest.raises(ConnectionClosedError):
                connection.receive()
            return
        run_valid(connection, index)
        reply, outputs = ask(connection, header, arrays)
        number = header.get("id")
        last = 100 + index if index else 0
        valid = type(number) is int and number > last
        assert reply["id"] == (number if valid else None)
        assert valid or reply["ok"] is False
        if reply["ok"] is not True:
            assert reply["error"] in ("refused", "failed")
            assert isinstance(reply["message"], str)
            assert outputs == {}
        following = max(number, 100) + 1 if valid else 101 + index
        reply, _ = ask(connection, {"id": following, "op": "stats"})
        assert (reply["id"], reply["ok"]) == (following, True)


@pytest.mark.parametrize("number", [None, 0, -1, True, 2.0, "2", [2], 1], ids=repr)
def test_a_wrong_id_is_refused_and_nothing_is_done(number: Any) -> None:
    define = {"op": "define", "segment": "s", "kind": "linear", "spec": {}}
    with served() as connection:
        assert ask(connection, {"id": 1, "op": "hello"})[0]["ok"] is True
        reply, _ = ask(connection, {"id": number, **define}, {"weight": ones(1, 1)})
        assert (reply["id"], reply["ok"], reply["error"]) == (None, False, "refused")
        assert ask(connection, {"id": 2, **define}, {"weight": ones(1, 1)})[0]["ok"] is True


def test_an_unexpected_error_is_answered_with_its_type_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise AssertionError("0.1234")

    with served() as connection:
        with monkeypatch.context() as patch:
            patch.setattr("obfuscatune.worker.session.WorkerSession.handle", broken)
            reply, _ = ask(connection, {"id": 1, "op": "hello"})
        assert (reply["error"], reply["message"]) == ("failed", "AssertionError")
        assert ask(connection, {"id": 2, "op": "stats"})[0]["ok"] is True


def test_a_refusal_is_short_whatever_it_quotes() -> None:
    weights = {name: ones(1, 1) for name in ("first", "last")}
    request = {"op": "define", "segment": "s", "kind": "mlp", "spec": {"activation": "x" * 100_000}}
    with served() as connection:
        run_valid(connection, 1)
        reply, _ = ask(connection, {"id": 102, **request}, weights)
        assert (reply["error"], len(reply["message"])) == ("refused", 500)


def test_an_answer_beyond_the_limits_does_not_end_the_session() -> None:
    """An id of any length is not sent back, where the header would not take it twice."""
    with served(limits=Limits(max_header_bytes=400)) as connection:
        reply, _ = ask(connection, {"id": "x" * 360, "op": "none"})
        assert (reply["id"], reply["error"]) == (None, "refused")
        assert ask(connection, {"id": 2, "op": "stats"})[0]["ok"] is True


def test_after_its_first_request_an_enclave_may_be_silent() -> None:
    ours, theirs = (Connection(sock, peer="the other") for sock in socket.socketpair())
    ours.send({"id": 1, "op": "hello"})
    theirs.settimeout(0.05)
    thread = threading.Thread(target=serve_connection, args=(theirs, CPU))
    thread.start()
    with closing(ours):
        assert ours.receive()[0]["ok"] is True
        ours.settimeout(0.2)
        with pytest.raises(TimeoutError):
            ours.receive()
        ours.settimeout(60)
        assert ask(ours, {"id": 2, "op": "stats"})[0]["ok"] is True
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_reply_beyond_the_limits_is_an_error_and_not_the_end() -> None:
    with served(limits=Limits(max_payload_bytes=1000)) as connection:
        assert ask(connection, {"id": 0, "op": "hello"})
        assert ask(
            connection,
            {"id": 1, "op": "define", "segment": "s", "kind": "linear", "spec": {}},
            {"weight": ones(1, 200)},
        )
        reply, outputs = ask(connection, {"id": 2, "op": "forward", "segment": "s"}, {"x": ones(2, 1)})
        assert (reply["id"], reply["ok"], reply["error"], outputs) == (2, False, "failed", {})
        assert ask(connection, {"id": 3, "op": "stats"})[0]["ok"] is True


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"OBFT\x07" + bytes(15), bytes(100)])
def test_garbage_ends_the_connection_and_allocates_nothing(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve_connection, args=(Connection(theirs, peer="enclave"), CPU))
    thread.start()
    with ours:
        ours.settimeout(60)
        ours.sendall(garbage)
        with suppress(ConnectionResetError):  # the same end, where unread bytes were left
            assert ours.recv(1) == b""
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_session_ends_with_its_connection() -> None:
    with served() as connection:
        run_valid(connection, 10)
    with served() as connection:
        assert ask(connection, {"id": 1, "op": "stats"})[0]["kept_calls"] == 0
        assert ask(connection, {"id": 2, "op": "forward", "segment": "s0"}, {"x": ones(1, 4)})[0]["ok"] is False


def test_the_first_frame_has_no_payload() -> None:
    """A stranger's frame is refused by its length, before its header is read and long before 2 GiB are asked for."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve_connection, args=(Connection(theirs, peer="enclave"), CPU))
    thread.start()
    with ours:
        ours.settimeout(60)
        ours.sendall(PREFIX.pack(b"OBFT", 2, bytes(3), 16, 2**31))
        assert ours.recv(1) == b""
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_beyond_the_budget_a_request_is_refused_and_the_next_is_served() -> None:
    ours, theirs = (Connection(sock, peer="the other") for sock in socket.socketpair())
    thread = threading.Thread(target=serve_connection, args=(theirs, CPU), kwargs={"budget": 10_000})
    thread.start()
    define = {"op": "define", "kind": "linear", "spec": {}}
    with closing(ours):
        ours.settimeout(60)
        assert ask(ours, {"id": 1, "op": "hello"})[0]["memory_bytes"] == 10_000
        assert ask(ours, {"id": 2, **define, "segment": "s"}, {"weight": ones(10, 10)})[0]["ok"] is True
        reply, _ = ask(ours, {"id": 3, **define, "segment": "t"}, {"weight": ones(10, 100)})
        assert (reply["error"], reply["message"]) == (
            "refused",
            "out of the session's memory budget: got 8096 bytes more, expected at most 5504 of the 10000 that this "
            "worker gives a session",
        )
        assert ask(ours, {"id": 4, "op": "forward", "segment": "s"}, {"x": ones(2, 10)})[0]["ok"] is True
        assert ask(ours, {"id": 5, "op": "stats"})[0]["held_bytes"] == 4496
    thread.join(timeout=60)
    assert not thread.is_alive()
