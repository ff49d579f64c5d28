"""Errors in the form that clients of the OpenAI API know, on the paths that are for them.

https://platform.openai.com/docs/guides/error-codes: ``{"error": {"message", "type", "param", "code"}}``. Clients tell
kinds of errors by the status, some by ``code``.

Anthropic's own form (https://docs.anthropic.com/en/api/errors) is ``{"type": "error", "error": {"type", "message"}}``,
and in a stream an event that is called ``error``: what has another name, or none, its clients pass over. On its paths
an error is of both forms, with Anthropic's words for the types, as its clients tell kinds of errors by these.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import pydantic_core

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_TYPES_BY_NAME: Final = {"RateLimitExceeded": "requests"}
"""Where OpenAI's type is about more than the status: what there are too many of."""
_ANTHROPICS_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_ANTHROPICS_SERVERS_FAULT: Final = "api_error"
_ANTHROPICS_PATH: Final = re.compile(r"(?:/api/proxy/[^/]+)?/v1/messages(?:/.*)?")
_CLIENTS_FAULT: Final = "invalid_request_error"
_SERVERS_FAULT: Final = "server_error"
_FIRST_SERVERS_STATUS: Final = 500
_CODES: Final = {"Unauthorized": "invalid_api_key"}
_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
NATIVE_PATHS: Final = (
    "/completion", "/completions", "/chat/completions", "/infill", "/embedding", "/embeddings", "/rerank",
    "/reranking", "/tokenize", "/detokenize", "/apply-template",
)  # fmt: skip
"""llama-server's own paths that are about one model."""


def is_for_openai_clients(path: str) -> bool:
    """Whether errors on a path are told in this form."""
    return path.startswith(("/v1/", "/api/proxy/")) or path in NATIVE_PATHS


def is_for_anthropics_clients(path: str) -> bool:
    """Whether a path is one of Anthropic's API, where an error is of its form as well."""
    return _ANTHROPICS_PATH.fullmatch(path) is not None


def code_of(name: str) -> str:
    """What ``code`` is for an error of ours: OpenAI's own word, or ours as they write words."""
    return _CODES.get(name) or _WORD.sub("_", name).lower()


def openai_error(status: int, name: str, message: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """One of our errors in this form. What a program can use of it stands beside the four members."""
    kind = (
        _TYPES_BY_NAME.get(name)
        or _TYPES.get(status)
        or (_CLIENTS_FAULT if status < _FIRST_SERVERS_STATUS else _SERVERS_FAULT)
    )
    return {"error": {"message": message, "type": kind, "param": None, "code": code_of(name), "details": details}}


def anthropics_error(status: int, name: str, message: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """One of our errors in both forms at once."""
    otherwise = _CLIENTS_FAULT if status < _FIRST_SERVERS_STATUS else _ANTHROPICS_SERVERS_FAULT
    error = openai_error(status, name, message, details)["error"]
    return {"type": "error", "error": {**error, "type": _ANTHROPICS_TYPES.get(status, otherwise)}}


def error_on(path: str, status: int, name: str, message: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """One of our errors in the form that clients of a path know."""
    form = anthropics_error if is_for_anthropics_clients(path) else openai_error
    return form(status, name, message, details)


def error_event(path: str, status: int, name: str, message: str) -> bytes:
    """An error within a stream of server-sent events, as llama-server tells it there, and whose API the path is of."""
    data = pydantic_core.to_json(error_on(path, status, name, message, {}))
    return b"%bdata: %b\n\n" % (event_line(path), data)


def event_line(path: str) -> bytes:
    """What comes before the data of an error in a stream: its event's name, where it has one."""
    return b"event: error\n" if is_for_anthropics_clients(path) else b""
