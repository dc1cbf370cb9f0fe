"""Workers that lie, die or stand still under `shared`: caught, named where a spare tells, and borne where it can be."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sharing import coding
from obfuscatune.enclave.sharing.waiting import Waiting
from obfuscatune.enclave.sharing.workers import SharedWeight, Workers
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import TensorSpec

from .test_replies import lying as lying_once
from .workers import IDS, Answer, Fields, Tensors, honest, loss_of, new_model, worker_in_a_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*protect nothing:UserWarning")

TRACED = ("sharing/workers.py", "sharing/coding.py", "sharing/uniform.py")
BYTE = TensorSpec("", torch.int8, (1,))


@pytest.fixture(autouse=True)
def workers_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads of this process each have a point, which a process refuses."""
    monkeypatch.setattr("obfuscatune.worker.residues.refuse_second_point", lambda sharing, point: None)


@contextlib.contextmanager
def protected_by(directory: Path, answers: list[Answer], **switches: Any) -> Iterator[tuple[Any, list[str]]]:
    """A model on workers that answer like this."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for i, answer in enumerate(answers):
            (directory / str(i)).mkdir()
            addresses.append(stack.enter_context(worker_in_a_thread(directory / str(i), answer)))
        protected = obfuscatune.protect(new_model(), profile="shared", worker=addresses, timeout=20.0, **switches)
        with protected:
            yield protected, addresses


def lying(transpose: bool, at: int = 0) -> Answer:
    """Flips one bit of one residue, in forward or backward products."""

    def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        if request["op"] == "multiply" and request["transpose"] == transpose:
            outputs["y"].view(-1)[at] ^= 1
        connection.send(reply, outputs)

    return answer


def silent(released: threading.Event) -> Answer:
    """Answers no product before it may."""

    def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        if request["op"] == "multiply":
            released.wait(60)
        connection.send(reply, outputs)

    return answer


def leaving(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
    if request["op"] == "multiply":
        connection.close()
        return
    connection.send(reply, outputs)


def step(model: Any) -> None:
    model.zero_grad()
    loss_of(model).backward()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("liar", [0, 2])
def test_a_liar_is_caught(tmp_path: Path, transpose: bool, liar: int) -> None:
    answers: list[Answer] = [honest] * 3
    answers[liar] = lying(transpose)
    with protected_by(tmp_path, answers) as (protected, addresses):
        with pytest.raises(WorkerFault, match="a product is wrong") as caught:
            step(protected.model)
        assert all(address in str(caught.value) for address in addresses)  # without a spare it could be any of them
        assert "spares=1" in str(caught.value)
        with pytest.raises(UsageError):  # and it is over
            step(protected.model)


LIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # as in test_malicious.py, of residues [L, rows, out]
    "zeros": torch.zeros_like,
    "other weights": lambda y: y.flip(-1),
    "noise": lambda y: y + torch.randint(-1, 2, y.shape, dtype=torch.int8),
    "rows swapped": lambda y: y.flip(-2),
    "one row": lambda y: y[:, -1:].expand_as(y).contiguous(),
    "primes swapped": lambda y: y.flip(0),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("number", [1, 6, 8, 9, 14])  # 8 forward products, then 8 backward
def test_a_wrong_product_in_a_training_step(number: int, lie: str, tmp_path: Path) -> None:
    def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        connection.send(reply, {"y": LIES[lie](outputs["y"])})

    with protected_by(tmp_path, [honest, lying_once("multiply", number, answer), honest]) as (protected, _):
        before = protected.session._last_id
        with pytest.raises(WorkerFault, match="a product is wrong") as caught:
            step(protected.model)
        assert caught.value.call == before + number
        with pytest.raises(UsageError):
            step(protected.model)


def test_an_earlier_reply_for_the_same_input(tmp_path: Path) -> None:
    """The same tokens again are another call: what was right for the first one is wrong for the second."""
    replies: dict[str, Tensors] = {}

    def replay(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        connection.send(reply, replies.setdefault(request["segment"], outputs) if "transpose" in request else outputs)

    with protected_by(tmp_path, [honest, replay, honest]) as (protected, _), torch.no_grad():
        loss_of(protected.model)
        with pytest.raises(WorkerFault, match="a product is wrong"):
            loss_of(protected.model)


@pytest.mark.parametrize("liar", [0, 1, 2, 3])
def test_a_spare_names_the_liar(tmp_path: Path, liar: int) -> None:
    answers: list[Answer] = [honest] * 4
    answers[liar] = lying(False)
    with protected_by(tmp_path, answers, spares=1) as (protected, addresses):
        # Where the liar was not among the first to answer, it did no harm in that call; in some call it is.
        with pytest.raises(WorkerFault, match="a product is wrong") as caught:
            for _ in range(200):
                step(protected.model)
        named = [address for address in addresses if address in str(caught.value)]
        assert named == [addresses[liar]]
        assert "no more than 1 lied" in str(caught.value)


@pytest.mark.parametrize("others", [honest, None])
def test_a_liar_that_leaves_after_its_lie_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: Answer | None
) -> None:
    """And where the last worker leaves as well, it is not the one that is named."""
    wrong = Workers._wrong

    def after_the_liar_has_left(self: Workers, *args: Any) -> WorkerFault:
        self._lost.add(0)  # as the next part of the call finds, or another thread
        return wrong(self, *args)

    def late(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        if request["op"] == "multiply":
            time.sleep(0.2)
        (others or leaving)(connection, request, reply, outputs)

    monkeypatch.setattr(Workers, "_wrong", after_the_liar_has_left)
    with protected_by(tmp_path, [lying(False), honest, honest, late], spares=1) as (protected, addresses):
        with pytest.raises(WorkerFault, match="a product is wrong") as caught:
            step(protected.model)
        named = [address for address in addresses if address in caught.value.worker]
        assert named == addresses[: 1 if others else 3]


def test_where_the_spare_stood_in_for_a_lost_worker_a_liar_cannot_be_told(tmp_path: Path) -> None:
    """Three replies are left, of which one is wrong: the error says so, and does not advise the spare that there is."""
    with protected_by(tmp_path, [leaving, honest, lying(False), honest], spares=1) as (protected, addresses):
        with (
            pytest.warns(UserWarning, match="a worker is lost, and a spare stands in"),
            pytest.raises(WorkerFault, match="a product is wrong") as caught,
        ):
            step(protected.model)
        assert [address for address in addresses if address in caught.value.worker] == addresses[1:]
        assert "which cannot be told" in caught.value.hint and f"stood in for {addresses[0]}" in caught.value.hint
        assert "spares=1" not in str(caught.value)


def test_a_liar_is_named_by_the_spares_that_are_left(tmp_path: Path) -> None:
    """Two spares, of which one stood in for a lost worker: the name holds if no more than one lied."""
    answers: list[Answer] = [leaving, lying(False), honest, honest, honest]
    with protected_by(tmp_path, answers, spares=2) as (protected, addresses):
        with pytest.warns(UserWarning, match="a spare stands in"), pytest.raises(WorkerFault) as caught:
            for _ in range(200):
                step(protected.model)
        assert caught.value.worker == addresses[1] and "no more than 1 lied" in str(caught.value)


def test_more_liars_than_spares_are_not_told_from_the_others(tmp_path: Path) -> None:
    """Each has a lie of its own: no three replies make up a product, and nobody is accused alone."""
    answers: list[Answer] = [honest, lying(False), lying(False, at=1), honest]
    with protected_by(tmp_path, answers, spares=1) as (protected, addresses):
        with pytest.raises(WorkerFault, match="more workers are wrong than the 1") as caught:
            step(protected.model)
        assert [address for address in addresses if address in caught.value.worker] == addresses


def test_not_verified_a_lie_passes(tmp_path: Path) -> None:
    """The control: it is the check that catches it. Without it the logits are others, and nobody is told."""
    with torch.no_grad():
        expected = new_model()(IDS).logits
        with protected_by(tmp_path, [honest, lying(False, at=-1), honest], verify=False) as (protected, _):
            assert not torch.allclose(protected.model(IDS).logits, expected, atol=1e-5)  # honest ones are off by 1e-7


def test_a_dead_worker_ends_it_and_is_named(tmp_path: Path) -> None:
    with protected_by(tmp_path, [honest, leaving, honest]) as (protected, addresses):
        with pytest.raises(WorkerFault, match="the worker is gone") as caught:
            step(protected.model)
        assert addresses[1] in str(caught.value)


def test_with_a_spare_a_dead_worker_costs_a_warning(tmp_path: Path) -> None:
    expected = new_model()
    step(expected)
    with protected_by(tmp_path, [honest, leaving, honest, honest], spares=1) as (protected, addresses):
        with pytest.warns(UserWarning, match="a worker is lost, and a spare stands in") as warned:
            step(protected.model)
        assert addresses[1] in str(warned[0].message) and "0 more may be lost" in str(warned[0].message)
        with torch.no_grad():
            assert torch.allclose(protected.model(IDS).logits, expected(IDS).logits, atol=1e-4)
        found = dict(protected.model.named_parameters())
        adapter = [(name, p) for name, p in expected.named_parameters() if "lora_" in name]
        assert adapter and all(torch.allclose(found[name].grad, p.grad, atol=1e-4) for name, p in adapter)


def test_with_a_spare_nobody_waits_for_a_worker_that_stands_still(tmp_path: Path) -> None:
    released, expected = threading.Event(), loss_of(new_model()).item()
    with protected_by(tmp_path, [honest, honest, silent(released), honest], spares=1) as (protected, _):
        try:
            for _ in range(5):
                step(protected.model)
                assert abs(loss_of(protected.model).item() - expected) < 1e-5
            assert not released.is_set()
        finally:
            released.set()


def test_with_a_spare_nobody_waits_for_a_worker_that_takes_no_more_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of one that was stopped, once a large request has filled the buffers on the way."""
    released, submit = threading.Event(), Session.submit
    stopped: list[Session] = []

    def stuck(self: Session, op: str, *arguments: Any, **options: Any) -> Any:
        if op == "multiply" and self in stopped:
            released.wait(60)
        return submit(self, op, *arguments, **options)

    monkeypatch.setattr(Session, "submit", stuck)
    expected = loss_of(new_model()).item()
    with protected_by(tmp_path, [honest] * 4, spares=1) as (protected, _):
        stopped.append(protected.links[2].session)
        try:
            for _ in range(5):
                step(protected.model)
                assert abs(loss_of(protected.model).item() - expected) < 1e-5
            assert not released.is_set()
        finally:
            released.set()


def test_a_spare_that_was_late_and_not_asked_stands_in_for_one_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Waiting, "is_late", lambda self, worker: worker == 3)
    shared, send = list[torch.Tensor](), Workers._send

    def noting(self: Workers, weight: SharedWeight, x: torch.Tensor, *, transpose: bool) -> Any:
        shared.append(x)
        return send(self, weight, x, transpose=transpose)

    monkeypatch.setattr(Workers, "_send", noting)
    with protected_by(tmp_path, [honest, leaving, honest, honest], spares=1) as (protected, addresses), torch.no_grad():
        with pytest.warns(UserWarning, match="a worker is lost, and a spare stands in") as warned:
            logits = protected.model(IDS).logits
        assert addresses[1] in str(warned[0].message)
        assert torch.allclose(logits, new_model()(IDS).logits, atol=1e-4)
        assert len(shared) == 9 and shared[0] is shared[1]  # eight layers, and the first rows shared anew


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_lie_ends_it_all_whatever_comes_while_the_liar_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """Ctrl-C, or a last worker that stands still: nothing goes on with vectors that somebody may have learnt of."""
    released, weights = threading.Event(), list[SharedWeight]()
    take_all, define = Workers._take_all, Workers.define

    def meanwhile(self: Workers, *args: Any) -> None:
        with pytest.raises(UsageError, match="ended by a product that was wrong"):  # as another thread finds
            self._vectors(weights[-1], False)
        if interrupted:
            raise KeyboardInterrupt
        monkeypatch.setattr(Session, "timeout", 0.2)
        take_all(self, *args)

    monkeypatch.setattr(Workers, "_take_all", meanwhile)
    monkeypatch.setattr(Workers, "define", lambda *args: weights.append(define(*args)) or weights[-1])
    with protected_by(tmp_path, [lying(False), honest, honest, silent(released)], spares=1) as (protected, addresses):
        try:
            with pytest.raises(WorkerFault, match="a product is wrong") as caught:
                step(protected.model)
            assert isinstance(caught.value.__cause__, KeyboardInterrupt) == interrupted
            assert all(link.session.has_ended for link in protected.links)
            assert [address for address in addresses if address in caught.value.worker] == addresses[:3]
            with pytest.raises(UsageError):
                step(protected.model)
        finally:
            released.set()


def test_with_a_spare_workers_that_all_owe_many_replies_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where many threads run the model at once."""
    monkeypatch.setattr(Waiting, "is_late", lambda self, worker: worker > 1)
    with protected_by(tmp_path, [honest] * 4, spares=1) as (protected, _), torch.no_grad():
        assert torch.allclose(protected.model(IDS).logits, new_model()(IDS).logits, atol=1e-4)


def test_workers_that_say_nothing_at_the_end_are_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mute(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
        if request["op"] != "stats":
            connection.send(reply, outputs)

    monkeypatch.setattr("obfuscatune.enclave.protected.CLOSING_SECONDS", 0.3)
    with protected_by(tmp_path, [mute] * 3) as (protected, _):
        started = time.monotonic()
        protected.close()
        assert 0.3 <= time.monotonic() - started < 0.6


def test_two_dead_workers_are_too_many_for_one_spare(tmp_path: Path) -> None:
    answers: list[Answer] = [honest, leaving, honest, leaving]
    with (
        protected_by(tmp_path, answers, spares=1) as (protected, _),
        pytest.warns(UserWarning, match="a worker is lost"),
        pytest.raises(WorkerFault),
    ):
        step(protected.model)


@pytest.mark.parametrize("closed", [False, True])
def test_whoever_calls_again_after_the_end_is_refused_each_time(closed: bool, tmp_path: Path) -> None:
    """The fifth call would share its rows for ever anew, with nobody left to take them."""
    answers: list[Answer] = [honest, honest if closed else leaving, honest, honest if closed else leaving]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with protected_by(tmp_path, answers, spares=1) as (protected, _):
            if closed:
                protected.close()
            else:
                with pytest.raises(WorkerFault):
                    step(protected.model)
            for _ in range(len(answers) + 1):
                with pytest.raises(UsageError, match=r"closed|gone|ended"):
                    step(protected.model)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of os.fork, from Python 3.12 on
def test_with_a_spare_a_forked_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none of the threads that would send and wait."""
    calls: list[tuple[Workers, SharedWeight, torch.Tensor]] = []
    product = Workers.product

    def noted(self: Workers, weight: SharedWeight, x: torch.Tensor, *, transpose: bool) -> torch.Tensor:
        calls.append((self, weight, x))
        return product(self, weight, x, transpose=transpose)

    monkeypatch.setattr(Workers, "product", noted)
    with protected_by(tmp_path, [honest] * 4, spares=1) as (protected, _):
        step(protected.model)
        workers, weight, x = calls[0]
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)  # the end of one that waits
                product(workers, weight, x, transpose=False)  # not a step: OpenMP's threads are not here either
            except UsageError as error:
                os._exit(0 if "forked" in str(error) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        step(protected.model)


def test_an_interrupt_at_any_line_of_a_product_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C there ends no session, and what was under way gives back its places in shared memory."""
    monkeypatch.setattr("obfuscatune.enclave.shelf.LEAST_BYTES", 1)
    monkeypatch.setattr("obfuscatune.enclave.sharing.workers._TILE_ROWS_HERE", 4)  # of ten, so three parts
    with protected_by(tmp_path, [honest] * 3) as (protected, _), torch.no_grad():
        expected = protected.model(IDS).logits
        for line in itertools.count(0, 41):
            with interrupted(line) as left:
                protected.model(IDS)
            if left[0] >= 0:
                break
            for link in protected.links:
                link.session.request("stats", "-", {}, {}, {})  # its reply comes after all that was under way
                arena = link.session._shelf.arena
                assert link.session.empty((arena.size,), torch.int8).data_ptr() == arena.view(BYTE, 0).data_ptr()
        assert line > 100
        torch.testing.assert_close(protected.model(IDS).logits, expected)


def test_no_thread_of_the_kernel_outlives_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write to memory that belongs to somebody else by then."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    begun, ended = threading.Event(), threading.Event()

    def kernel(record: Any, begin: Any, end: Any) -> int:
        if begin.value == 0:
            begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.05)  # as a computation that does not heed it
        ended.set()
        return int(end.value)

    with pytest.raises(KeyboardInterrupt):
        coding._each(kernel, ctypes.c_int(), 8, coding._FEW_NUMBERS)
    assert ended.is_set()


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt after so many lines of the first product; yields how many of them were left."""
    left = [after]

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.endswith(TRACED) else None

    sys.settrace(on_call)
    try:
        yield left
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)


def test_one_share_of_a_call_goes_to_one_worker_once(tmp_path: Path) -> None:
    """Through faults and spares: what is lost is never sent again, and no two workers' shares reach one of them."""
    seen: list[list[tuple[int, bytes]]] = [[] for _ in range(4)]

    def watching(number: int, then: Answer) -> Answer:
        def answer(connection: Connection, request: Fields, reply: Fields, outputs: Tensors) -> None:
            seen[number].append((request["id"], repr(sorted(request.items())).encode()))
            then(connection, request, reply, outputs)

        return answer

    crossed: list[dict[bytes, int]] = []
    send = Connection.send

    def recorded(self: Connection, fields: Fields, tensors: Tensors = {}, **options: Any) -> Any:  # noqa: B006
        if fields.get("op") in ("define", "multiply"):
            crossed.append({tensor.numpy().tobytes(): id(self) for tensor in tensors.values()})
        return send(self, fields, tensors, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "send", recorded)
        answers = [watching(i, leaving if i == 1 else honest) for i in range(4)]
        with protected_by(tmp_path, answers, spares=1) as (protected, _), pytest.warns(UserWarning, match="is lost"):
            for _ in range(3):
                step(protected.model)
    sent = [item for call in crossed for item in call.items()]
    assert len(sent) > 100
    assert len({share for share, _ in sent}) == len(sent)  # no share was sent twice, to whomever
    points = {(i, field) for i, calls in enumerate(seen) for _, text in calls for field in _points(text)}
    assert points == {(i, i + 1) for i in range(4)}  # each worker has one point


def test_a_session_that_is_resumed_shares_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same master secret, to the same workers in another order: a share, seed or number that came again would
    give one of them two points.
    """
    crossed: list[list[Any]] = []
    send = Connection.send

    def recorded(self: Connection, fields: Fields, tensors: Tensors = {}, **options: Any) -> Any:  # noqa: B006
        if fields.get("op") in ("define", "multiply"):
            crossed[-1] += [tensor.numpy().tobytes() for tensor in tensors.values()]
            crossed[-1] += [entry["seed"] for entry in fields.get("drawn", {}).values()]
        if fields.get("op") == "define":
            numbers[-1].add(fields["spec"]["sharing"])
        return send(self, fields, tensors, **options)

    monkeypatch.setattr(Connection, "send", recorded)
    numbers: list[set[str]] = []
    secret = MasterSecret.generate()
    with contextlib.ExitStack() as stack:
        for name in "abc":
            (tmp_path / name).mkdir()
        addresses = [stack.enter_context(worker_in_a_thread(tmp_path / name, sessions=2)) for name in "abc"]
        for order in (addresses, addresses[::-1]):
            crossed.append([])
            numbers.append(set())
            with obfuscatune.protect(new_model(), profile="shared", worker=order, timeout=20.0, secret=secret) as found:
                step(found.model)
    both = [*crossed[0], *crossed[1]]
    assert len(crossed[0]) == len(crossed[1]) > 50 and len(set(both)) == len(both)
    assert [len(number) for number in numbers] == [1, 1] and numbers[0] != numbers[1]


def _points(text: bytes) -> list[int]:
    return [int(part.split(b",")[0].split(b"}")[0]) for part in text.split(b"'point': ")[1:]]


def test_a_worker_that_was_killed(tmp_path: Path) -> None:
    protected = obfuscatune.protect(new_model(), profile="shared", spares=1, threads=1, timeout=60.0)
    with protected:
        step(protected.model)
        process = protected.links[0].session.process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        with pytest.warns(UserWarning, match="killed by signal 9|is lost"):
            step(protected.model)
        step(protected.model)
        assert "sharing" in str(protected.report())
