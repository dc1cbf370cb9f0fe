"""What a client is told when its request is not done: a status, and OpenAI's error object."""

from typing import Any


class Refusal(Exception):  # noqa: N818 - what the server does; to its client it is an error
    """A request that is not done; rendered as ``{"error": {"message", "type", "param", "code"}}``.

    The message names fields, types and counts; never a prompt, a completion or a token of access.

    Args:
        status: of HTTP. message: one sentence. code: OpenAI's short name of the fault. param: the field at fault.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @classmethod
    def internal(cls) -> "Refusal":
        """Return what a client is told of a fault that is not its own."""
        return cls(500, "the request failed in the enclave", code="internal_error")

    @classmethod
    def full(cls, waiting: int, *, retry_after: int = 1) -> "Refusal":
        """Return what a client is told where so many wait that it may not."""
        message = f"{waiting} requests wait already"
        return cls(429, message, code="queue_full", retry_after=retry_after)

    @classmethod
    def late(cls) -> "Refusal":
        """Return what a client is told whose request has taken all the time that it may."""
        return cls(504, "the time of the request is over", code="timeout")

    @property
    def kind(self) -> str:
        """OpenAI's class of the error, which clients choose their exception by."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it. The connection ends: what is left of the body is not waited for."""
        found = {"Connection": "close"} if self.status in (400, 401, 408, 413, 415, 421, 431, 505) else {}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found
