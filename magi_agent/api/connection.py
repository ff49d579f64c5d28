"""One HTTP connection, where not even a request that cannot be parsed gets an answer of another form."""

import asyncio
import logging
import re
import select
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web

from magi_agent.api.error_answers import crash_answer, error_object, http_error_answer
from magi_agent.request_id import request_id_from

_LOG: Final = logging.getLogger(__name__)
_SERVER_ERROR: Final = 500
_PIECE: Final = 60 * 1024
"""Bytes that are read of a connection at once, at most."""
_QUOTED: Final = re.compile(r":?\s*\bb['\"].*", re.DOTALL)
"""Where aiohttp begins to quote the line it stumbled over."""


class Connection(web.RequestHandler):
    """aiohttp's own, but for what it would answer without asking the application."""

    __slots__ = ("_at_its_end", "_is_half", "_is_last", "asks_model")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._at_its_end: Callable[[], object] | None = None
        self._is_half = False
        self._is_last = False
        self.asks_model = False
        """Whether what is under way is a request to a model, whose answer may take minutes."""

    def when_lost(self, called: Callable[[], object] | None) -> None:
        """Have ``called`` when the connection is gone before the request at work is answered: aiohttp tells no handler.

        It is called at once where the connection is gone already.
        """
        if called is not None and not self.connected:
            called()
        else:
            self._at_its_end = called

    def cancel_when_lost(self) -> None:
        """Have the task at work cancelled when the client leaves before its request is answered."""
        task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]  # each handler is within one
        self.when_lost(task.cancel)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have less read at once than asyncio does, for which memory would be mapped and given back each time."""
        transport.max_size = _PIECE  # type: ignore[attr-defined]  # of its transports for sockets
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell whoever wants to know."""
        super().connection_lost(exc)
        called, self._at_its_end = self._at_its_end, None
        if called is not None:
            called()

    @property
    def is_new(self) -> bool:
        """Whether nothing was asked on it yet."""
        return self._request_count == 0

    @property
    def at_work(self) -> asyncio.Task[None] | None:
        """What answers requests on it, until it ends."""
        return self._task_handler

    def end_soon(self) -> None:
        """Take no request beyond those that have come; where none has, not even in part, it ends now."""
        self._is_last = True
        is_idle = self._waiter is not None and not self._waiter.done() and not self._is_half
        if is_idle and not self._has_come():
            self.force_close()

    def cut_off(self) -> None:
        """End it in the midst of what it is about, without the mark that an answer is whole."""
        if self._task_handler is not None:
            self._task_handler.cancel()

    def data_received(self, data: bytes) -> None:
        """Note whether a request has come in part."""
        super().data_received(data)
        self._is_half = self._waiter is not None and not self._waiter.done()

    def _has_come(self) -> bool:
        """Whether there is something to read that nobody has looked at yet, be it the client's end."""
        channel = self.transport.get_extra_info("socket") if self.transport is not None else None
        if channel is None:
            return False
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        return bool(poll.poll(0))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = _SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed, or what broke outside of the application's own handling of errors."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already; there is no place for an error after it")
        if status >= _SERVER_ERROR:
            _LOG.error("a request met a defect outside of its handler", exc_info=exc)
            response = crash_answer()
        else:
            # A line that is quoted may hold a token.
            reason = " ".join(_QUOTED.sub("", message or "it is no HTTP").split())
            _LOG.debug("a request could not be parsed: %s", reason)
            response = error_object(status, "BadRequest", f"the request cannot be parsed: {reason}")
        response.force_close()
        return _with_id(response, None)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; what aiohttp refused before any middleware saw it (``Expect``) becomes one of ours."""
        # The first of the two costs next to nothing, the second does with aiohttp's classes.
        if isinstance(resp, Exception) and isinstance(resp, web.HTTPException):
            resp = _with_id(http_error_answer(request, resp), request.headers.get("X-Request-ID"))
        # One that was sent behind this one already has its answer too.
        if self._is_last and not self._messages:
            resp.force_close()
        try:
            sent, is_reset = await super().finish_response(request, resp, start_time)
        finally:
            self.asks_model = False
            self._at_its_end = None
        if self._is_last and not self._messages:
            # That the agent stops came to be known while it was on its way.
            sent.force_close()
        return sent, is_reset


def connection_of(request: web.BaseRequest) -> Connection:
    """The connection that a request came on."""
    return request.protocol  # type: ignore[return-value]  # there are no others


def _with_id(response: web.Response, offered: str | None) -> web.Response:
    response.headers["X-Request-ID"] = request_id_from(offered)
    response.headers["X-Response-Time"] = "0.00ms"
    return response
