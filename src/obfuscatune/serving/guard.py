"""What stands before the application: who may ask, for which host, how much and how fast.

A pure ASGI wrapper, so that a body is measured while it comes and nothing of a refused request is read. It is also
where an exception of the application ends: uvicorn would log it with its message, which may hold a prompt.
"""

import asyncio
import hmac
import logging
import re
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.refusal import Refusal

logger = logging.getLogger(__name__)

_CHARSET = re.compile(rb"charset\s*\*?=\s*[\"']?([^\s;\"']*)", re.IGNORECASE)
_HEADERS = (
    # The page runs its own script and asks its own server, and nothing else.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Guard:
    """Lets requests through that may pass.

    Args:
        tokens: of access; one of them has to be in ``Authorization: Bearer``. open_paths: that want none.
        paths: routes of the application, for the metrics. hosts: names that clients may know this server by: a page of
            another site could reach it through a name that it makes point here (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Sequence[str],
        hosts: Collection[str],
        paths: Collection[str],
        open_paths: Collection[str],
        limits: ServerLimits,
        metrics: Metrics,
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._tokens = [token.encode() for token in tokens]
        self._hosts = {host.lower() for host in hosts}
        self._paths, self._open = frozenset(paths), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        scope = self._own(scope)
        path = scope["path"] if scope["path"] in self._paths else "other"
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._metrics.answered(path, message["status"])
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._measured(receive), answer)
            return
        except Refusal as error:
            refusal = error
        except ClientDisconnect:  # in the middle of its answer
            return
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            logger.error("a request failed: %s at %s", type(error).__name__, where)
            refusal = Refusal.internal()
        if not begun:  # else uvicorn closes the connection, which tells the client that its answer is cut
            await JSONResponse(refusal.body(), refusal.status, refusal.headers())(scope, receive, answer)

    def _own(self, scope: Scope) -> Scope:
        """Return a request by its path, where it names this server before it, as to a proxy; HTTP wants both taken."""
        scheme, found, rest = scope["raw_path"].decode("latin-1").partition("://")
        host, _, path = rest.partition("/")
        if not found or scheme.lower() not in ("http", "https") or _without_port(host).lower() not in self._hosts:
            return scope
        return {**scope, "raw_path": f"/{path}".encode("latin-1"), "path": unquote(f"/{path}")}

    def _check(self, scope: Scope) -> None:
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refusal(505, "HTTP 1.0 or 1.1", code="invalid_request")
        # h11 bounds what it waits for the rest of; a head that comes at once may be longer.
        head = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        head += len(scope["method"])
        if head + len(scope["raw_path"]) + len(scope["query_string"]) > self._limits.header_bytes:
            raise Refusal(431, f"headers have at most {self._limits.header_bytes} bytes", code="request_too_large")
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        # Two readers may take two lengths: what one of them passes, the other one takes for a second request.
        if b"transfer-encoding" in headers and (b"content-length" in headers or scope["http_version"] == "1.0"):
            message = "Transfer-Encoding is for HTTP 1.1, without Content-Length"
            raise Refusal(400, message, code="invalid_request")
        # Or two texts: one that a proxy unpacks or decodes, and the one that is here.
        packed = [value for value in headers.get(b"content-encoding", []) if value.lower() != b"identity"]
        if packed or not all(map(_is_utf8, headers.get(b"content-type", []))):
            raise Refusal(415, "a body is JSON in UTF-8, and not packed", code="invalid_request")
        host = headers.get(b"host", [])
        if len(host) != 1 or _without_port(host[0].decode("latin-1")).lower() not in self._hosts:
            raise Refusal(
                421, "the Host header names another server; --allowed_host of serve adds names", code="wrong_host"
            )
        if scope["path"] not in self._open and not self._is_known(headers.get(b"authorization", [])):
            raise Refusal(401, "a valid token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")
        length = headers.get(b"content-length", [b"0"])[0]
        if len(length) > 12 or int(length) > self._limits.body_bytes:
            raise self._too_long()

    def _is_known(self, given: Sequence[bytes]) -> bool:
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        found = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        return scheme.lower() == b"bearer" and any(found)

    def _measured(self, receive: Receive) -> Receive:
        """Receive a body of limited length, in a limited time."""
        length = 0
        ended = False
        deadline = asyncio.get_running_loop().time() + self._limits.body_seconds

        async def measured() -> Any:
            nonlocal length, ended
            if ended:  # all that can come is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "the body did not come in time", code="timeout") from None
            length += len(message.get("body", b""))
            if length > self._limits.body_bytes:
                raise self._too_long()
            ended = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return measured

    def _too_long(self) -> Refusal:
        return Refusal(413, f"a body has at most {self._limits.body_bytes} bytes", code="request_too_large")


def _is_utf8(content_type: bytes) -> bool:
    return all(name.lower() in (b"utf-8", b"utf8") for name in _CHARSET.findall(content_type))


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
