"""Targets of a link with requests under way: what a worker sends to an enclave, from its greeting on."""

import contextlib
import io
import socket
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
