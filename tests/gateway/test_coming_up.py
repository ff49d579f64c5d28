"""Requests for a model that somebody else has started, and that is not ready yet, wait for it, and change nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Protocol

import pytest

from magi_agent.servers.servers import Servers
from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve
from tests.gateway.test_gateway import ONE, PROMPT, openai_failure
from tests.servers.system import script

BODY = {"model": ONE, **PROMPT}
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


class Gate:
    """What a server waits for before it becomes a real llama-server, or fails."""

    def __init__(self, folder: Path, llama_server: Path) -> None:
        self.opened, self.failing = folder / "opened", folder / "failing"
        self.program = script(
            folder / "gated",
            f'[ $# -gt 2 ] || exec {llama_server} "$@"',
            f"until [ -e {self.opened} ]; do",
            f"[ ! -e {self.failing} ] || exit 3",
            "sleep 0.05",
            "done",
            f'exec {llama_server} "$@"',
        )


class Loading(Protocol):
    """Starts an agent whose model comes up, and does not get far before the gate is opened."""

    async def __call__(self, *, gateway_queue: str = "100") -> Api: ...


@pytest.fixture(params=["manual", "alwaysOn"])
def policy(request: pytest.FixtureRequest) -> str:
    """The model's startPolicy, which is none that starts it for requests."""
    return str(request.param)


@pytest.fixture
def gate(tmp_path: Path, llama_server: Path) -> Gate:
    return Gate(tmp_path, llama_server)


@pytest.fixture
def loading(serve: Serve, gate: Gate, policy: str) -> Loading:
    async def start(*, gateway_queue: str = "100") -> Api:
        api = await serve(ONE, llama_server_path=str(gate.program), gateway_queue=gateway_queue)
        await api.ask("PUT", f"/api/models/{ONE}/settings", {"startPolicy": policy})
        await api.ask("PUT", f"/api/models/{ONE}/enabled", {"enabled": True})
        (await api.ask("POST", f"/api/models/servers/{ONE}/start")).success(202)

        async def is_loading() -> bool:
            return api.services.servers.state(ONE) == "loading"

        await until(is_loading, "it loads", 20)
        return api

    return start


def ask(api: Api, **more: object) -> asyncio.Task[Reply]:
    return asyncio.create_task(api.ask("POST", "/v1/completions", {**BODY, **more}))


async def waiting(api: Api, number: int) -> None:
    async def wait() -> bool:
        return api.services.lanes.requests(ONE) == number

    await until(wait, f"{number} requests wait", 10)


@ONE_LISTENER
async def test_a_request_waits_for_it_and_is_answered(loading: Loading, gate: Gate) -> None:
    api = await loading()
    wish = api.agent._desired[ONE]

    tasks = [ask(api) for _ in range(3)]
    await waiting(api, 3)
    listed = (await asyncio.wait_for(api.get("/v1/models"), 2))["data"][0]
    assert (listed["id"], listed["state"]) == (ONE, "loading")
    assert not any(task.done() for task in tasks)
    gate.opened.touch()

    for task in tasks:
        assert (await asyncio.wait_for(task, 30)).success()["model"] == ONE
    assert api.agent._desired[ONE] == wish
    assert api.services.lanes.is_idle(ONE)


@ONE_LISTENER
async def test_a_stream_says_that_it_comes_and_has_its_answer(loading: Loading, gate: Gate) -> None:
    api = await loading()

    body = {**BODY, "stream": True}
    async with asyncio.timeout(30), api.session.post(f"{api.base}/v1/completions", json=body) as said:
        assert (said.status, said.content_type) == (200, "text/event-stream")
        assert await said.content.readline() == f": {ONE} is not ready yet\n".encode()
        gate.opened.touch()
        lines = [line async for line in said.content if line.strip()]

    assert lines[-1] == b"data: [DONE]\n"
    assert sum(line.startswith(b"data: {") for line in lines) >= 4


@ONE_LISTENER
async def test_where_it_fails_they_are_told_so_and_nobody_starts_it_again(
    loading: Loading, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await loading()
    starts: list[Any] = []
    monkeypatch.setattr(Servers, "start", lambda *asked, **how: starts.append((asked, how)))
    wish = api.agent._desired[ONE]
    plain, stream = ask(api), ask(api, stream=True)
    await waiting(api, 2)

    gate.failing.touch()
    reply = await asyncio.wait_for(plain, 60)
    streamed = (await asyncio.wait_for(stream, 10)).content
    (event,) = [line for line in streamed.split(b"\n") if line.startswith(b"data: ")]

    message = openai_failure(reply, 503, "service_unavailable")["message"]
    assert message == f"model {ONE} is {api.services.servers.state(ONE)}: magictl show {ONE} says why"
    assert reply.headers["Retry-After"]
    assert json.loads(event[6:])["error"]["message"] == message
    assert api.agent._desired[ONE] == wish
    # Who comes then does not wait, and starts nothing.
    openai_failure(await asyncio.wait_for(ask(api), 2), 503, "service_unavailable")
    assert starts == []


@ONE_LISTENER
async def test_where_it_is_stopped_they_are_told_so_at_once(loading: Loading) -> None:
    api = await loading()
    tasks = [ask(api), ask(api)]
    await waiting(api, 2)

    stop = asyncio.create_task(api.ask("POST", f"/api/models/servers/{ONE}/stop?wait=60"))
    for task in tasks:
        reply = await asyncio.wait_for(task, 3)
        message = openai_failure(reply, 503, "service_unavailable")["message"]
        assert message == f"model {ONE} was stopped before it was ready"
    (await stop).success()

    assert api.services.servers.state(ONE) == "stopped"
    assert not api.services.servers.is_wanted(ONE)
    assert api.services.lanes.is_idle(ONE)


@ONE_LISTENER
@pytest.mark.parametrize("policy", ["manual"], indirect=True)
async def test_no_more_wait_for_it_than_may(loading: Loading, gate: Gate) -> None:
    api = await loading(gateway_queue="2")
    tasks = [ask(api), ask(api, stream=True)]
    await waiting(api, 2)

    for more in ({}, {"stream": True}):
        openai_failure(await asyncio.wait_for(ask(api, **more), 2), 429, "queue_full")
    # Who leaves makes room for another.
    tasks.pop(0).cancel()
    await waiting(api, 1)
    tasks.append(ask(api))
    await waiting(api, 2)
    gate.opened.touch()

    assert [(await asyncio.wait_for(task, 30)).status for task in tasks] == [200, 200]
