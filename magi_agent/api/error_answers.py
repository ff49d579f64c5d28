"""Errors as they stand on the wire: one JSON object each, on every path."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import pydantic_core
from aiohttp import web

from magi_agent.api.access import AccessDenied
from magi_agent.api.exchange import JSON
from magi_agent.api.representations import readable
from magi_agent.errors import MagiError
from magi_agent.gateway.openai_errors import error_on

_NAMES: Final = {404: "NotFound", 405: "MethodNotAllowed", 413: "PayloadTooLarge", 500: "InternalServerError"}
_CRASH: Final = "something went wrong inside the agent; its journal has the whole story: journalctl -u magi-agent"


class ErrorResponse(web.Response):
    """An error, which may still be told in another form."""

    def __init__(self, content: Mapping[str, Any], status: int, headers: Mapping[str, str] | None) -> None:
        super().__init__(body=_json(content), status=status, headers=headers, content_type=JSON, charset="utf-8")
        self._content = content

    def for_clients_of(self, path: str) -> None:
        """Tell it in the form that clients of a path know that is for programs that use models."""
        content = self._content
        self.body = _json(error_on(path, self.status, content["error"], content["message"], content["details"]))


def error_answer(error: MagiError) -> ErrorResponse:
    """The answer for an error that a part of the agent raised on purpose."""
    headers = {}
    if isinstance(error, AccessDenied):
        headers["WWW-Authenticate"] = error.challenge
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return error_object(error.status, error.error, error.message, error.details, headers)


def crash_answer() -> ErrorResponse:
    """The answer where a handler met what nobody foresaw: nothing of it goes over the wire."""
    return error_object(500, "InternalServerError", _CRASH)


def http_error_answer(request: web.BaseRequest, error: web.HTTPException) -> ErrorResponse:
    """The answer for an error that aiohttp itself raised."""
    path = request.rel_url.raw_path
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = sorted(error.allowed_methods)
        return error_object(
            405,
            "MethodNotAllowed",
            f"{path} does not take {error.method}; it takes {', '.join(allowed)}",
            {"method": error.method, "allowedMethods": allowed},
            {"Allow": ", ".join(allowed)},
        )
    if error.status == HTTPStatus.NOT_FOUND:
        return error_object(
            404, "NotFound", f"there is nothing at {path}; /api/docs shows what there is", {"path": path}
        )
    return error_object(error.status, _name_of(error.status), error.text or error.reason)


def error_object(
    status: int,
    name: str,
    message: str,
    details: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> ErrorResponse:
    """The one JSON object that every error is."""
    content = {"error": name, "message": readable(message), "details": _presentable(details or {})}
    return ErrorResponse(content, status, headers)


def _json(content: Mapping[str, Any]) -> bytes:
    return pydantic_core.to_json(content, inf_nan_mode="null", fallback=str)


def _presentable(value: object) -> object:
    """``value`` with every text in it as JSON can carry it."""
    match value:
        case str():
            return readable(value)
        case Mapping():
            return {readable(str(key)): _presentable(item) for key, item in value.items()}
        case list() | tuple():
            return [_presentable(item) for item in value]
        case _:
            return value


def _name_of(status: int) -> str:
    """The word for a status that no error of ours has: its own phrase."""
    try:
        return _NAMES.get(status) or HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")
    except ValueError:
        return "HttpError"
