"""What is around every handler: the request's id, the caller's rights, the one form of errors, the time taken, the log.

One middleware, since each costs every request. Every change is logged with who asked for it, however little else is
logged; what was refused is logged too, so much of it in a minute as leaves the journal to the rest.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from magi_agent.api.access import SAFE_METHODS, AccessDenied, Caller, Identify, require
from magi_agent.api.cors import CrossOrigin
from magi_agent.api.counted_requests import CountedRequests
from magi_agent.api.error_answers import ErrorResponse, crash_answer, error_answer, http_error_answer
from magi_agent.api.exchange import ANSWER_HEADERS, ASKED, CALLER
from magi_agent.api.routes import Access
from magi_agent.api.streaming import StreamAnswer, StreamReport
from magi_agent.errors import MagiError
from magi_agent.gateway.openai_errors import is_for_openai_clients
from magi_agent.log_output import CHANGES
from magi_agent.request_id import REQUEST_ID, request_id_from

_LOG: Final = logging.getLogger(__name__)
_CHANGES: Final = logging.getLogger(CHANGES)
_SERVER_ERROR: Final = 500
_REFUSALS: Final = 30
"""Refused requests that are logged in a minute."""
_MINUTE: Final = 60.0


def answering(
    identify: Identify, access: Mapping[object, Access], cross_origin: CrossOrigin, counted: CountedRequests
) -> Middleware:
    """The middleware. ``access`` is what each route's handler asks of a caller; an unknown path asks to be known."""
    log = _RequestLog()

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        counted.began()
        asks = access.get(handler, Access.KNOWN)
        request_id = request_id_from(request.headers.get("X-Request-ID"))
        REQUEST_ID.set(request_id)
        caller = request[CALLER] = identify(request)
        more = request[ANSWER_HEADERS] = {}
        response: web.StreamResponse | None = cross_origin.preflight(request)
        failure: ErrorResponse | None = None
        refused = False
        if response is None:
            try:
                require(caller, asks)
                response = await handler(request)
            except MagiError as error:
                refused = isinstance(error, AccessDenied)
                response = failure = error_answer(error)
                if error.status >= _SERVER_ERROR and error.is_trouble:
                    _LOG.error("%s %s: %s", request.method, request.rel_url.raw_path, error, extra=_marked(request_id))
            except web.HTTPException as error:
                response = failure = http_error_answer(request, error)
            except asyncio.CancelledError:
                log.broken_off(request, asks, caller, request_id)
                counted.ended(request.method, handler, None, time.perf_counter() - began)
                raise
            except Exception:  # noqa: BLE001  # the end of the line: logged whole, and told to the caller as a crash
                what = request.method, request.rel_url.raw_path
                _LOG.exception("%s %s met a defect", *what, extra=_marked(request_id))
                response = failure = crash_answer()
        if failure is not None and is_for_openai_clients(request.path):
            failure.for_clients_of(request.path)
        seconds = time.perf_counter() - began
        counted.ended(request.method, handler, response.status, seconds)
        headers = response.headers
        headers["X-Request-ID"] = request_id
        headers["X-Response-Time"] = f"{seconds * 1000:.2f}ms"
        if more:
            headers.update(more)
        cross_origin.mark(request, headers)
        if isinstance(response, StreamAnswer):
            response.may_go_on = lambda: asks in identify(request).access
            response.when_ended = partial(log.streamed, request, response.status, caller, request_id)
        elif refused:
            log.refused(request, response.status, caller, request_id)
        else:
            log.answered(request, asks, response.status, seconds, caller, request_id)
        return response

    return answer


def _marked(request_id: str, caller: Caller | None = None) -> dict[str, str | None]:
    """What a log record carries to name its request, and who made it."""
    if caller is None:
        return {"magi_request_id": request_id}
    return {"magi_request_id": request_id, "magi_caller": caller.name, "magi_token": caller.token}


def _is_change(request: web.Request, asks: Access) -> bool:
    # What is asked of a model changes nothing.
    return asks is not Access.INFER and request.method not in SAFE_METHODS


class _RequestLog:
    """Writes who asked for what, and what came of it."""

    def __init__(self) -> None:
        self._minute = 0.0
        self._refusals = 0

    def answered(
        self, request: web.Request, asks: Access, status: int, seconds: float, caller: Caller, request_id: str
    ) -> None:
        """Log a request that was let in."""
        log, level = (_CHANGES, logging.INFO) if _is_change(request, asks) else (_LOG, logging.DEBUG)
        if log.isEnabledFor(level):
            # The path as it came, percent-encoded: nothing in it can pass for another line.
            path = request.rel_url.raw_path
            took = seconds * 1000
            extra = _marked(request_id, caller)
            asked = f" {request[ASKED]}" if ASKED in request else ""
            line = "%s %s%s: %d in %.1f ms, for %s"
            log.log(level, line, request.method, path, asked, status, took, caller.name, extra=extra)

    def streamed(
        self, request: web.Request, status: int, caller: Caller, request_id: str, report: StreamReport
    ) -> None:
        """Log an answer that went on for a while, at its end."""
        if _LOG.isEnabledFor(logging.DEBUG):
            told = f"{report.items} items, {report.bytes_sent} bytes in {report.seconds:.1f} s, until {report.why}"
            what = request.method, request.rel_url.raw_path, status, told, caller.name
            _LOG.debug("%s %s: %d, streamed %s, for %s", *what, extra=_marked(request_id, caller))

    def broken_off(self, request: web.Request, asks: Access, caller: Caller, request_id: str) -> None:
        """Log a change that nobody was told the outcome of: it may have been made."""
        if _is_change(request, asks):
            what = request.method, request.rel_url.raw_path, caller.name
            _CHANGES.info("%s %s: broken off, for %s", *what, extra=_marked(request_id, caller))

    def refused(self, request: web.Request, status: int, caller: Caller, request_id: str) -> None:
        """Log a request that was not let in."""
        now = time.monotonic()
        if now - self._minute >= _MINUTE:
            if self._refusals > _REFUSALS:
                _LOG.warning("%d more requests were refused in that minute", self._refusals - _REFUSALS)
            self._minute, self._refusals = now, 0
        self._refusals += 1
        if self._refusals > _REFUSALS:
            return
        what = request.method, request.rel_url.raw_path, status, caller.name
        why = ", who brought a token that does not hold" if caller.has_bad_token else ""
        _LOG.info("%s %s: %d, refused to %s%s", *what, why, extra=_marked(request_id, caller))
