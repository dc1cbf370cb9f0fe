"""Targets of a link: all that a worker sends to an enclave, and all that an enclave sends to a worker."""

import contextlib
import io
import os
import socket
import threading
from pathlib import Path
from typing import Any

from target import Target


def worker_replies(scratch: Path) -> Target:
    """All that a worker sends: its place in the queue, its greeting, and the replies to two requests under way."""
    import torch

    from obfuscatune.enclave.links import Link
    from obfuscatune.enclave.session import Session
    from obfuscatune.protocol.connection import Connection
    from obfuscatune.protocol.frames import PROTOCOL_VERSION, TensorSpec, encode_head

    expected = {"y": ((2, 1, 3), torch.int8)}

    def frame(fields: dict[str, Any], payload: bytes = b"") -> bytes:
        specs = [TensorSpec("y", torch.int8, (2, 1, 3))] if payload else []
        return encode_head(fields, specs)[0] + payload

    def parse(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.redirect_stderr(io.StringIO()) as told:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            session = Session(Connection(ours, peer="worker"), worker="worker", timeout=10)
            with contextlib.closing(session):
                link = Link.greet(session)
                under_way = [session.submit("multiply", "layer", {}, {}, expected) for _ in range(2)]
                for pending in under_way:
                    _, tensors = pending.result()
                    if {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} != expected:
                        raise AssertionError("tensors of another form")
            if not told.getvalue().replace("\n", "").isprintable() or link.memory_bytes == 0:
                raise AssertionError("what it says steers a terminal, or is no memory")

    hello = {"id": 1, "ok": True, "version": PROTOCOL_VERSION, "device": "cpu", "threads": 1, "memory_bytes": 1 << 30}
    replies = frame({"id": 2, "ok": True}, bytes(6)) + frame({"id": 3, "ok": True}, bytes(range(6)))
    queue = b"".join(frame({"id": 1, "queued": ahead}) for ahead in (2, 1, 1))
    seeds = (frame(hello) + replies, queue + frame(hello) + replies)
    swapped = frame({"id": 3, "ok": True}, bytes(6)) + frame({"id": 2, "ok": True}, bytes(6))
    refused = (
        frame(hello) + swapped,
        frame(hello) + frame({"id": 2, "queued": 1}) + replies,
        queue + frame({"id": None, "ok": False, "error": "busy", "message": "full"}),
        frame({**hello, "version": PROTOCOL_VERSION + 1}) + replies,
        queue,
    )
    return Target(parse, seeds, refused=refused)


def enclave_requests(scratch: Path) -> Target:
    """All that an enclave sends: a greeting, an arena, weights, products of rows that lie there or are drawn, calls.

    Whatever comes, the worker answers each request once or ends the connection, within its budget, and quotes nothing
    that steers a terminal.
    """
    import torch

    from obfuscatune.errors import ConnectionClosedError, ProtocolError
    from obfuscatune.protocol.arena import Arena
    from obfuscatune.protocol.connection import Connection
    from obfuscatune.protocol.frames import TensorSpec, encode_head
    from obfuscatune.protocol.limits import Limits
    from obfuscatune.worker.server import serve_connection

    size, budget = 1 << 16, 1 << 20

    def frame(fields: dict[str, Any], **tensors: torch.Tensor) -> bytes:
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        return encode_head(fields, specs)[0] + b"".join(tensor.numpy().tobytes() for tensor in tensors.values())

    def parse(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        made = Arena.create(size)
        if made is None:
            raise AssertionError("this system has no memfd")
        _, descriptor = made
        connection = Connection(theirs, limits=Limits(max_payload_bytes=budget), peer="enclave")
        serve = lambda: serve_connection(connection, torch.device("cpu"), budget=budget)  # noqa: E731
        worker = threading.Thread(target=serve)
        answered, enclave = 0, Connection(ours, peer="worker")

        def send() -> None:
            with contextlib.suppress(OSError):
                socket.send_fds(ours, [data[:1]], [descriptor])
                ours.sendall(data[1:])
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        connection.expect_descriptor()  # it comes before the worker knows of it
        worker.start()
        sender.start()
        fault: str | None = None
        try:
            while True:
                reply, _ = enclave.receive()
                answered += 1
                if reply["ok"] is not True:
                    fault = fault or f"{reply['error']} {reply['message']!a}"
        except ConnectionClosedError:
            pass
        finally:
            sender.join()
            enclave.close()
            worker.join()
            os.close(descriptor)
        if fault is not None or not answered:
            raise ProtocolError(fault or "no answer")

    weight, rows = torch.eye(4), torch.zeros(1, 2, 4)
    linear = {"op": "define", "segment": "s0", "kind": "linear", "spec": {}}
    share = {"op": "define", "segment": "s1", "kind": "residues"}
    share["spec"] = {"primes": [251], "point": 1, "sharing": "0" * 16}
    product = {"op": "multiply", "segment": "s0", "transpose": False}
    placed = {"placed": [["x", "float32", [1, 2, 4], 0]], "places": {"y": [64, 32]}}
    drawn = {"drawn": {"x": {"seed": "0" * 64, "primes": [251], "shape": [2, 4]}}}
    call = {"op": "forward", "segment": "s0", "keep": True, "drop": {"calls": [9], "shared": [1]}}
    requests: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
        ({"op": "hello"}, {}),
        ({"op": "arena", "bytes": size}, {}),
        (linear, {"weight": weight}),
        (share, {"weight": torch.ones(1, 4, 4, dtype=torch.int8)}),
        (product, {"x": rows}),
        ({**product, **placed}, {}),
        ({**product, **drawn, "segment": "s1"}, {}),
        ({**call, **placed}, {}),
        ({"op": "backward", "segment": "s0", "call": 8, "wants": ["x"]}, {"y": rows}),
        ({"op": "stats"}, {}),
    ]
    whole = b"".join(frame({"id": i, **fields}, **tensors) for i, (fields, tensors) in enumerate(requests, start=1))
    greeting = frame({"id": 1, "op": "hello"}) + frame({"id": 2, "op": "arena", "bytes": size})
    defined = greeting + frame({"id": 3, **linear}, weight=weight)
    refused = (
        frame({"id": 1, "op": "hello"}) + frame({"id": 2, "op": "arena", "bytes": size + 1}),
        defined + frame({"id": 4, **product, "placed": [["x", "float32", [1, 2, 4], size]]}),
        defined + frame({"id": 4, **product, "placed": placed["placed"] * 2}),
        defined + frame({"id": 4, **product, **placed}, x=rows),
        defined + frame({"id": 4, **product, "placed": placed["placed"], "places": {"y": [size - 16, 32]}}),
    )
    return Target(parse, (whole,), refused=refused)
