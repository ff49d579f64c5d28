"""What is around every handler: the request's id, the caller's rights, the one form of errors, the time taken, the log.

One middleware, since each costs every request.
"""

import logging
import time
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from magi_agent.api.access import SAFE_METHODS, Identify, require
from magi_agent.api.cors import CrossOrigin
from magi_agent.api.error_answers import crash_answer, error_answer, http_error_answer
from magi_agent.api.exchange import CALLER
from magi_agent.api.routes import Access
from magi_agent.errors import MagiError
from magi_agent.request_id import REQUEST_ID, request_id_from

_LOG: Final = logging.getLogger(__name__)
_SERVER_ERROR: Final = 500


def answering(identify: Identify, access: Mapping[object, Access], cross_origin: CrossOrigin) -> Middleware:
    """The middleware. ``access`` is what each route's handler asks of a caller; an unknown path asks for reading."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.perf_counter()
        request_id = request_id_from(request.headers.get("X-Request-ID"))
        REQUEST_ID.set(request_id)
        caller = request[CALLER] = identify(request)
        response: web.StreamResponse | None = cross_origin.preflight(request)
        if response is None:
            try:
                require(caller, access.get(request.match_info.handler, Access.READ))
                response = await handler(request)
            except MagiError as error:
                response = error_answer(error)
                if error.status >= _SERVER_ERROR:
                    _LOG.error("%s %s: %s", request.method, request.rel_url.raw_path, error, extra=_marked(request_id))
            except web.HTTPException as error:
                response = http_error_answer(request, error)
            except Exception:  # noqa: BLE001  # the end of the line: logged whole, and told to the caller as a crash
                what = request.method, request.rel_url.raw_path
                _LOG.exception("%s %s met a defect", *what, extra=_marked(request_id))
                response = crash_answer()
        seconds = time.perf_counter() - began
        headers = response.headers
        headers["X-Request-ID"] = request_id
        headers["X-Response-Time"] = f"{seconds * 1000:.2f}ms"
        cross_origin.mark(request, headers)
        _log(request, response.status, seconds, caller.name, request_id)
        return response

    return answer


def _marked(request_id: str) -> dict[str, str]:
    """What a log record carries to name its request."""
    return {"magi_request_id": request_id}


def _log(request: web.Request, status: int, seconds: float, who: str, request_id: str) -> None:
    level = logging.DEBUG if request.method in SAFE_METHODS else logging.INFO
    if _LOG.isEnabledFor(level):
        # The path as it came, percent-encoded: nothing in it can pass for another line.
        _LOG.log(
            level,
            "%s %s: %d in %.1f ms, for %s",
            request.method,
            request.rel_url.raw_path,
            status,
            seconds * 1000,
            who,
            extra=_marked(request_id),
        )
