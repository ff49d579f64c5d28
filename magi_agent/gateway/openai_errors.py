"""Errors in the form that clients of the OpenAI API know, on the paths that are for them.

https://platform.openai.com/docs/guides/error-codes: ``{"error": {"message", "type", "param", "code"}}``. Clients tell
kinds of errors by the status, some by ``code``.
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


def error_event(status: int, name: str, message: str) -> bytes:
    """An error within a stream of server-sent events, as llama-server and OpenAI tell it there."""
    return b"data: %b\n\n" % pydantic_core.to_json(openai_error(status, name, message, {}))
