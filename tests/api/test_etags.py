"""Entity tags: what a caller has already is not sent again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api.client import Api, Reply
from tests.api.conftest import Serve

PATHS = ["/api/models/registry", "/api/models/servers", "/api/models/tiers/balanced"]
ONE_LISTENER = pytest.mark.parametrize("listener", ["tcp"], indirect=True)
ORIGIN = "https://chat.example.org"


REGISTRY, SERVERS, TIER = PATHS


async def tag_of(api: Api, path: str) -> str:
    reply = await api.ask("GET", path)
    reply.success()
    return reply.headers["ETag"]


async def ask_again(api: Api, path: str, known: str, method: str = "GET") -> Reply:
    return await api.ask(method, path, headers={"If-None-Match": known})


async def ask_twice(api: Api, path: str, known: str = "{tag}", method: str = "GET") -> tuple[Reply, Reply]:
    """Ask, and ask again with the tag that the answer had; anew where something changed in between, as a scan does."""
    while True:
        first = await api.ask("GET", path)
        tag = first.headers["ETag"]
        again = await ask_again(api, path, known.format(tag=tag, bare=tag.strip('"')), method)
        if again.headers["ETag"] == tag:
            return first, again


@pytest.mark.parametrize("path", PATHS)
async def test_who_has_it_already_is_sent_nothing(serve: Serve, path: str) -> None:
    api = await serve("api-etag")

    first, again = await ask_twice(api, path)

    tag = first.headers["ETag"]
    assert first.headers["Cache-Control"] == "no-cache"
    assert tag.startswith('"'), "it is a strong one: the bodies are the same byte by byte"
    assert (again.status, again.content) == (304, b"")
    assert (again.headers["ETag"], again.headers["Cache-Control"]) == (tag, "no-cache")
    assert again.headers["X-Request-ID"]
    assert "Content-Type" not in again.headers


@ONE_LISTENER
@pytest.mark.parametrize(
    ("known", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"other", {tag}', 304),
        ('W/"a,b" , W/{tag},"c"', 304),
        ("*", 304),
        ('"*"', 200),
        ('"other"', 200),
        ('"other", W/"another"', 200),
        ("{bare}", 200),
        ("", 200),
        ("nonsense, {tag}", 200),
    ],
)
async def test_every_way_to_say_what_one_has(serve: Serve, known: str, status: int) -> None:
    api = await serve("api-etag")

    _, again = await ask_twice(api, REGISTRY, known)

    assert again.status == status
    assert bool(again.content) is (status == 200)


@ONE_LISTENER
async def test_a_head_request_is_told_the_same(serve: Serve) -> None:
    api = await serve("api-etag")

    unknown, known = await ask_twice(api, REGISTRY, '"other"', "HEAD"), await ask_twice(api, REGISTRY, method="HEAD")

    assert (unknown[1].status, unknown[1].content) == (200, b"")
    assert known[1].status == 304


@ONE_LISTENER
async def test_a_choice_is_another_body(serve: Serve) -> None:
    api = await serve("api-etag")
    before = {path: await tag_of(api, path) for path in (REGISTRY, TIER, "/api/models/tiers/fast")}

    (await api.ask("PUT", "/api/models/api-etag/tier", {"tier": "fast"})).success()

    for path, tag in before.items():
        again = await ask_again(api, path, tag)
        assert again.status == 200
        assert again.headers["ETag"] != tag


@ONE_LISTENER
async def test_a_scan_that_found_nothing_new_changes_the_registry_alone(serve: Serve) -> None:
    # The registry's body says when the last scan was; what lists the models of a tier does not.
    api = await serve("api-etag")
    registry, tier = await tag_of(api, REGISTRY), await tag_of(api, TIER)

    (await api.ask("POST", "/api/models/rescan")).success()

    assert (await ask_again(api, REGISTRY, registry)).status == 200
    assert (await ask_again(api, TIER, tier)).status == 304


@ONE_LISTENER
async def test_a_server_that_comes_up_is_another_body(serve: Serve) -> None:
    api = await serve("api-etag")
    tag = await tag_of(api, SERVERS)
    (await api.ask("POST", "/api/models/servers/api-etag/start?wait=60")).success()

    again = await ask_again(api, SERVERS, tag)

    assert again.status == 200
    assert again.body["readyServers"] == 1


@ONE_LISTENER
async def test_what_one_may_not_read_is_not_confirmed_either(serve: Serve) -> None:
    api = await serve("api-etag", tcp_access="none")

    (await ask_again(api, REGISTRY, "*")).failure(401, "Unauthorized")


@ONE_LISTENER
async def test_pages_of_other_sites_may_read_and_send_it(serve: Serve) -> None:
    api = await serve("api-etag", cors_origins=ORIGIN)
    tag = await tag_of(api, TIER)

    again = await api.ask("GET", TIER, headers={"Origin": ORIGIN, "If-None-Match": tag})
    asked = await api.ask(
        "OPTIONS",
        REGISTRY,
        headers={
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "if-none-match",
        },
    )

    assert again.status == 304
    assert again.headers["Vary"] == "Origin", "as on the whole answer"
    assert again.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "ETag" in again.headers["Access-Control-Expose-Headers"].split(", ")
    assert "If-None-Match" in asked.headers["Access-Control-Allow-Headers"].split(", ")


@ONE_LISTENER
async def test_on_the_wire_it_has_no_body_and_the_connection_lives_on(serve: Serve) -> None:
    api = await serve("api-etag")
    raw = await _raw(api, await tag_of(api, TIER))

    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 304 ")
    assert rest.startswith(b"HTTP/1.1 200 "), "what follows is the answer to the next request"


async def _raw(api: Api, tag: str) -> bytes:
    """Both answers to two requests on one connection."""
    assert api.agent.settings.tcp is not None
    reader, writer = await asyncio.open_connection(api.agent.settings.tcp.host, api.agent.settings.tcp.port)
    try:
        host = "Host: localhost\r\n"
        writer.write(f"GET {TIER} HTTP/1.1\r\n{host}If-None-Match: {tag}\r\n\r\n".encode())
        writer.write(f"GET /health/live HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode())
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


@ONE_LISTENER
@pytest.mark.parametrize("path", ["/api/models/registry", "/api/models/servers", "/api/models/tiers/{tier}"])
async def test_it_is_in_the_document(serve: Serve, path: str) -> None:
    api = await serve()
    operation: dict[str, Any] = (await api.get("/api/openapi.json"))["paths"][path]["get"]

    assert [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"] == [
        "If-None-Match"
    ]
    assert {"ETag", "Cache-Control"} <= set(operation["responses"]["200"]["headers"])
    assert {"ETag", "Cache-Control", "X-Request-ID"} <= set(operation["responses"]["304"]["headers"])
    assert "content" not in operation["responses"]["304"]
