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
from starlette.types import ASGIApp

from obfuscatune.serving.batcher import Batcher
from obfuscatune.serving.claims import describe
from obfuscatune.serving.guard import Guard
from obfuscatune.serving.handlers import ChatHandler, TextHandler
from obfuscatune.serving.limits import Limits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import ServedModel
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.request import parse

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
OPEN = ("/health", *PAGE)  # wanted without a token: the page asks its reader for one
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/protection", "/metrics", *OPEN)


def build_app(
    served: ServedModel,
    batcher: Batcher,
    limits: Limits,
    metrics: Metrics,
    *,
    tokens: Sequence[str],
    hosts: Sequence[str],
) -> ASGIApp:
    """Return the guarded application."""
    # Its notes on requests; those on models and fields, which it writes as warnings, are of no use here either.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    chat, text = (handler(served, batcher, limits, metrics) for handler in (ChatHandler, TextHandler))
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _handle(request, chat, "chatcmpl")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _handle(request, text, "cmpl")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"object": "model", "created": started, "owned_by": "obfuscatune"}
        return {"object": "list", "data": [{"id": name, **entry} for name in served.names]}

    @app.get("/v1/protection")
    async def protection() -> dict[str, Any]:
        workers = [link.session.worker for link in served.protected.links]
        more = {"workers": workers, "models": list(served.names), "default": served.names[-1], "attested": None}
        return {**describe(served.protected.profile), **more, "chat": bool(served.tokenizer.chat_template)}

    @app.get("/health")
    async def health() -> Response:
        alive = batcher.alive
        return JSONResponse({"status": "ok" if alive else "unavailable"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return PlainTextResponse(metrics.text(*batcher.load(), batcher.alive), media_type="text/plain; version=0.0.4")

    for path, (name, kind) in PAGE.items():
        content = (Path(__file__).parent / "page" / name).read_bytes()
        app.add_api_route(path, _constant(content, kind), methods=["GET"])

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, "no such route" if error.status_code == 404 else "not done", code="route")
        return JSONResponse(refusal.body(), refusal.status, {**(error.headers or {}), **refusal.headers()})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # the guard sees the error too, and logs it
        return JSONResponse(Refusal.internal().body(), 500)

    return Guard(app, tokens=tokens, hosts=hosts, paths=PATHS, open_paths=OPEN, limits=limits, metrics=metrics)


async def _handle(request: Request, handler: ChatHandler | TextHandler, prefix: str) -> Response:
    """Answer, or stop when the client leaves before the answer begins."""
    body = parse(await request.body())
    answering = asyncio.ensure_future(handler.handle_request(body, f"{prefix}-{secrets.token_hex(12)}"))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Refusal(499, "the client left", code="cancelled")
        return await answering
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(leaving, answering, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _constant(content: bytes, kind: str) -> Any:
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-store"})

    return page
