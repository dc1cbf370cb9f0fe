"""The application: its routes, and what they answer."""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from obfuscatune.serving.guard import Guard
from obfuscatune.serving.handlers import ChatHandler, Offer, TextHandler
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.request import no_model, parse

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
OPEN = ("/health", *PAGE)  # wanted without a token: the page asks its reader for one
_GET = ["GET", "HEAD"]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/protection", "/v1/job", "/metrics", *OPEN)


def build_app(
    offered: Offer, limits: ServerLimits, metrics: Metrics, *, tokens: Sequence[str], hosts: Sequence[str]
) -> ASGIApp:
    """Return the guarded application."""
    # Its notes on requests; those on models and fields, which it writes as warnings, are of no use here either.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _handle(request, offered.chat, "chatcmpl")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _handle(request, offered.text, "cmpl")

    entries = {
        name: {"id": name, "object": "model", "created": started, "owned_by": "obfuscatune"} for name in offered.names
    }

    @app.api_route("/v1/models", methods=_GET)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(entries.values())}

    @app.api_route("/v1/models/{name}", methods=_GET)
    async def model(name: str) -> dict[str, Any]:
        if name not in entries:
            raise no_model(offered.names)
        return entries[name]

    @app.api_route("/v1/protection", methods=_GET)
    async def protection() -> dict[str, Any]:
        return offered.about()

    if (tell := offered.job) is not None:

        @app.api_route("/v1/job", methods=_GET)
        async def job() -> dict[str, Any]:
            return await tell()

    @app.api_route("/health", methods=_GET)
    async def health() -> Response:
        alive = offered.alive()
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    @app.api_route("/metrics", methods=_GET)
    async def prometheus() -> Response:
        return PlainTextResponse(metrics.text(*offered.load(), offered.alive()), media_type="text/plain; version=0.0.4")

    for path, (name, kind) in PAGE.items():
        content = (Path(__file__).parent / "page" / name).read_bytes()
        app.add_api_route(path, _constant(content, kind), methods=_GET)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        messages = {404: "no such route", 405: "this route does not take this method"}
        refusal = Refusal(error.status_code, messages.get(error.status_code, "not done"), code="route")
        return JSONResponse(refusal.body(), refusal.status, {**(error.headers or {}), **refusal.headers()})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # the guard sees the error too, and logs it
        return JSONResponse(Refusal.internal().body(), 500)

    paths = [*PATHS, *(f"/v1/models/{name}" for name in offered.names)]
    return Guard(app, tokens=tokens, hosts=hosts, paths=paths, open_paths=OPEN, limits=limits, metrics=metrics)


async def _handle(request: Request, handler: ChatHandler | TextHandler, prefix: str) -> Response:
    """Answer, or stop when the client leaves before the answer begins."""
    try:
        body = parse(await request.body())
    except ClientDisconnect:  # FastAPI would answer 500, which the metrics would count
        raise _gone() from None
    count = request.headers.get("x-stainless-retry-count", "")  # of OpenAI's clients
    work = handler.answer(body, f"{prefix}-{secrets.token_hex(12)}", again=count.isdecimal() and count.strip("0") != "")
    answering = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise _gone()
        return await answering
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(leaving, answering, return_exceptions=True)


def _gone() -> Refusal:
    """Return what nobody reads: the metrics count it."""
    return Refusal(499, "the client left", code="cancelled")


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _constant(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-store"})

    return page
