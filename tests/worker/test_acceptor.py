"""The worker that listens: places, the queue, strangers, processes that die, and that nothing is left behind."""

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch

from obfuscatune.errors import ConnectionClosedError
from obfuscatune.protocol.address import Address, address_of, connect, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.worker.acceptor import Acceptor, Bounds, _Child
from obfuscatune.worker.child import Service

from .processes import PATIENCE, SHORT, ask, children, opened, resident, started, worker

HELLO = {"id": 1, "op": "hello"}


@contextlib.contextmanager
def bounded(text: str = "tcp://127.0.0.1:0", **bounds: float) -> Iterator[tuple[int, Address]]:
    """An acceptor with these bounds: its process, and its address."""
    listener = listen(Address.parse(text))
    address = address_of(listener)
    command = [sys.executable, "-W", "error", "-c", SHORT, str(listener.fileno()), str(address), repr(bounds)]
    with listener, started(command, pass_fds=[listener.fileno()]) as (process, _):
        yield process.pid, address


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def is_closed(connection: Connection) -> bool:
    try:
        connection.receive()
    except ConnectionClosedError:
        return True
    return False


def test_a_session_is_a_process_and_others_wait_in_their_order() -> None:
    with bounded() as (pid, address), closing(opened(address)) as first:
        assert ask(first, HELLO)["ok"] is True
        assert len(children(pid)) == 1
        with closing(opened(address)) as second, closing(opened(address)) as third:
            assert ask(second, {"id": 7, "op": "hello"}) == {"id": 7, "queued": 1}
            assert ask(third, HELLO) == {"id": 1, "queued": 2}
            assert ask(first, {"id": 2, "op": "stats"})["ok"] is True
            first.close()
            assert second.receive()[0]["id"] == 7
            assert third.receive()[0] == {"id": 1, "queued": 1}
            assert ask(second, {"id": 8, "op": "stats"})["kept_calls"] == 0
            second.close()
            assert third.receive()[0]["ok"] is True
        until(lambda: not children(pid))


def test_who_leaves_the_queue_is_forgotten() -> None:
    with bounded() as (pid, address), closing(opened(address)) as first:
        ask(first, HELLO)
        with closing(opened(address)) as second, closing(opened(address)) as third:
            assert ask(second, HELLO)["queued"] == 1
            assert ask(third, HELLO)["queued"] == 2
            second.close()
            assert third.receive()[0] == {"id": 1, "queued": 1}
            third.send({"id": 2, "op": "stats"})  # before it was answered: it is not to be believed
            assert is_closed(third)
        until(lambda: len(children(pid)) == 1)
        assert ask(first, {"id": 2, "op": "stats"})["ok"] is True


def test_a_queue_that_is_full_says_so() -> None:
    with bounded(max_waiting=1) as (pid, address), closing(opened(address)) as first:
        ask(first, HELLO)
        with closing(opened(address)) as second, closing(opened(address)) as third:
            assert ask(second, HELLO)["queued"] == 1
            reply = ask(third, HELLO)
            assert (reply["id"], reply["error"]) == (None, "busy")
            assert is_closed(third)
            until(lambda: len(children(pid)) == 2)
            first.close()
            assert second.receive()[0]["ok"] is True


@pytest.mark.slow
def test_the_queue_gives_signs_of_life() -> None:
    with bounded() as (_, address), closing(opened(address)) as first, closing(opened(address)) as second:
        ask(first, HELLO)
        assert ask(second, HELLO) == second.receive()[0] == {"id": 1, "queued": 1}  # ten seconds later


def test_several_sessions_at_once_have_nothing_in_common() -> None:
    define = {"op": "define", "segment": "s", "kind": "linear", "spec": {}}
    with bounded(max_sessions=3) as (pid, address):
        ends = [opened(address) for _ in range(3)]
        for factor, end in enumerate(ends, start=1):
            assert ask(end, HELLO)["ok"] is True
            assert ask(end, {"id": 2, **define}, {"weight": factor * torch.eye(2)})["ok"] is True
        for factor, end in enumerate(ends, start=1):
            end.send({"id": 3, "op": "forward", "segment": "s"}, {"x": torch.ones(1, 2)})
            assert torch.equal(end.receive()[1]["y"], factor * torch.ones(1, 2))
        victim = children(pid)[1]
        os.kill(victim, signal.SIGSEGV)
        assert is_closed(ends[1])
        until(lambda: victim not in children(pid))  # reaped, and nobody else harmed
        for end in (ends[0], ends[2]):
            assert ask(end, {"id": 4, "op": "stats"})["ok"] is True
        with closing(opened(address)) as another:
            assert ask(another, HELLO)["ok"] is True
        for end in ends:
            end.close()


@pytest.mark.slow
def test_strangers_hold_nothing() -> None:
    with bounded(greeting_seconds=1.0, max_greeting=3) as (pid, address):
        silent, trickling, third = (connect(address, PATIENCE) for _ in range(3))
        until(lambda: len(children(pid)) == 3)
        with silent, trickling, third, connect(address, PATIENCE) as fourth:
            fourth.settimeout(PATIENCE)
            assert fourth.recv(1) == b""  # no room: closed at once
            assert len(children(pid)) == 3
            third.close()
            until(lambda: len(children(pid)) == 2)
            with closing(opened(address)) as honest:
                assert ask(honest, HELLO)["ok"] is True
                with contextlib.suppress(OSError):
                    while True:  # a byte now and then does not prolong it
                        trickling.send(b"O")
                        select.select([], [], [], 0.1)
                until(lambda: len(children(pid)) == 1)
                assert ask(honest, {"id": 2, "op": "stats"})["ok"] is True  # the bound is of greetings alone
        until(lambda: not children(pid))


def test_no_few_machines_hold_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of other machines, which loopback has none of: the acceptor's books alone, without processes."""
    names, ended = deque[object](), []

    class Listener:
        def accept(self) -> tuple[socket.socket, object]:
            return socket.socket(), names.popleft()

    listener, bounds = Listener(), Bounds(max_greeting=8, max_greeting_each=3)
    acceptor = Acceptor(listener, Service(torch.device("cpu"), None, 1 << 20), bounds)  # type: ignore[arg-type]

    def fork(accepted: socket.socket, source: str | None) -> None:
        acceptor._greeting.append(_Child(0, 0, accepted, source, 0.0))

    def end(child: _Child) -> None:
        acceptor._greeting.remove(child)
        ended.append(child.source)

    monkeypatch.setattr(acceptor, "_fork", fork)
    monkeypatch.setattr(acceptor, "_end", end)

    def come(host: str | None, times: int = 1) -> int:
        """Connect; returns how many got a place."""
        before = len(acceptor._greeting) + len(ended)
        for _ in range(times):
            names.append("" if host is None else (host, 1))
            acceptor._accept()
        return len(acceptor._greeting) + len(ended) - before

    assert come("2001:db8:1:2::1", 2) + come("2001:db8:1:2:ffff::2", 5) == 3  # one /64, as one customer has
    assert come("192.0.2.1", 9) == 3 and come("192.0.2.2", 2) == 2 and ended == []
    held = Counter(child.source for child in acceptor._greeting)
    assert held == {"2001:db8:1:2::/64": 3, "192.0.2.1": 3, "192.0.2.2": 2}
    come("192.0.2.3"), come(None)  # all places are taken: of those that have most
    assert ended == ["2001:db8:1:2::/64", "192.0.2.1"]
    come("192.0.2.4")
    assert len(ended) == 3 and max(Counter(child.source for child in acceptor._greeting).values()) == 2
    come("192.0.2.4"), come("192.0.2.3")  # nobody has two more than they
    assert len(ended) == 3 and len(acceptor._greeting) == 8


@pytest.mark.parametrize("call", ["socket.socketpair", "os.fork"])
def test_without_descriptors_or_processes_the_acceptor_goes_on(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(call, none_left)
    ours, theirs = socket.socket(), socket.socket()
    with ours, theirs:
        acceptor = Acceptor(ours, Service(torch.device("cpu"), None, 1 << 20))
        acceptor._fork(theirs, None)
        assert not list(acceptor._all())


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_sessions_end_with_the_worker(stop: signal.Signals) -> None:
    with worker("--max_sessions", "2") as (process, address), closing(opened(address)) as first:
        assert ask(first, HELLO)["ok"] is True
        with closing(opened(address)) as second:
            assert ask(second, HELLO)["ok"] is True
            process.send_signal(stop)
            assert is_closed(first)
            assert is_closed(second)
        assert process.wait(PATIENCE) == (-signal.SIGKILL if stop == signal.SIGKILL else 0)


@pytest.mark.slow
def test_a_budget_bounds_what_autograd_saves() -> None:
    """A kept MLP saves more than its inputs and outputs: the system's limit says so, and the session goes on."""
    with worker("--memory_gb", "0.05") as (_, address), closing(opened(address)) as end:
        assert ask(end, HELLO)["memory_bytes"] == 50_000_000
        weights = {"first": torch.ones(64, 2048), "last": torch.ones(2048, 64)}
        spec = {"activation": "gelu_new", "gated": False}
        assert ask(end, {"id": 2, "op": "define", "segment": "m", "kind": "mlp", "spec": spec}, weights)["ok"]
        for number in range(3, 60):
            call = {"id": number, "op": "forward", "segment": "m", "keep": True}
            end.send(call, {"x": torch.ones(1, 2048, 64)})  # saves 16 MB twice
            reply, _ = end.receive()
            if not reply["ok"]:
                break
        assert "out of the session's memory budget" in reply["message"]
        drop = {"calls": list(range(3, number))}
        assert ask(end, {"id": 100, "op": "stats", "drop": drop})["ok"] is True
        assert ask(end, {"id": 101, "op": "forward", "segment": "m"}, {"x": torch.ones(1, 64, 64)})["ok"] is True


@pytest.mark.slow
def test_the_fortieth_session_takes_no_more_than_the_first() -> None:
    """A process each: what a session holds is in reference cycles, which one process for all would keep for long.

    Sessions like these, served in one process: 267 MiB after the first, up to 681 MiB within forty.
    """
    sizes, define = [], {"op": "define", "segment": "s", "kind": "linear", "spec": {}}
    with bounded() as (pid, address):
        for _ in range(40):
            with closing(opened(address)) as end:
                assert ask(end, HELLO)["ok"] is True
                ask(end, {"id": 2, **define}, {"weight": torch.ones(768, 2048)})  # 6 MiB
                for number in range(3, 7):
                    call = {"id": number, "op": "forward", "segment": "s", "keep": True}
                    assert ask(end, call, {"x": torch.ones(256, 768)})["ok"] is True
                sizes.append((resident(pid), sum(map(resident, children(pid)))))
            until(lambda: not children(pid))  # else the next one waits for its place for a while
    for listener_or_session in zip(*sizes, strict=True):
        first, last = listener_or_session[0], listener_or_session[-1]
        assert last < first + 4 * 1024**2, [size >> 20 for size in listener_or_session]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sessions_that_come_and_go_leave_nothing() -> None:
    """20 clients for OBFUSCATUNE_SOAK_SECONDS: processes, descriptors and memory of the worker are as before."""
    seconds = float(os.environ.get("OBFUSCATUNE_SOAK_SECONDS", "20"))
    define = {"op": "define", "segment": "s", "kind": "linear", "spec": {}}
    served, faults = [0] * 20, []

    def client(index: int, address: Address, deadline: float) -> None:
        try:
            while time.monotonic() < deadline:
                with closing(opened(address)) as end:
                    reply = ask(end, HELLO)
                    while "queued" in reply:
                        reply = end.receive()[0]
                    assert reply["ok"] is True, reply
                    ask(end, {"id": 2, **define}, {"weight": torch.ones(256, 256)})
                    for number in range(3, 6):
                        call = {"id": number, "op": "forward", "segment": "s", "keep": True}
                        assert ask(end, call, {"x": torch.ones(4, 256)})["ok"] is True
                served[index] += 1
        except Exception as error:
            faults.append(error)

    with bounded(max_sessions=4) as (pid, address):
        run = [threading.Thread(target=client, args=(i, address, time.monotonic() + 5)) for i in range(20)]
        _all(run)
        until(lambda: not children(pid))
        before = len(os.listdir(f"/proc/{pid}/fd")), resident(pid)
        run = [threading.Thread(target=client, args=(i, address, time.monotonic() + seconds)) for i in range(20)]
        _all(run)
        until(lambda: not children(pid))
        after = len(os.listdir(f"/proc/{pid}/fd")), resident(pid)
    assert not faults
    assert min(served) > 0, "a client was starved"
    print(f"{sum(served)} sessions; descriptors {before[0]} -> {after[0]}, memory {before[1]:,} -> {after[1]:,} bytes")
    assert after[0] == before[0]
    assert after[1] < before[1] + 4 * 1024**2


def _all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
