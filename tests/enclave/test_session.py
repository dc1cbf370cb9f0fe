"""The enclave's end of a session: what it takes for a reply, and that everything else is one `WorkerFault`."""

import contextlib
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.enclave.lifetime import ENDING_SECONDS, close_all
from obfuscatune.enclave.session import Session
from obfuscatune.errors import NotFiniteError, ObfuscatuneError, UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import DTYPES, PROTOCOL_VERSION, TensorSpec, encode_head

EXPECTED = {"y": ((2, 3), torch.float32)}
Y = torch.tensor([[0.1234, 5.5, 7.0], [1.0, 2.0, 3.0]])


@contextmanager
def session_and_peer(*, timeout: float = 20) -> Iterator[tuple[Session, socket.socket]]:
    """A session, and the bare socket of its worker: what is written there before a request is read as its reply."""
    ours, theirs = socket.socketpair()
    session = Session(Connection(ours, peer="w"), worker="w", timeout=timeout)
    with closing(session), theirs:
        yield session, theirs


def frame(fields: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> bytes:
    tensors = tensors or {}
    head, _ = encode_head(fields, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
    return head + b"".join(t.contiguous().numpy().tobytes() for t in tensors.values())


def ask(session: Session) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return session.request("forward", "h.0.attn", {"segment": "s0"}, {"x": torch.ones(1)}, EXPECTED)


def test_a_right_reply_is_used() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame({"id": 1, "ok": True, "more": 5}, {"y": Y}))
        reply, outputs = ask(session)
        assert reply["more"] == 5
        assert torch.equal(outputs["y"], Y)
        counts = session.traffic["forward"]
        assert (counts.calls, counts.bytes_received) == (1, len(frame({"id": 1, "ok": True, "more": 5}, {"y": Y})))


OK = {"id": 1, "ok": True}
WRONG: dict[str, tuple[bytes, str]] = {
    "wrong shape": (frame(OK, {"y": Y.T}), r"shape or dtype of y: got \[3, 2\] torch.float32"),
    "other rank": (frame(OK, {"y": Y.flatten()}), "shape or dtype of y"),
    "wrong dtype": (frame(OK, {"y": Y.half()}), "shape or dtype of y"),
    "wider dtype": (frame(OK, {"y": Y.double()}), "payload too long"),
    "integers": (frame(OK, {"y": Y.int()}), "shape or dtype of y"),
    "no tensor": (frame(OK), r"tensors of the reply: got \[\] too many, \['y'\] missing"),
    "more tensors": (frame(OK, {"y": Y, "z": Y[:0]}), "tensors of the reply"),
    "more bytes": (frame(OK, {"y": Y, "z": Y}), "payload too long"),
    "another name": (frame(OK, {"z": Y}), "tensors of the reply"),
    "earlier call": (frame({"id": 0, "ok": True}, {"y": Y}), "reply to another call: got 0, expected 1"),
    "later call": (frame({"id": 2, "ok": True}, {"y": Y}), "reply to another call"),
    "no id": (frame({"ok": True}, {"y": Y}), "reply to another call"),
    "id as text": (frame({"id": "1", "ok": True}, {"y": Y}), "reply to another call"),
    "not ok": (frame({"id": 1, "ok": 1}, {"y": Y}), "refused the request"),
    "refusal": (frame({"id": 1, "ok": False, "error": "refused", "message": "segment: no"}), "segment: no"),
    "refusal without a message": (frame({"id": 1, "ok": False}), "no message"),
    "busy": (frame({"id": None, "ok": False, "error": "busy", "message": "another enclave"}), "another enclave"),
    "busy and ok": (frame({"id": None, "ok": True, "error": "busy"}, {"y": Y}), "reply to another call"),
    "garbage": (bytes(range(64)), "the reply breaks the protocol"),
    "another version": (frame(OK, {"y": Y})[:4] + b"\x07" + frame(OK, {"y": Y})[5:], "other protocol version"),
    "huge header": (b"OBFT\x02\0\0\0" + b"\xff" * 4 + bytes(8), "header too long"),
    "huge payload": (b"OBFT\x02\0\0\0" + bytes(4) + b"\xff" * 8, "payload too long"),
    "text": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a frame of this protocol"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reply_is_one_fault_and_the_end_of_the_session(case: str) -> None:
    reply, match = WRONG[case]
    with session_and_peer() as (session, peer):
        peer.sendall(reply)
        with pytest.raises(WorkerFault, match=match) as caught:
            ask(session)
        fault = caught.value
        assert (fault.worker, fault.layer, fault.call) == ("w", "h.0.attn", 1)
        assert "(at worker w, layer h.0.attn, call 1)\nhint: " in str(fault)
        assert "0.1234" not in str(fault)
        assert "5.5" not in str(fault)
        with pytest.raises(UsageError, match="ended by an earlier fault") as later:
            ask(session)
        assert later.value.where == "h.0.attn"
        assert drained(peer).count(b"OBFT") == 1, "nothing is sent after a fault"


NOT_FINITE = {
    "NaN": torch.full((2, 3), torch.nan),
    "one Inf": Y.clone().index_fill_(1, torch.tensor(2), torch.inf),
    "Inf and -Inf": torch.tensor([[torch.inf, -torch.inf, 0]] * 2),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_reply_that_is_not_finite_is_not_used_and_the_session_goes_on(case: str) -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame(OK, {"y": NOT_FINITE[case]}))
        with pytest.raises(NotFiniteError, match=r"NaN or infinity in y \(at h\.0\.attn\)"):
            ask(session)
        peer.sendall(frame({**OK, "id": 2}, {"y": Y}))
        assert torch.equal(ask(session)[1]["y"], Y)


def drained(peer: socket.socket) -> bytes:
    peer.settimeout(20)
    data = b""
    with contextlib.suppress(ConnectionResetError):  # the end, where the session left bytes unread
        while chunk := peer.recv(65536):
            data += chunk
    return data


def test_where_no_worker_listens_the_greeting_is_not_waited_for_as_long_as_a_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("obfuscatune.enclave.session.GREETING_SECONDS", 0.05)
    with session_and_peer(timeout=600) as (session, _), pytest.raises(WorkerFault) as caught:
        session.hello()
    assert str(caught.value).startswith("no reply within 0.05 s")
    assert caught.value.hint == "is an obfuscatune worker of this version what listens there"
    with session_and_peer(timeout=600) as (session, peer):
        peer.sendall(frame({**OK, "version": PROTOCOL_VERSION}) + frame({**OK, "id": 2}, {"y": Y}))
        session.hello()
        assert session.connection._timeout == 600
        ask(session)


def test_a_duplicate_reply_is_not_taken_for_the_next() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame(OK, {"y": Y}) * 2)
        ask(session)
        with pytest.raises(WorkerFault, match="reply to another call: got 1, expected 2"):
            ask(session)


def test_a_late_reply_is_never_used() -> None:
    with session_and_peer(timeout=0.05) as (session, peer):
        with pytest.raises(WorkerFault, match=r"no reply within 0.05 s"):
            ask(session)
        with pytest.raises(OSError):
            while True:
                peer.sendall(frame(OK, {"y": Y}))
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            ask(session)


def test_a_worker_that_stops_within_a_reply() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame(OK, {"y": Y})[:-1])
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(WorkerFault, match="the worker is gone"):
            ask(session)


def test_a_worker_that_is_gone() -> None:
    with session_and_peer() as (session, peer):
        peer.close()
        with pytest.raises(WorkerFault, match="the worker is gone"):
            ask(session)


def test_a_queue_is_told_once_for_each_place_and_prolongs_the_wait(capsys: pytest.CaptureFixture[str]) -> None:
    with session_and_peer(timeout=1.0) as (session, peer):
        queued = [frame({"id": 1, "queued": ahead}) for ahead in (2, 2, 1, 1, 5, "\x1b[2J", 0, -1, True, None)]

        def worker() -> None:
            for each in queued:
                peer.sendall(each)
                select.select([], [], [], 0.15)  # 1.5 s in all
            peer.sendall(frame({"id": 1, "ok": True, "version": PROTOCOL_VERSION}))

        thread = threading.Thread(target=worker)
        thread.start()
        assert session.hello()["version"] == PROTOCOL_VERSION
        thread.join()
        told = capsys.readouterr().err.splitlines()
        assert told == [f"waiting for the worker at w: {n} ahead" for n in ("2 sessions", "1 session")]


def test_in_a_queue_signs_of_life_may_be_farther_apart_than_replies() -> None:
    with session_and_peer(timeout=0.05) as (session, peer):
        peer.sendall(frame({"id": 1, "queued": 1}))

        def worker() -> None:
            select.select([], [], [], 0.3)
            peer.sendall(frame({"id": 1, "ok": True, "version": PROTOCOL_VERSION}))

        thread = threading.Thread(target=worker)
        thread.start()
        assert session.hello()["version"] == PROTOCOL_VERSION
        thread.join()
        assert session.connection._timeout == session._timeout == 0.05


def test_only_a_greeting_waits_in_a_queue() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame({"id": 1, "queued": 2}))
        with pytest.raises(WorkerFault, match="refused the request"):
            ask(session)


def test_another_version_is_refused() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame({"id": 1, "ok": True, "version": PROTOCOL_VERSION + 1}))
        with pytest.raises(WorkerFault, match=f"another protocol version: got {PROTOCOL_VERSION + 1}"):
            session.hello()


def test_a_version_cannot_steer_a_terminal() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame({"id": 1, "ok": True, "version": "\x1b[2J" + "x" * 1000}))
        with pytest.raises(WorkerFault, match="another protocol version") as caught:
            session.hello()
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_a_reply_without_tensors_may_have_none() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame(OK, {"y": Y}))
        with pytest.raises(WorkerFault, match="payload too long"):
            session.request("stats", "-", {}, {}, {})
    with session_and_peer() as (session, peer):  # the control: one that it may have
        peer.sendall(frame(OK, {"y": Y}))
        pending = session.submit("optimizer", "-", {}, {}, {}, optional=EXPECTED)
        assert torch.equal(pending.result()[1]["y"], Y)


def test_a_request_beyond_the_limits_leaves_the_session_and_its_drops() -> None:
    with session_and_peer() as (session, peer), closing(Connection(peer.dup(), peer="enclave")) as other:
        session.drop("calls", 5)
        session.drop("caches", 6)
        with pytest.raises(UsageError, match="frame cannot be sent"):
            session.request("forward", "l", {"held": ["s"] * 5000}, {}, EXPECTED)
        peer.sendall(frame({"id": 2, "ok": True}, {"y": Y}))
        ask(session)
        header, _ = other.receive()
        assert (header["id"], header["drop"]) == (2, {"calls": [5], "caches": [6]})
        assert session.traffic["forward"].calls == 1


def test_the_words_of_a_worker_cannot_steer_a_terminal() -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(frame({"id": 1, "ok": False, "message": "\x1b[2Jowned\r\n" + "x" * 10_000}))
        with pytest.raises(WorkerFault, match="owned") as caught:
            ask(session)
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_closed_session_says_so() -> None:
    with session_and_peer() as (session, _):
        session.close()
        session.close()
        with pytest.raises(UsageError, match="the protected model was closed"):
            ask(session)


def test_drops_ride_along_once_and_never_too_many() -> None:
    with session_and_peer() as (session, peer):
        other = Connection(peer.dup(), peer="enclave")
        with closing(other):
            for number in range(2500):
                session.drop("calls", number)
            session.drop("caches", 7)
            dropped = []
            for call in range(1, 5):
                peer.sendall(frame({"id": call, "ok": True}, {"y": Y}))
                ask(session)
                dropped.append(other.receive()[0].get("drop"))
    assert [drop and (len(drop["calls"]), drop.get("caches")) for drop in dropped] == [
        (1000, [7]),
        (1000, None),
        (500, None),
        None,
    ]
    assert [number for drop in dropped if drop for number in drop["calls"]] == list(range(2500))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_in_a_request_ends_the_session(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Connection, **_: Any) -> Any:
        raise error

    with session_and_peer() as (session, _):
        monkeypatch.setattr(Connection, "receive_frame", interrupted)
        with pytest.raises(error):
            ask(session)
        with pytest.raises(UsageError, match="interrupted in the middle of a request"):
            ask(session)


def send(session: Session, x: Tensor) -> Any:
    return session.submit("forward", "h.0.attn", {"segment": "s0"}, {"x": x}, {"y": (tuple(x.shape), x.dtype)})


@contextmanager
def doubling_worker(peer: socket.socket, *, requests: int) -> Iterator[list[int]]:
    """A worker that reads a request only after it has sent the last reply whole; gives the ids in their order."""
    ids: list[int] = []

    def serve() -> None:
        with closing(Connection(peer.dup(), peer="enclave")) as other:
            for _ in range(requests):
                header, tensors = other.receive()
                ids.append(header["id"])
                other.send({"id": header["id"], "ok": True}, {"y": tensors["x"] * 2})

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ids
    finally:
        thread.join(timeout=30)


def test_several_requests_under_way() -> None:
    """Each is larger than all socket buffers: the worker cannot take the third before its first reply is read."""
    with session_and_peer() as (session, peer), doubling_worker(peer, requests=5) as ids:
        inputs = [torch.full((4 * 1024**2,), float(i)) for i in range(5)]
        pending = [send(session, x) for x in inputs]
        assert pending[0].has_come
        for i in (4, 0, 2, 1, 3):
            assert torch.equal(pending[i].result()[1]["y"], inputs[i] * 2)
        assert ids == [1, 2, 3, 4, 5]
        counts = session.traffic["forward"]
        assert counts.calls == 5
        assert counts.bytes_received > 5 * 16 * 1024**2


def test_one_thread_waits_while_another_one_sends() -> None:
    with session_and_peer() as (session, peer), doubling_worker(peer, requests=40):
        found: dict[int, bool] = {}

        def work(first: int) -> None:
            for i in range(first, first + 20):
                x = torch.full((512 * 1024,), float(i))
                found[i] = torch.equal(send(session, x).result()[1]["y"], x * 2)

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert found == dict.fromkeys(range(40), True)


def test_a_fault_of_one_request_ends_the_others() -> None:
    with session_and_peer() as (session, peer):
        first, second = (session.submit("forward", f"h.{i}", {}, {}, EXPECTED) for i in range(2))
        peer.sendall(frame({"id": 1, "ok": False, "message": "no"}) + frame({"id": 2, "ok": True}, {"y": Y}))
        with pytest.raises(WorkerFault, match=r"got 'no' \(at worker w, layer h.0, call 1\)"):
            first.result()
        with pytest.raises(UsageError, match="ended by an earlier fault"):
            second.result()


def test_a_fault_names_the_call_that_was_awaited() -> None:
    for last_words, match in (
        (b"", "the worker is gone"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "breaks the protocol"),
    ):
        with session_and_peer() as (session, peer):
            first, _ = (session.submit("forward", f"h.{i}", {}, {}, EXPECTED) for i in range(2))
            peer.sendall(last_words)
            peer.shutdown(socket.SHUT_WR)
            with pytest.raises(WorkerFault, match=match) as caught:
                first.result()
            assert (caught.value.layer, caught.value.call) == ("h.0", 1)


class StoppedProcess:
    """A worker's process that does not leave by itself, on a clock of its own."""

    def __init__(self, clock: list[float], peers: list[socket.socket]) -> None:
        self.clock, self.peers, self.is_killed = clock, peers, False

    def poll(self) -> int | None:
        return -9 if self.is_killed else None

    def wait(self, timeout: float | None = None) -> int:
        assert all(drained(peer) == b"" for peer in self.peers), "a connection is open still"
        if not self.is_killed:
            assert timeout is not None
            self.clock[0] += timeout
            raise subprocess.TimeoutExpired("worker", timeout)
        return -9

    def kill(self) -> None:
        self.is_killed = True


def test_stopped_workers_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, peers, sessions, processes = [100.0], [], [], []
    monkeypatch.setattr("obfuscatune.enclave.lifetime.time.monotonic", lambda: clock[0])
    for _ in range(3):
        ours, theirs = socket.socketpair()
        process: Any = StoppedProcess(clock, peers)
        peers.append(theirs), processes.append(process)
        sessions.append(Session(Connection(ours, peer="w"), worker="w", timeout=20, process=process))
    close_all(sessions)
    assert clock[0] - 100 == pytest.approx(ENDING_SECONDS, abs=0.1)
    assert all(process.is_killed for process in processes)
    for peer in peers:
        peer.close()


def test_a_worker_that_neither_reads_nor_sends_is_given_up() -> None:
    with session_and_peer(timeout=0.2) as (session, _):
        session.submit("forward", "h.0", {}, {}, EXPECTED)
        with pytest.raises(WorkerFault, match=r"no reply within 0.2 s \(at worker w, layer h.1, call 2\)"):
            session.submit("forward", "h.1", {}, {"x": torch.zeros(16 * 1024**2)}, EXPECTED)


def test_close_ends_a_wait_in_another_thread() -> None:
    with session_and_peer() as (session, _):
        waiting, ended = threading.Event(), []

        def wait() -> None:
            pending = session.submit("forward", "h.0", {}, {}, EXPECTED)
            waiting.set()
            with pytest.raises(UsageError, match="was closed"):
                pending.result()
            ended.append(True)

        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(20)
        session.close()
        thread.join(timeout=20)
        assert ended


def test_two_threads_do_not_mix_their_requests() -> None:
    with session_and_peer() as (session, peer):
        other = Connection(peer.dup(), peer="enclave")

        def serve() -> None:
            for _ in range(40):
                header, tensors = other.receive()
                other.send({"id": header["id"], "ok": True}, {"y": tensors["x"] * 2})

        def drive(value: float) -> None:
            for _ in range(20):
                x = torch.full((2, 3), value)
                _, outputs = session.request("forward", "l", {}, {"x": x}, EXPECTED)
                right.append(torch.equal(outputs["y"], x * 2))

        right: list[bool] = []
        threads = [threading.Thread(target=serve), *(threading.Thread(target=drive, args=(v,)) for v in (1.0, 2.0))]
        run_all(threads)
        other.close()
    assert right == [True] * 40


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just(1) | values,
        "ok": st.just(True) | values,
        "error": st.just("busy") | values,
        "message": values,
        "version": st.just(PROTOCOL_VERSION) | values,
        "gradient_norms": values,
    },
)
floats = st.sampled_from([0.0, 1.0, -3e38, 1e-40, torch.inf, torch.nan])
replies = st.builds(
    lambda names, dtype, shape, value: (
        {n: torch.full(shape, value).nan_to_num().to(dtype) for n in names}
        if not dtype.is_floating_point
        else {n: torch.full(shape, value, dtype=torch.float64).to(dtype) for n in names}
    ),
    st.lists(st.sampled_from(["y", "z"]), unique=True),
    st.just(torch.float32) | st.sampled_from([d for d in DTYPES.values() if d != torch.bfloat16]),
    st.just([2, 3]) | st.lists(st.integers(0, 4), max_size=4),
    floats,
)


def only_a_fault(reply: bytes, call: Callable[[Session], Any]) -> None:
    with session_and_peer() as (session, peer):
        peer.sendall(reply)
        peer.shutdown(socket.SHUT_WR)
        try:
            call(session)
        except NotFiniteError:
            assert not session.has_ended
        except ObfuscatuneError as error:
            assert type(error) is WorkerFault
            with pytest.raises(UsageError, match="ended by an earlier fault"):
                ask(session)


@given(headers, replies)
@settings(max_examples=300)
def test_fuzzed_replies_are_right_or_one_fault(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    reply = frame(header, tensors)
    only_a_fault(reply, ask)
    only_a_fault(reply, lambda session: session.hello())
    only_a_fault(reply, lambda session: session.submit("optimizer", "-", {}, {}, {}, optional=EXPECTED).result())


@given(st.data())
@settings(max_examples=300)
def test_fuzzed_bytes_are_right_or_one_fault(data: st.DataObject) -> None:
    reply = bytearray(frame(OK, {"y": Y}))
    for _ in range(data.draw(st.integers(1, 4))):
        reply[data.draw(st.integers(0, len(reply) - 1))] = data.draw(st.integers(0, 255))
    only_a_fault(bytes(reply[: data.draw(st.integers(0, len(reply)))]), ask)
    only_a_fault(bytes(reply), ask)
