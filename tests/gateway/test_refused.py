"""Requests that meet a server which has just ended, and took no connection of theirs, wait for it to be there again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from magi_agent.gateway import lanes as lanes_module
from magi_agent.gateway.relay import Relay, ServerUnreachable
from magi_agent.servers.servers import Servers
from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve
from tests.gateway.test_gateway import ONE, PROMPT, openai_failure, started
from tests.gateway.test_tiers import killed, main_pid

ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
POLICIES = pytest.mark.parametrize("policy", ["onDemand", "manual"])
Refusals = list[float]


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> Refusals:
    """When nobody took a connection at a server, for each time that a request met that."""
    met: Refusals = []
    pass_on = Relay.pass_on

    async def noted(relay: Relay, request: Any, model_id: str, *rest: Any) -> Any:
        try:
            return await pass_on(relay, request, model_id, *rest)
        except ServerUnreachable:
            met.append(time.monotonic())
            raise

    monkeypatch.setattr(Relay, "pass_on", noted)
    return met


@pytest.fixture
def notice_late(monkeypatch: pytest.MonkeyPatch, refusals: Refusals) -> Callable[[Api], None]:
    """Have nobody notice the end of a server for longer than a request needs to meet it."""

    def late(api: Api) -> None:
        there, read = api.services.servers.reach_if_ready(ONE), Servers.reach_if_ready
        assert there is not None

        def known(servers: Servers, model_id: str) -> Any:
            return read(servers, model_id) if refusals and time.monotonic() > refusals[0] + 0.3 else there

        monkeypatch.setattr(Servers, "reach_if_ready", known)

    return late


async def up(
    serve: Serve, policy: str, *, gateway_queue: str = "100", server_access: str = "port", **chosen: object
) -> Api:
    api = await serve(ONE, gateway_queue=gateway_queue, server_access=server_access)
    (await api.ask("PUT", f"/api/models/{ONE}/settings", {"startPolicy": policy, **chosen})).success()
    (await api.ask("PUT", f"/api/models/{ONE}/enabled", {"enabled": True})).success()
    await started(api)
    return api


def ask(api: Api, path: str = "/v1/completions", **more: object) -> asyncio.Task[Reply]:
    return asyncio.create_task(api.ask("POST", path, {"model": ONE, **PROMPT, **more}))


async def all_of(asking: list[asyncio.Task[Reply]]) -> list[Reply]:
    return list(await asyncio.wait_for(asyncio.gather(*asking), 60))


@ONE_LISTENER
@POLICIES
async def test_of_those_that_wait_only_the_one_at_work_meets_the_end(serve: Serve, policy: str) -> None:
    api = await up(serve, policy, maxConcurrent=1)
    lanes = api.services.lanes
    os.kill(main_pid(api, ONE), signal.SIGSTOP)
    asking = [ask(api, stream=number % 2 == 1) for number in range(20)]

    async def all_there() -> bool:
        return lanes.requests(ONE) == 20

    await until(all_there, "they wait", 10)
    await killed(api, ONE)
    replies = await all_of(asking)

    failed = [reply for reply in replies if reply.status != 200 or b'"error"' in reply.content]
    assert len(failed) == 1, [reply.content[:200] for reply in failed]
    openai_failure(failed[0], 502, "server_failed")
    assert lanes.is_idle(ONE)


@ONE_LISTENER
@POLICIES
@pytest.mark.parametrize("access", ["port", "socket"])
async def test_those_that_come_before_it_is_known_wait_and_are_answered(
    serve: Serve, refusals: Refusals, notice_late: Callable[[Api], None], policy: str, access: str
) -> None:
    api = await up(serve, policy, server_access=access)
    notice_late(api)
    await killed(api, ONE)
    paths = ["/v1/completions", f"/api/proxy/{ONE}/v1/completions"]

    replies = await all_of([ask(api, path, stream=is_stream) for path in paths * 5 for is_stream in (False, True)])

    assert refusals
    assert {reply.status for reply in replies} == {200}
    assert not any(b'"error"' in reply.content for reply in replies)
    # Who asked for a stream is told that it comes, as ever.
    assert any(reply.content.startswith(f": {ONE} is not ready yet\n".encode()) for reply in replies)
    assert api.services.lanes.is_idle(ONE)


@ONE_LISTENER
async def test_no_more_wait_than_may(serve: Serve, notice_late: Callable[[Api], None]) -> None:
    api = await up(serve, "manual", gateway_queue="0")
    notice_late(api)
    await killed(api, ONE)

    [reply] = await all_of([ask(api)])
    openai_failure(reply, 429, "queue_full")
    assert api.services.lanes.is_idle(ONE)


@ONE_LISTENER
async def test_one_that_only_looks_does_not_wait(
    serve: Serve, refusals: Refusals, notice_late: Callable[[Api], None]
) -> None:
    api = await up(serve, "manual")
    notice_late(api)
    await killed(api, ONE)

    reply = await asyncio.wait_for(api.ask("GET", f"/api/proxy/{ONE}/health"), 5)

    openai_failure(reply, 502, "server_failed")
    assert len(refusals) == 1


@ONE_LISTENER
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_is_never_known_is_an_error_after_a_while_and_nobody_is_asked_for_ever(
    serve: Serve, refusals: Refusals, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setattr(lanes_module, "_NOTICED_WITHIN", 0.5)
    api = await up(serve, "manual")
    there = api.services.servers.reach_if_ready(ONE)
    monkeypatch.setattr(Servers, "reach_if_ready", lambda *_: there)
    monkeypatch.setattr(Relay, "pass_on", nobody_there)
    lanes, model = api.services.lanes, api.services.registry.models[ONE]

    asking = ask(api, stream=is_stream)
    await until(lambda: _is(lanes.is_up(ONE), False), "it is known to be gone", 5)
    assert lanes.has_to_wait(model)
    [reply] = await all_of([asking])

    if is_stream:
        assert json.loads(reply.content.rpartition(b"data: ")[2])["error"]["code"] == "server_failed"
    else:
        openai_failure(reply, 502, "server_failed")
    await until(lambda: _is(lanes.is_up(ONE), True), "it may be asked again", 5)


async def nobody_there(*_: object) -> None:
    raise ServerUnreachable("nobody takes connections")


async def _is(value: bool, wanted: bool) -> bool:
    return value is wanted
