"""Calls whose large tensors lie in memory that the worker shares: the same results, and a worker that lies of it."""

import contextlib
import functools
import gc
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.session import Session
from obfuscatune.errors import ConnectionClosedError, NotFiniteError, ProtocolError, UsageError, WorkerFault
from obfuscatune.protocol.arena import LEAST_BYTES, Arena
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import PROTOCOL_VERSION
from obfuscatune.worker.server import serve_connection

from ..faults.workers import IDS, new_model, worker_in_a_thread

ROWS, WIDTH = 200, 128  # 102,400 bytes of float32
SHAPE = (1, ROWS, WIDTH)
assert ROWS * WIDTH * 4 > LEAST_BYTES > ROWS * WIDTH

pytestmark = pytest.mark.skipif(Arena.create(1) is None, reason="this system has no memfd")


@contextlib.contextmanager
def served(serve: Callable[[Connection], object], *, tap: bool = False) -> Iterator[Session]:
    """A session with what `serve` does at the other end, in a thread."""
    ours, theirs = socket.socketpair()
    recorder = (lambda way, run: None) if tap else None
    thread = threading.Thread(target=lambda: serve(Connection(theirs, peer="enclave", tap=recorder)))
    thread.start()
    session = Session(Connection(ours, peer="w"), worker="w", timeout=20)
    try:
        yield session
    finally:
        session.close()
        thread.join()


def honest(connection: Connection) -> None:
    serve_connection(connection, torch.device("cpu"))


def linear(session: Session) -> Tensor:
    session.hello()
    weight = torch.randn(WIDTH, WIDTH)
    session.request("define", "h.0", {"segment": "s", "kind": "linear", "spec": {}}, {"weight": weight}, {})
    return weight


def call(session: Session, op: str, x: Tensor, **fields: Any) -> Tensor:
    expected = {"y": (tuple(x.shape), torch.float32)}
    return session.request(op, "h.0", {"segment": "s", **fields}, {"x": x}, expected)[1]["y"]


def is_empty(session: Session) -> bool:
    """Whether nobody has any of the arena."""
    shelf = session._shelf
    return shelf is not None and shelf.take((shelf.arena.size,), torch.int8) is not None


def test_the_memory_is_given_back_with_the_end_of_the_session() -> None:
    def arenas() -> int:
        gc.collect()  # the worker's session, here in a thread, is of cycles
        return sum("memfd:obfuscatune" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = arenas()
    with served(honest) as session:
        linear(session)
        call(session, "multiply", torch.randn(*SHAPE), transpose=False)
        assert arenas() > before
        x = session.empty(SHAPE, torch.float32)
        session.close()
        assert x.fill_(1.0).sum() == x.numel()  # which lives for as long as it is wanted
        del x
        assert session.empty(SHAPE, torch.float32).shape == SHAPE
    assert arenas() == before


@pytest.mark.parametrize(("budget", "mapped"), [(1 << 40, True), (1 << 20, False)])
def test_an_arena_larger_than_the_budget_is_not_mapped(budget: int, mapped: bool) -> None:
    serve = functools.partial(serve_connection, device=torch.device("cpu"), budget=budget)
    with served(serve) as session:
        session.hello()
        assert session.shares_memory is mapped


def test_a_second_arena_and_a_table_for_another_operation_are_refused() -> None:
    with served(honest) as session:
        session.hello()
        session._shelf = None
        with pytest.raises(WorkerFault, match="a second arena"):
            session._share_memory()
    with served(honest) as session:
        session.hello()
        with pytest.raises(WorkerFault, match="placed tensors"):
            session.request("stats", "-", {"placed": [["x", "int8", [4], 0]]}, {}, {})


def test_a_forked_process_writes_nothing_into_the_first_ones_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(honest) as session:
        session.hello()
        shelf = session._shelf
        assert shelf is not None
        assert shelf.arena.offset_of(session.empty((LEAST_BYTES,), torch.int8)) is not None
        with monkeypatch.context() as forked:
            forked.setattr(session, "_process_id", -1)
            assert shelf.arena.offset_of(session.empty((LEAST_BYTES,), torch.int8)) is None


def crossed(session: Session) -> int:
    return session.connection.bytes_sent + session.connection.bytes_received


@pytest.mark.parametrize("tap", [False, True], ids=["shared", "recorded"])
def test_a_large_tensor_is_placed_unless_the_connection_is_recorded(tap: bool) -> None:
    with served(honest, tap=tap) as session:
        weight = linear(session)
        assert session.shares_memory is not tap
        for x in (torch.randn(SHAPE), torch.randn(SHAPE)[:, ::2], torch.randn(1, WIDTH, ROWS).mT):
            before, counted = crossed(session), session.traffic["multiply"]
            sizes = counted.bytes_sent + counted.bytes_received
            y = call(session, "multiply", x, transpose=False)
            torch.testing.assert_close(y, x @ weight)
            large = x.nbytes >= LEAST_BYTES
            assert (crossed(session) - before < x.nbytes) == (large and not tap)
            counted = session.traffic["multiply"]
            assert counted.bytes_sent + counted.bytes_received - sizes >= 2 * x.nbytes  # a report counts both alike


def test_what_a_call_keeps_for_its_backward_is_the_workers_own() -> None:
    with served(honest) as session:
        weight = linear(session)
        x = torch.randn(SHAPE)
        first = session.submit("forward", "h.0", {"segment": "s", "keep": True}, {"x": x}, {"y": (SHAPE, x.dtype)})
        first.result()
        for _ in range(3):  # which lie where the first one lay
            call(session, "forward", torch.zeros(SHAPE))
        grad = torch.randn(SHAPE)
        expected = {"x": (SHAPE, x.dtype)}
        header = {"call": first.id, "wants": ["x"]}
        found = session.request("backward", "h.0", header, {"y": grad}, expected)[1]["x"]
        torch.testing.assert_close(found, grad @ weight.T)


@pytest.mark.filterwarnings("ignore:.*protect nothing:UserWarning")
@pytest.mark.parametrize("profile", ["balanced", "stream", "paper"])
def test_a_model_has_the_same_bits_with_every_tensor_in_shared_memory(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read where it lies: cached keys, kept calls, pushed factors and masks outlive their request."""
    found = []
    for least in (1, LEAST_BYTES):
        monkeypatch.setattr("obfuscatune.enclave.shelf.LEAST_BYTES", least)
        options = {"profile": profile, "insecure_test_seed": 1, "timeout": 20.0}
        with worker_in_a_thread(tmp_path) as address, protect(new_model(), worker=address, **options) as protected:
            model, mask = protected.model, torch.ones_like(IDS)
            mask[0, :2] = 0
            labels = IDS.masked_fill(torch.arange(IDS.shape[1]) < 3, -100)  # the third is predicted from padding
            beams = model.generate(IDS, attention_mask=mask, max_new_tokens=4, num_beams=2, pad_token_id=0)
            for _ in range(2):
                model(IDS, attention_mask=mask, labels=labels).loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if profile == "paper":  # the worker's own are told by their norms, and by a number that is new each time
                gradients = [gradient[:1] for gradient in gradients]
            found.append([model(IDS, attention_mask=mask).logits.detach(), beams, *gradients])
            moved = protected.session.connection.bytes_sent
            counted = sum(traffic.bytes_sent for traffic in protected.session.traffic.values())
            assert (counted > moved) == (least == 1)
    assert all(map(torch.equal, *found))


def test_many_requests_under_way_have_places_of_their_own_and_give_them_back() -> None:
    with served(honest) as session:
        weight = linear(session)
        header = {"segment": "s", "transpose": False}
        for _ in range(3):
            xs = [torch.randn(SHAPE) for _ in range(40)]
            asked = [session.submit("multiply", "h.0", header, {"x": x}, {"y": (SHAPE, x.dtype)}) for x in xs]
            results = [pending.result()[1]["y"] for pending in reversed(asked)][::-1]
            for x, y in zip(xs, results, strict=True):
                torch.testing.assert_close(y, x @ weight)
        assert is_empty(session)


def test_a_result_in_place_keeps_its_place_until_it_goes() -> None:
    def answer(fields: dict[str, Any], arena: Arena) -> tuple[dict[str, Any], dict[str, Tensor]]:
        arena.read(placed(fields, dtype="int32"))["y"].fill_(fields["value"])
        return {"placed": placed(fields, dtype="int32")}, {}

    with served(Liar(answer)) as session:
        session.hello()
        expected = {"y": (SHAPE, torch.int32)}
        asked = [session.submit("multiply", "h.0", {"value": value}, {}, expected) for value in range(5)]
        results = [pending.result(in_place=True)[1]["y"] for pending in asked]
        assert len({y.data_ptr() for y in results}) == 5
        assert all(bool((y == value).all()) for value, y in enumerate(results))
        first = results.pop(0).data_ptr()
        again = session.submit("multiply", "h.0", {"value": 5}, {}, expected).result(in_place=True)[1]["y"]
        assert again.data_ptr() == first and bool((results[0] == 1).all())


def test_what_is_given_up_leaves_no_place() -> None:
    """Memory that was never sent, a request that was never waited for, and one that is not a request."""
    with served(honest) as session:
        weight = linear(session)
        x = torch.randn(SHAPE)
        mine = session.empty(SHAPE, torch.float32).copy_(x)
        torch.testing.assert_close(call(session, "multiply", mine, transpose=False), x @ weight)
        assert not is_empty(session)  # who made it has it still
        del mine
        session.empty(SHAPE, torch.float32)
        with pytest.raises(UsageError):
            session.submit("multiply", "h.0", {"segment": object()}, {"x": x}, {"y": (SHAPE, x.dtype)})
        session.submit("multiply", "h.0", {"segment": "s", "transpose": False}, {"x": x}, {"y": (SHAPE, x.dtype)})
        session.request("stats", "-", {}, {}, {})  # whose reply comes after it
        assert is_empty(session)


def test_what_does_not_fit_goes_through_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    create = Arena.create
    monkeypatch.setattr(Arena, "create", lambda: create(LEAST_BYTES))
    with served(honest) as session:
        weight = linear(session)
        x = torch.randn(SHAPE)
        before = crossed(session)
        torch.testing.assert_close(call(session, "multiply", x, transpose=False), x @ weight)
        assert session.shares_memory and crossed(session) - before > 2 * x.nbytes


def test_a_relay_that_passes_bytes_alone_goes_without() -> None:
    def relayed(connection: Connection) -> None:
        ours, theirs = socket.socketpair()
        server = threading.Thread(target=lambda: serve_connection(Connection(theirs, peer="r"), torch.device("cpu")))
        server.start()
        onward = Connection(ours, peer="worker")
        with contextlib.suppress(ConnectionClosedError), contextlib.closing(onward):
            while True:
                onward.send(*connection.receive())
                connection.send(*onward.receive())
        server.join()

    with served(relayed) as session:
        weight = linear(session)
        x = torch.randn(SHAPE)
        assert not session.shares_memory
        torch.testing.assert_close(call(session, "multiply", x, transpose=False), x @ weight)


class Liar:
    """A worker that maps the arena, then answers calls by what `answer` makes of the request and the arena."""

    def __init__(self, answer: Callable[[dict[str, Any], Arena], tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
        self.answer = answer

    def __call__(self, connection: Connection) -> None:
        connection.expect_descriptor()
        with contextlib.suppress(ConnectionClosedError, ProtocolError), contextlib.closing(connection):
            connection.receive()
            connection.send({"id": 1, "ok": True, "version": PROTOCOL_VERSION, "arena": True})
            fields, _ = connection.receive()
            descriptor = connection.take_descriptor()
            assert descriptor is not None
            arena = Arena.received(descriptor, fields["bytes"])
            assert arena is not None
            connection.send({"id": 2, "ok": True, "mapped": True})
            while True:
                fields, _ = connection.receive()
                told, tensors = self.answer(fields, arena)
                connection.send({"id": fields["id"], "ok": True, **told}, tensors)


def placed(fields: dict[str, Any], **changed: Any) -> list[Any]:
    row = {"name": "y", "dtype": "float32", "shape": list(SHAPE), "offset": fields["places"]["y"][0], **changed}
    return [list(row.values())]


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another place": lambda f: placed(f, offset=f["places"]["y"][0] + 64),
    "the request's place": lambda f: placed(f, offset=f["placed"][0][3]),
    "beyond the arena": lambda f: placed(f, offset=2**40),
    "another shape": lambda f: placed(f, shape=[1, ROWS, WIDTH - 1]),
    "another dtype": lambda f: placed(f, dtype="int32"),
    "another name": lambda f: placed(f, name="z"),
    "twice": lambda f: placed(f) * 2,
    "nothing": lambda f: [],
    "no list": lambda f: "y",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_table_that_lies_is_one_fault(lie: Callable[[dict[str, Any]], Any]) -> None:
    with served(Liar(lambda fields, arena: ({"placed": lie(fields)}, {}))) as session:
        session.hello()
        with pytest.raises(WorkerFault, match=r"w.*h\.0"):
            call(session, "multiply", torch.ones(SHAPE), transpose=False)
        assert session.has_ended


def test_a_tensor_that_is_placed_and_sent_is_one_fault() -> None:
    with served(Liar(lambda fields, arena: ({"placed": placed(fields)}, {"y": torch.ones(SHAPE)}))) as session:
        session.hello()
        with pytest.raises(WorkerFault, match="breaks the protocol"):
            call(session, "multiply", torch.ones(SHAPE), transpose=False)


def test_a_placed_tensor_that_is_not_finite_is_not_used() -> None:
    def answer(fields: dict[str, Any], arena: Arena) -> tuple[dict[str, Any], dict[str, Tensor]]:
        arena.read(placed(fields))["y"].fill_(float("nan"))
        return {"placed": placed(fields)}, {}

    with served(Liar(answer)) as session:
        session.hello()
        with pytest.raises(NotFiniteError, match="NaN or infinity in y"):
            call(session, "multiply", torch.ones(SHAPE), transpose=False)


def test_a_worker_cannot_change_what_was_checked() -> None:
    views: list[Tensor] = []

    def answer(fields: dict[str, Any], arena: Arena) -> tuple[dict[str, Any], dict[str, Tensor]]:
        views.append(arena.read(placed(fields))["y"].fill_(1.5))
        return {"placed": placed(fields)}, {}

    with served(Liar(answer)) as session:
        session.hello()
        y = call(session, "multiply", torch.ones(SHAPE), transpose=False)
        views[0].fill_(float("nan"))
        assert bool((y == 1.5).all())
        pending = session.submit(
            "multiply", "h.0", {"segment": "s"}, {"x": torch.ones(SHAPE)}, {"y": (SHAPE, torch.float32)}
        )
        y = pending.result(in_place=True)[1]["y"]  # floats are checked, and so are copied even then
        views[1].fill_(float("nan"))
        assert bool((y == 1.5).all())
