"""What a server takes at most, before anything is allocated for it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Limits of one server.

    Attributes:
        max_batch: requests computed together. max_queue: requests that wait; one more is answered with 429.
        max_new_tokens: longest completion, whatever a request asks for.
        seconds: that one request may take, waiting included.
        body_bytes, header_bytes: of one request. connections: at a time.
        head_seconds: for a request's headers, and for TLS before them. body_seconds: for its body.
        send_seconds: for a client to read a piece.
        keep_alive_seconds: that an idle connection is kept. drain_seconds: for what is under way at a shutdown.
        flush_seconds: then, for clients to take what they are told of the rest.
    """

    max_batch: int = 8
    max_queue: int = 64
    max_new_tokens: int = 512
    seconds: float = 300.0
    body_bytes: int = 1 << 20
    header_bytes: int = 16 << 10
    connections: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    keep_alive_seconds: int = 30
    drain_seconds: int = 30
    flush_seconds: int = 3
