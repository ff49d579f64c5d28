"""An answer that begins before its model is ready.

Who asked for a stream is told by comments that something comes, so that neither they nor a proxy on the way give up:
a load may take minutes. What follows a colon is ignored (https://html.spec.whatwg.org/multipage/server-sent-events.html).
What goes wrong then has to be told within the stream, as its status is sent already.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from magi_agent.errors import MagiError
from magi_agent.gateway.openai_errors import error_event, event_line
from magi_agent.gateway.relay import SSE, ServerAnswer

_SIGN_OF_LIFE: Final = 5.0
"""Seconds between two comments."""
_FIRST_REFUSAL: Final = 400
_IN_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")
"""Between the parts of a JSON text these are what a blank is, and within its strings they do not stand."""


class AwaitedAnswer(web.StreamResponse):
    """A stream of server-sent events, of which the first comes when the model is ready."""

    def __init__(self, model_id: str, asked: Callable[[], Awaitable[ServerAnswer]], *, sign: str | None = None) -> None:
        """``asked`` waits for the model and asks it; ``sign`` is what the comments say meanwhile, in one line."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.content_type = SSE
        self.charset = "utf-8"
        self._sign = b": %b\n\n" % (sign or f"{model_id} is not ready yet").encode()
        self._asked = asked

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the headers, signs of life, and then all that the server says."""
        if self.prepared:
            return await super().prepare(request)
        writer = await super().prepare(request)
        asking = asyncio.ensure_future(self._asked())
        try:
            while not asking.done():
                await self.write(self._sign)
                await asyncio.wait({asking}, timeout=_SIGN_OF_LIFE)
            await self._pass_on(await asking, request)
        except MagiError as error:
            await self.write(error_event(request.path, error.status, error.error, error.message))
        finally:
            asking.cancel()
            # Also where the client leaves in the moment in which it came, or while this waits: the model is in use.
            asking.add_done_callback(_let_go)
            await asyncio.gather(asking, return_exceptions=True)
        return writer

    async def _pass_on(self, answer: ServerAnswer, request: web.BaseRequest) -> None:
        if answer.is_stream:
            await answer.pour_into(self, request)
        else:
            # An error, most likely: it has the form that an event has.
            named = event_line(request.path) if answer.status >= _FIRST_REFUSAL else b""
            await self._pass_on_as_event(answer, named)

    async def _pass_on_as_event(self, answer: ServerAnswer, named: bytes) -> None:
        await self.write(named + b"data: ")
        try:
            while piece := await answer.next_piece():
                await self.write(piece.translate(_IN_ONE_LINE))
        except MagiError:
            # What is told of that is an event of its own.
            await self.write(b"\n\n")
            raise
        await self.write(b"\n\n")


def _let_go(asking: "asyncio.Future[ServerAnswer]") -> None:
    if not asking.cancelled() and asking.exception() is None:
        asking.result().close()
