"""The OpenAPI document and the page that shows it."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from magi_agent.api import access, exchange
from magi_agent.errors import AlreadyRunning, ConfigurationError, MagiError, ProbeFailed
from magi_agent.gateway.openai_errors import code_of, is_for_openai_clients
from magi_agent.launcher.messages import Refused
from magi_agent.runtime_settings.settings import setting_names, wire_name
from magi_agent.token_file import TokenExists, TokenNotFound, TokensBusy
from tests.api.client import Api
from tests.api.conftest import Serve

NEVER_ON_THE_WIRE = {
    *(ConfigurationError.error, AlreadyRunning.error, ProbeFailed.error),
    *(Refused.error, TokenExists.error, TokenNotFound.error, TokensBusy.error),
}
"""They end the start, or are caught where they are met."""
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
KINDS_THAT_OTHERS_REFINE = {"NotFound", "InvalidRequest", "Conflict"}


async def document(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = await api.get("/api/openapi.json")
    return found


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


@ONE_LISTENER
async def test_the_document_is_valid(serve: Serve) -> None:
    api = await serve()

    errors = list(OpenAPIV31SpecValidator(await document(api)).iter_errors())

    assert [f"{list(error.absolute_path)}: {error.message}" for error in errors] == []


@ONE_LISTENER
async def test_every_route_is_in_the_document_and_nothing_else(serve: Serve) -> None:
    api = await serve()
    served = {
        (route.method, re.sub(r"{(\w+):.*}", r"{\1}", route.resource.canonical))
        for route in api.agent._listeners._application.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }

    described = {(method, path) for method, path, _ in operations(await document(api))}

    assert described == served
    assert len(described) >= 37
    ids = [operation["operationId"] for _, _, operation in operations(await document(api))]
    assert len(set(ids)) == len(ids)


@ONE_LISTENER
async def test_runtime_settings_have_one_schema(serve: Serve) -> None:
    schemas = (await document(await serve()))["components"]["schemas"]

    assert [name for name in schemas if "RuntimeSettings" in name] == ["RuntimeSettings"]
    settings = schemas["RuntimeSettings"]["properties"]
    assert list(settings) == [wire_name(name) for name in setting_names()]
    undescribed = {name for name, schema in settings.items() if "description" not in schema}
    assert undescribed == set()
    for schema in ("ModelAnswer", "ProfileRequest", "ProfileAnswer", "SettingsAnswer", "ChoicesBody"):
        assert "#/components/schemas/RuntimeSettings" in str(schemas[schema]), schema


@ONE_LISTENER
async def test_keys_are_camel_case_but_for_two(serve: Serve) -> None:
    api = await serve()
    found = await document(api)

    keys = {key for schema in found["components"]["schemas"].values() for key in schema.get("properties", {})}

    assert {key for key in keys if not re.fullmatch(r"[a-z][a-zA-Z0-9]*", key)} == {"powerful_min", "fast_max"}


@ONE_LISTENER
async def test_every_error_is_in_the_document(serve: Serve) -> None:
    def kinds(kind: type[MagiError]) -> Iterator[type[MagiError]]:
        for one in kind.__subclasses__():
            yield one
            yield from kinds(one)

    api = await serve()
    names = {code_of(kind.error): kind.error for kind in kinds(MagiError)}
    written = set()
    for _, path, operation in operations(await document(api)):
        for status, response in operation["responses"].items():
            schema = response.get("content", {}).get("application/json", {"schema": {}})["schema"]
            if "allOf" in schema:
                said = schema["allOf"][1]["properties"]["error"]
                if is_for_openai_clients(path):
                    words = [names[code] for code in said["properties"]["code"]["enum"]]
                else:
                    words = said["enum"]
                written |= {(int(status), word) for word in words}

    raised = {(kind.status, kind.error) for kind in kinds(MagiError)}
    known = {one for one in raised if one[1] not in NEVER_ON_THE_WIRE | KINDS_THAT_OTHERS_REFINE}
    assert access.Forbidden in set(kinds(MagiError))
    assert exchange.InvalidJson in set(kinds(MagiError))
    assert known - written == set()
    assert written <= raised


async def test_every_operation_says_which_scope_a_token_needs_for_it(serve: Serve) -> None:
    api = await serve()
    found = await document(api)

    assert found["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    needed = {
        f"{method} {path}": operation["security"][1]["bearer"] if operation["security"] else "nothing"
        for method, path, operation in operations(found)
    }
    assert needed["GET /"] == []
    assert {needed["GET /health/live"], needed["GET /health/ready"]} == {"nothing"}
    by_key = {path for _, path, operation in operations(found) if len(operation["security"]) > 2}
    assert by_key == {path for path in found["paths"] if is_for_openai_clients(path)}
    for what, scopes in needed.items():
        if what in ("GET /", "GET /v1/models", "GET /v1/models/{model}") or "/health/" in what:
            continue
        if is_for_openai_clients(what.partition(" ")[2]):
            assert scopes == ["infer"], what
            continue
        assert scopes == (["read"] if what.startswith("GET ") else ["admin"]), what
    for _, _, operation in operations(found):
        for status in {"401", "403"} & operation["responses"].keys():
            assert "WWW-Authenticate" in operation["responses"][status]["headers"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/", None, 200),
        ("GET", "/health/live", None, 200),
        ("GET", "/health/ready", None, 200),
        ("GET", "/api/models/registry", None, 200),
        ("GET", "/api/models/{api-one}", None, 200),
        ("GET", "/api/models/tiers/{balanced}", None, 200),
        ("GET", "/api/models/servers", None, 200),
        ("GET", "/api/models/servers/{api-one}", None, 200),
        ("GET", "/api/models/servers/{api-none}", None, 404),
        ("POST", "/api/models/rescan", None, 200),
        ("POST", "/api/models/servers/{api-one}/stop", None, 200),
        ("POST", "/api/models/servers/stop-all", None, 200),
        ("PUT", "/api/models/{api-one}/tier", {"tier": "fast"}, 200),
        ("PUT", "/api/models/{api-one}/tier", {"tier": "huge"}, 400),
        ("PUT", "/api/models/{api-one}/thinking", {"thinking": None}, 200),
        ("PUT", "/api/models/{api-one}/enabled", {"enabled": True}, 200),
        ("POST", "/api/models/profiles", {"name": "day"}, 201),
        ("POST", "/api/models/profiles", {"name": ""}, 422),
        ("GET", "/api/models/profiles", None, 200),
        ("GET", "/api/models/profiles/{absent}", None, 404),
    ],
)
async def test_answers_are_as_the_document_says(
    serve: Serve, method: str, path: str, body: object, status: int
) -> None:
    api = await serve("api-one")
    found = await document(api)
    described = next(
        operation
        for verb, template, operation in operations(found)
        if verb == method and re.sub(r"{\w+}", "{}", template) == re.sub(r"{[\w-]+}", "{}", path)
    )

    reply = await api.ask(method, re.sub("[{}]", "", path), body)

    content = reply.success(status)
    answered = described["responses"][str(status)]["content"]["application/json"]["schema"]
    OAS31Validator({"components": found["components"], **answered}).validate(content)
    if body is not None and status < 400:
        asked = described["requestBody"]["content"]["application/json"]["schema"]
        OAS31Validator({"components": found["components"], **asked}).validate(body)
    for name in described["responses"][str(status)]["headers"]:
        assert name in reply.headers


class Links(HTMLParser):
    """Everything in a page by which a browser would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, _: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]


@ONE_LISTENER
async def test_the_page_fetches_nothing_from_another_host(serve: Serve) -> None:
    api = await serve()

    page = await api.ask("GET", "/api/docs")

    assert page.status == 200
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    text = page.content.decode()
    links = Links()
    links.feed(text)
    assert set(links.found) == {"openapi.json", "data:,"}
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|url\(", text)
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy, f"the browser would not use the page's own {tag}"


@ONE_LISTENER
async def test_the_pages_script_can_be_parsed(serve: Serve) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no JavaScript engine on this machine")
    api = await serve()
    text = (await api.ask("GET", "/api/docs")).content.decode()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)

    checked = subprocess.run(  # noqa: ASYNC221  # a moment's work
        [node, "--check", "-"], input=script.encode(), capture_output=True, timeout=30, check=False
    )

    assert checked.returncode == 0, checked.stderr.decode()
