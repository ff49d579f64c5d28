"""One request and its answer: reading bodies and queries, writing JSON."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import pydantic_core
from aiohttp import web
from pydantic import BaseModel, ValidationError

from magi_agent.api.access import Caller
from magi_agent.api.field_paths import wire_path
from magi_agent.api.large_body import SLICE, LargeBody
from magi_agent.api.routes import MAX_WAIT
from magi_agent.errors import InvalidRequest, InvalidTier, ValidationFailed
from magi_agent.runtime_settings.reading import ADAPTER, InvalidRuntimeSettings, checked, message_of
from magi_agent.runtime_settings.settings import Fault, RuntimeSettings, wire_name
from magi_agent.vocabulary import Tier

JSON: Final = "application/json"
CALLER: Final = web.RequestKey("caller", Caller)
"""Who makes the request; set for every handler."""
ASKED: Final = web.RequestKey("asked", str)
"""What the body asked for, or a flag, as the log has it; there once that was read."""
ANSWER_HEADERS: Final = web.RequestKey("answer_headers", dict[str, str])
"""What the answer says in headers, whatever it comes to; there where a handler put any."""
MOST_ERRORS: Final = 100
"""Errors that are told of one body."""
_MOST_SHOWN: Final = 200
"""Bytes of a body in the log."""
_BODY_SECONDS: Final = 30.0
_Body = TypeVar("_Body", bound=BaseModel)
_JSON_TYPE: Final = re.compile(r"application/(?:[\w.+-]+\+)?json")


class InvalidJson(InvalidRequest):
    """The body is not JSON."""

    error = "InvalidJson"


class UnsupportedMediaType(InvalidRequest):
    """The body is said to be something else than JSON."""

    error = "UnsupportedMediaType"
    status = 415


class RequestTimeout(InvalidRequest):
    """The body did not arrive in time."""

    error = "RequestTimeout"
    status = 408


class BadRequest(InvalidRequest):
    """The body broke off, or is encoded wrongly."""

    error = "BadRequest"


class PayloadTooLarge(InvalidRequest):
    """The body is larger than any request needs."""

    error = "PayloadTooLarge"
    status = 413


async def body_of(request: web.Request, schema: type[_Body]) -> _Body:
    """Return the request's body, validated.

    Raises ``UnsupportedMediaType``, ``PayloadTooLarge``, ``InvalidJson``, ``ValidationFailed``, and ``BadRequest`` and
    ``RequestTimeout`` where it did not arrive whole.
    """
    raw = await _json_object(request)
    try:
        # From the text, not from the parsed document: only so are words taken for enumerations in strict mode.
        return schema.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise ValidationFailed(errors_on_wire(error, lambda place: wire_path(place, schema))) from None


async def runtime_settings_of(request: web.Request) -> RuntimeSettings:
    """Return the request's body as runtime settings. Raises as ``body_of`` does."""
    raw = await _json_object(request)
    try:
        return checked(ADAPTER.validate_json(raw, strict=True))
    except ValidationError as error:
        raise ValidationFailed(
            errors_on_wire(error, lambda place: ".".join(wire_name(str(step)) for step in place))
        ) from None
    except InvalidRuntimeSettings as error:
        raise ValidationFailed([fault_on_wire(fault) for fault in error.faults[:MOST_ERRORS]]) from None


def fault_on_wire(fault: Fault, within: str = "") -> dict[str, str]:
    """A fault of one runtime setting as it stands in ``details.errors``; ``within`` is where the settings stand."""
    return {"field": f"{within}{wire_name(fault.name)}", "message": fault.message}


def errors_on_wire(error: ValidationError, named: Callable[[tuple[int | str, ...]], str]) -> list[dict[str, str]]:
    """The errors of a body as they stand in ``details.errors``; ``named`` says where each is."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return [{"field": named(problem["loc"]), "message": message_of(problem)} for problem in problems[:MOST_ERRORS]]


async def _json_object(request: web.Request) -> bytes:
    """The body, which is a JSON object. Raises as ``body_of`` does."""
    raw = await received_json(request)
    try:
        document = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidJson(f"the body is not JSON: {error}") from None
    _ = object_in(document)
    request[ASKED] = asked(raw)
    return raw


def asked(body: bytes) -> str:
    """What a body says, as one short line for the log."""
    text = " ".join(body[:_MOST_SHOWN].decode(errors="replace").split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"{shown}…" if len(body) > _MOST_SHOWN else shown


def object_in(document: object) -> dict[str, Any]:
    """A body that is a JSON object. Raises ``ValidationFailed`` for any other."""
    if not isinstance(document, dict):
        raise ValidationFailed([{"field": "", "message": "the body must be a JSON object"}])
    return document


async def received_json(request: web.Request, most: int | None = None) -> bytes:
    """The body, which is said to be JSON, of at most ``most`` bytes, or of what the application takes.

    Raises ``UnsupportedMediaType``, ``PayloadTooLarge``, ``BadRequest``, ``RequestTimeout``.
    """
    if not _JSON_TYPE.fullmatch(request.content_type):
        raise UnsupportedMediaType(
            f"the body must be JSON: send 'Content-Type: {JSON}', not {request.content_type!r}",
            {"contentType": request.content_type},
        )
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"the body is encoded as {encoding!r}: send it as it is", {"contentEncoding": encoding}
        )
    return await received(request, request.client_max_size if most is None else most)


async def received(request: web.Request, most: int, seconds: float | None = None) -> bytes:
    """The body, of at most ``most`` bytes, which has so many ``seconds`` to arrive, 30 where nothing is said.

    Raises ``PayloadTooLarge``, ``BadRequest``, ``RequestTimeout``.
    """
    seconds = _BODY_SECONDS if seconds is None else seconds
    if (request.content_length or 0) > most:
        raise _too_large(most)
    if request.content.is_eof() and request.content.exception() is None:
        # Most are there with their head, and need no time to arrive.
        whole = request.content.read_nowait()
        if len(whole) > most:
            raise _too_large(most)
        return whole
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while piece := await request.content.readany():
                body += piece
                if len(body) > most:
                    raise _too_large(most)
        return bytes(body)
    except (web.RequestPayloadError, ConnectionError) as error:
        raise BadRequest(f"the body did not arrive whole: {error}") from None
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {seconds:g} seconds") from None
    finally:
        # The request keeps why its body broke off, and with that this frame: for long, as it is a circle.
        body.clear()


def _too_large(most: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {most} bytes, which is the most", {"maxBytes": most})


def wait_of(request: web.Request) -> float:
    """Return the seconds the caller wants to wait for an outcome. Raises ``ValidationFailed``."""
    text = request.query.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WAIT:
        raise ValidationFailed(
            [{"field": "wait", "message": f"must be seconds from 0 to {MAX_WAIT:.0f}, not {text!r}"}]
        )
    return seconds


def tier_named(word: str) -> Tier:
    """The tier that a path or a body names. Raises ``InvalidTier``."""
    try:
        return Tier(word)
    except ValueError:
        raise InvalidTier(word, [str(tier) for tier in Tier]) from None


def flag_of(request: web.Request, name: str) -> bool:
    """Return a true-or-false key of the query string; absent is false. Raises ``ValidationFailed``."""
    text = request.query.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise ValidationFailed([{"field": name, "message": f"must be true or false, not {text!r}"}])
    return text in ("true", "1")


def answer(content: BaseModel | bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON answer."""
    if isinstance(content, BaseModel):
        content = content.model_dump_json(by_alias=True).encode()
    body = LargeBody(content) if len(content) > SLICE else content
    return web.Response(body=body, status=status, headers=headers, content_type=JSON, charset="utf-8")


def location(request: web.Request, path: str) -> dict[str, str]:
    """The header that leads the caller to ``path`` of this API."""
    return {"Location": request[CALLER].prefix + path}


def array(items: Sequence[bytes | memoryview]) -> bytes:
    """Return a JSON array of what is JSON already."""
    return b"[" + b",".join(items) + b"]"
