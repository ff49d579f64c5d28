"""A token that comes as ``X-Api-Key``, as Anthropic's clients send it: on the gateway's paths, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from magi_agent.servers.reach import AtPort
from magi_agent.tokens import new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.client import Api, Reply
from tests.api.conftest import Serve
from tests.api.test_tokens import keep, token
from tests.gateway.test_gateway import ONE, openai_failure, started

KEY, OTHER = new_secret(), new_secret()
LIST = "/v1/models"
REGISTRY = "/api/models/registry"
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


@pytest.fixture(autouse=True)
def two(tmp_path: Path) -> None:
    """Two tokens that hold."""
    keep(tmp_path, token("program", TokenScope.INFER, KEY), token("other", TokenScope.ADMIN, OTHER))


async def ask(api: Api, path: str, *headers: tuple[str, str]) -> Reply:
    async with api.session.get(api.base + path, headers=headers) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Api-Key", KEY)],
        [("x-api-key", f"  {KEY} ")],
        [("X-Api-Key", KEY), ("Authorization", f"Bearer {KEY}")],
        [("X-Api-Key", KEY), ("Authorization", "Basic eDp5")],
        [("X-Api-Key", ""), ("Authorization", f"Bearer {KEY}")],
    ],
    ids=["alone", "with blanks", "and as a bearer", "beside a proxy's password", "empty beside a bearer"],
)
async def test_it_counts_as_the_token_that_it_is(serve: Serve, headers: Sequence[tuple[str, str]]) -> None:
    api = await serve(ONE, tcp_access="none")
    proxied = ("X-Forwarded-For", "192.0.2.1")
    openai_failure(await ask(api, LIST, proxied), 401, "invalid_api_key")

    (await ask(api, LIST, proxied, *headers)).success()


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ([("X-Api-Key", f"{KEY}x")], "not known"),
        ([("X-Api-Key", "")], "not known"),
        ([("X-Api-Key", f"Bearer {KEY}")], "not known"),
        ([("X-Api-Key", KEY), ("X-Api-Key", KEY)], "not known"),
        ([("X-Api-Key", KEY), ("X-Api-Key", "")], "not known"),
        ([("X-Api-Key", ""), ("Authorization", "Bearer ")], "not known"),
        ([("X-Api-Key", KEY), ("Authorization", f"Bearer {OTHER}")], "different tokens"),
        ([("X-Api-Key", OTHER), ("Authorization", f"Bearer {KEY}")], "different tokens"),
        ([("X-Api-Key", "sk-ant"), ("Authorization", f"Bearer {KEY}")], "different tokens"),
        ([("X-Api-Key", KEY), ("Authorization", "Bearer ")], "different tokens"),
        ([("X-Api-Key", KEY), ("Authorization", "Basic eDp5"), ("Authorization", "Basic eDp5")], "different tokens"),
        ([("X-Api-Key", KEY), ("X-Api-Key", KEY), ("Authorization", f"Bearer {KEY}")], "different tokens"),
    ],
    ids=range(12),
)
async def test_one_that_does_not_hold_is_refused_where_none_is_needed(
    serve: Serve, headers: Sequence[tuple[str, str]], why: str
) -> None:
    api = await serve(ONE)
    (await ask(api, LIST)).success()

    for path in (LIST, f"/api/proxy/{ONE}/health"):
        refused = await ask(api, path, *headers)
        assert why in openai_failure(refused, 401, "invalid_api_key")["message"]
        assert refused.headers["WWW-Authenticate"] == 'Bearer realm="magi-agent", error="invalid_token"'
        assert KEY not in refused.content.decode()


async def test_elsewhere_it_is_a_proxys_matter(serve: Serve) -> None:
    api = await serve(ONE, tcp_access="read")

    (await ask(api, REGISTRY, ("X-Api-Key", "a-proxys"))).success()
    proxied = ("X-Forwarded-For", "192.0.2.1")
    (await ask(api, REGISTRY, ("X-Api-Key", OTHER), proxied)).failure(401, "Unauthorized")
    (await ask(api, REGISTRY, ("X-Api-Key", KEY), ("Authorization", f"Bearer {OTHER}"), proxied)).success()


@ONE_LISTENER
async def test_it_is_limited_as_the_token_that_it_is(serve: Serve) -> None:
    api = await serve(ONE)

    refused = await api.ask("GET", f"/api/proxy/{ONE}/slots", headers={"X-Api-Key": KEY})
    assert openai_failure(refused, 403, "forbidden")["message"].startswith("/slots of a server is for admins")
    asked = await api.ask("GET", f"/api/proxy/{ONE}/slots", headers={"X-Api-Key": OTHER})
    openai_failure(asked, 503, "service_unavailable")


@ONE_LISTENER
async def test_no_server_is_told_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve(ONE)
    await started(api)
    heard = asyncio.Queue[bytes]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.put_nowait(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    there = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
    monkeypatch.setattr(type(api.services.servers), "reach_if_ready", lambda *_: there)
    try:
        for path in ("/v1/messages", f"/api/proxy/{ONE}/v1/messages"):
            headers = {"X-Api-Key": KEY, "Authorization": f"Bearer {KEY}", "Anthropic-Version": "2023-06-01"}
            assert (await api.ask("POST", path, {"model": ONE}, headers=headers)).status == 200
            told = await asyncio.wait_for(heard.get(), 10)
            assert b"2023-06-01" in told
            assert KEY.encode() not in told
            assert b"x-api-key" not in told.lower()
    finally:
        server.close()
        await server.wait_closed()
