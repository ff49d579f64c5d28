"""The OpenAPI 3.1 document, made from the route table and from the models that validate bodies."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from http import HTTPStatus
from typing import Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaMode

from magi_agent import __version__
from magi_agent.api.access import Forbidden, Unauthorized
from magi_agent.api.exchange import (
    JSON,
    BadRequest,
    InvalidJson,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)
from magi_agent.api.routes import Access, QueryParameter, Route
from magi_agent.api.schemas import AnthropicsErrorAnswer, ErrorAnswer, OpenAIErrorAnswer
from magi_agent.api.streaming import StreamForm
from magi_agent.errors import MagiError, ValidationFailed
from magi_agent.gateway.openai_errors import code_of, is_for_anthropics_clients, is_for_openai_clients
from magi_agent.vocabulary import Tier

_Json = dict[str, Any]
_DESCRIPTION: Final = """Runs local language models on a GPU host, each in a systemd unit of its own.

The same paths answer on a unix socket and on TCP. Keys are camelCase; request bodies may also use snake_case. Every
error, on every path, is one JSON object with `error`, `message` and `details`. Every answer carries `X-Request-ID`
(the caller's own, if it is a sane token) and `X-Response-Time`. Times are UTC, ISO 8601, with `Z`."""
_TAGS: Final = {
    "models": "what there is, and what people choose for it",
    "servers": "what runs",
    "profiles": "named sets of enabled models",
    "settings": "how a model's server is run",
    "health": "whether the agent lives, whether what should be up is, and whether requests would be answered",
    "gateway": "the models, as programs use them: the paths of the OpenAI API, and what else llama-server serves",
    "host": "what this host has",
    "agent": "the agent itself",
}
_PARAMETERS: Final[Mapping[str, _Json]] = {
    "modelId": {"description": "a model's id", "schema": {"type": "string"}},
    "model": {"description": "a model's id, an alias, or its file's name", "schema": {"type": "string"}},
    "name": {"description": "a profile's slug", "schema": {"type": "string"}},
    "path": {"description": "the rest of the path, as the server knows it", "schema": {"type": "string"}},
    "tier": {"description": "a tier", "schema": {"type": "string", "enum": [str(tier) for tier in Tier]}},
    "operationId": {"description": "an operation's id", "schema": {"type": "string"}},
}
_BODY_ERRORS: Final = (
    InvalidJson,
    BadRequest,
    RequestTimeout,
    PayloadTooLarge,
    UnsupportedMediaType,
    ValidationFailed,
)
_LOCATED: Final = frozenset({201, 202})
_DENIED: Final = frozenset({Unauthorized.status, Forbidden.status})
_EVERYWHERE: Final = ("X-Request-ID", "X-Response-Time")
_CONDITIONAL: Final = ("ETag", "Cache-Control")
_IF_NONE_MATCH: Final[_Json] = {
    "name": "If-None-Match",
    "in": "header",
    "description": "the `ETag` of a body that the caller has, or several; where it still holds, the answer is 304",
    "schema": {"type": "string"},
}
_LAST_EVENT_ID: Final[_Json] = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "the id of the last item that the caller has: what is streamed goes on after it",
    "schema": {"type": "string"},
}
_SCHEMAS: Final = "#/components/schemas/{model}"
_BEARER: Final = "bearer"
_API_KEY: Final = "apiKey"
_SECURITY: Final[_Json] = {
    _BEARER: {
        "type": "http",
        "scheme": "bearer",
        "description": "A token of the scope `read`, `infer` or `admin`; `admin` includes the others, and `read` and "
        "`infer` do not include each other. What `magictl token add` prints. Who is known without one, on the unix "
        "socket or on loopback, needs none; a token that does not hold is 401 for everybody.",
    },
    _API_KEY: {
        "type": "apiKey",
        "in": "header",
        "name": "X-Api-Key",
        "description": "The same token, as Anthropic's clients send it. With another one in `Authorization` it is 401.",
    },
}
_SCOPES: Final = {Access.KNOWN: [], Access.READ: ["read"], Access.INFER: ["infer"], Access.ADMIN: ["admin"]}


def openapi_document(routes: Sequence[Route]) -> _Json:
    """The document for ``routes``, but for ``servers``, which depends on who asks."""
    schemas, components = _schemas_of(routes)
    paths: dict[str, _Json] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MAGI Agent",
            "version": __version__,
            "summary": "Local language models as systemd units",
            "description": _DESCRIPTION,
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": _SECURITY,
            "headers": {
                "X-Request-ID": {"description": "names this request in the journal", "schema": {"type": "string"}},
                "X-Response-Time": {
                    "description": "milliseconds until the answer was made, such as `1.25ms`",
                    "schema": {"type": "string"},
                },
                "ETag": {"description": "tells this body from every other one", "schema": {"type": "string"}},
                "Cache-Control": {
                    "description": "`no-cache`: it may be kept, and is to be asked for again with `If-None-Match`",
                    "schema": {"type": "string"},
                },
                "WWW-Authenticate": {
                    "description": "`Bearer`, and what is wrong with the token where one was sent",
                    "schema": {"type": "string"},
                },
                "Location": {"description": "where to look after what was made or begun", "schema": {"type": "string"}},
            },
        },
    }


def _schemas_of(routes: Iterable[Route]) -> tuple[dict[str, _Json], _Json]:
    """The schema of each body by its key, and the named schemas these refer to."""
    inputs: dict[str, tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = {}
    for route in routes:
        if route.body is not None:
            inputs[_key(route.body)] = (_key(route.body), "validation", TypeAdapter(route.body))
        for shape in (*route.answers.values(), route.streamed):
            if shape is not None and not isinstance(shape, str):
                inputs[_key(shape)] = (_key(shape), "serialization", TypeAdapter(shape))
    for shape in (ErrorAnswer, OpenAIErrorAnswer, AnthropicsErrorAnswer):
        inputs[_key(shape)] = (_key(shape), "serialization", TypeAdapter(shape))
    found, rest = TypeAdapter.json_schemas(inputs.values(), by_alias=True, ref_template=_SCHEMAS)
    return {key: schema for (key, _), schema in found.items()}, rest.get("$defs", {})


def _key(shape: object) -> str:
    if inspect.isclass(shape) and (issubclass(shape, BaseModel) or is_dataclass(shape)):
        return shape.__name__
    return str(shape)


def _operation(route: Route, schemas: Mapping[str, _Json]) -> _Json:
    operation: _Json = {
        "operationId": to_camel(route.handler.__name__),
        "summary": route.summary,
        "tags": [route.tag],
        "security": _security(route),
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, **_PARAMETERS[name]}
                for name in re.findall(r"{(\w+)}", route.path)
            ),
            *(
                {"name": key.name, "in": "query", "description": key.description, "schema": _query_schema(key)}
                for key in route.query
            ),
        ],
        "responses": {
            **{str(status): _response(status, shape, schemas) for status, shape in route.answers.items()},
            **_error_responses(route, schemas),
        },
    }
    if route.conditional:
        operation["parameters"].append(_IF_NONE_MATCH)
        operation["responses"]["200"]["headers"] |= _headers(_CONDITIONAL)
        operation["responses"]["304"] = {
            "description": "The body is one that `If-None-Match` names",
            "headers": _headers([*_EVERYWHERE, *_CONDITIONAL]),
        }
    if route.streamed is not None:
        # OpenAPI 3.1 has no word for the shape of each item; 3.2 calls it itemSchema.
        one = {"schema": {"type": "string"}, "x-itemSchema": schemas[_key(route.streamed)]}
        operation["responses"]["200"]["content"] |= {form.value: one for form in StreamForm}
        operation["parameters"].append(_LAST_EVENT_ID)
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas[_key(route.body)]}}}
    return operation


def _security(route: Route) -> list[_Json]:
    if route.access is Access.OPEN:
        return []
    names = [_BEARER, *([_API_KEY] if is_for_openai_clients(route.path) else [])]
    # Nothing is asked of some: what a caller may do without a token depends on where they come from.
    return [{}, *({name: _SCOPES[route.access]} for name in names)]


def _query_schema(key: QueryParameter) -> _Json:
    bounds = {} if key.maximum is None else {"minimum": 0, "maximum": key.maximum}
    return {"type": key.kind, **bounds}


def _response(status: int, shape: object, schemas: Mapping[str, _Json]) -> _Json:
    names = [*_EVERYWHERE, *(["Location"] if status in _LOCATED else [])]
    content: _Json
    if isinstance(shape, str):
        content = {shape: {"schema": {"type": "string"}}}
    elif shape is None:
        content = {JSON: {"schema": {"type": "object"}}}
    else:
        content = {JSON: {"schema": schemas[_key(shape)]}}
    return {
        "description": HTTPStatus(status).phrase,
        "headers": _headers(names),
        "content": content,
    }


def _headers(names: Iterable[str]) -> _Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_responses(route: Route, schemas: Mapping[str, _Json]) -> _Json:
    """One response for each status that the route's errors have, with the words that ``error`` may be."""
    errors = list(route.errors)
    if route.access is not Access.OPEN:
        errors += [Unauthorized, Forbidden]
    if route.body is not None:
        errors += _BODY_ERRORS
    if route.query:
        errors.append(ValidationFailed)
    by_status = {500: {MagiError.error: "Something went wrong inside the agent; its journal has the whole story"}}
    for error in errors:
        by_status.setdefault(error.status, {})[error.error] = (error.__doc__ or "").partition("\n")[0].rstrip(".")
    responses = {}
    for status, words in sorted(by_status.items()):
        shape: type[BaseModel]
        enum: _Json
        if is_for_openai_clients(route.path):
            words = {code_of(word): said for word, said in words.items()}
            shape = AnthropicsErrorAnswer if is_for_anthropics_clients(route.path) else OpenAIErrorAnswer
            enum = {"properties": {"code": {"enum": list(words)}}}
        else:
            shape, enum = ErrorAnswer, {"enum": list(words)}
        response = _response(status, shape, schemas)
        if status in _DENIED:
            response["headers"] |= _headers(["WWW-Authenticate"])
        response["description"] = "; ".join(f"`{word}`: {said}" for word, said in words.items())
        response["content"][JSON]["schema"] = {"allOf": [schemas[_key(shape)], {"properties": {"error": enum}}]}
        responses[str(status)] = response
    return responses
