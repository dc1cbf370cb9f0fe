"""The chunks of a stream, ended as OpenAI ends them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from obfuscatune.serving.generation import Manager
from obfuscatune.serving.refusal import Refusal


class Stream(StreamingResponse):
    """The chunks of a handler, ended as OpenAI ends them. usage: whether the counts are asked for."""

    def __init__(self, chunks: Any, manager: Manager, usage: bool) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(_ended(chunks, manager, usage), media_type="text/event-stream", headers=headers)
        self._manager = manager

    async def begin(self) -> None:
        """Wait until it may begin; raises Refusal. Where nothing comes of it, the request is over."""
        try:
            await self._manager.begin()
        except BaseException:  # the client has left, too
            self._manager.end()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the request is over then, also where the client left before a first chunk was asked for."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._manager.end()


def event(content: dict[str, Any]) -> str:
    """Return a chunk as an event of the stream."""
    return f"data: {json.dumps(content, separators=(',', ':'), ensure_ascii=False)}\n\n"


async def _ended(chunks: Any, manager: Manager, usage: bool) -> AsyncIterator[str]:
    """Yield the chunks and OpenAI's end of a stream; a failure as its error object. usage: whether it is asked for."""
    try:
        async for chunk in chunks:
            # The handlers join what has come meanwhile: pieces may be before an error. In a piece quotes are escaped.
            pieces, error, _ = chunk.partition('data: {"error"')
            if '"usage":{' in pieces:  # the last one, alone; in a text its quotation marks are escaped
                pieces = _counted(pieces, manager.prompt_tokens, usage)
            elif usage:
                pieces = pieces.replace("}\n\n", ',"usage":null}\n\n')  # in a text the ends of lines are escaped
            if pieces:
                yield pieces
            if error:
                yield f"data: {json.dumps((manager.failure or Refusal.internal()).body())}\n\n"
                return
        yield "data: [DONE]\n\n"
    finally:
        manager.end()


def _counted(chunk: str, prompt_tokens: int | None, usage: bool) -> str:
    """Return a stream's last chunk without its counts, and behind it, where they are asked for, one of them alone.

    prompt_tokens: where transformers' handlers do not see them.
    """
    content = json.loads(chunk.removeprefix("data: "))
    counts = content.pop("usage")
    if not usage:
        return event(content)
    if prompt_tokens is not None:
        counts |= {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + counts["completion_tokens"]}
    return event({**content, "usage": None}) + event({**content, "choices": [], "usage": counts})
