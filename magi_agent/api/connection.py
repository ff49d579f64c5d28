"""One HTTP connection, where not even a request that cannot be parsed gets an answer of another form."""

import logging
import re
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web

from magi_agent.api.error_answers import crash_answer, error_object, http_error_answer
from magi_agent.request_id import request_id_from

_LOG: Final = logging.getLogger(__name__)
_SERVER_ERROR: Final = 500
_QUOTED: Final = re.compile(r":?\s*\bb['\"].*", re.DOTALL)
"""Where aiohttp begins to quote the line it stumbled over."""


class Connection(web.RequestHandler):
    """aiohttp's own, but for what it would answer without asking the application."""

    __slots__ = ("_at_its_end",)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._at_its_end: Callable[[], None] | None = None

    def when_lost(self, called: Callable[[], None] | None) -> None:
        """Have ``called`` when the connection is gone; aiohttp tells no handler, and requests are answered one by one.

        It is called at once where the connection is gone already.
        """
        if called is not None and not self.connected:
            called()
        else:
            self._at_its_end = called

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
        if isinstance(resp, web.HTTPException):
            resp = _with_id(http_error_answer(request, resp), request.headers.get("X-Request-ID"))
        return await super().finish_response(request, resp, start_time)


def _with_id(response: web.Response, offered: str | None) -> web.Response:
    response.headers["X-Request-ID"] = request_id_from(offered)
    response.headers["X-Response-Time"] = "0.00ms"
    return response
