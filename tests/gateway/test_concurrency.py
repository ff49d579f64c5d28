"""No more requests at once than a model may be given."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from typing import Any

import pytest

from magi_agent.errors import ServiceUnavailable
from magi_agent.gateway.lanes import Lanes
from magi_agent.gateway.relay import Relay
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.gateway.test_gateway import PROMPT, openai_failure, started

MODEL = "api-many"
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


async def configured(api: Api, **settings: object) -> None:
    (await api.ask("PUT", f"/api/models/{MODEL}/settings", {"startPolicy": "onDemand", **settings})).success()
    (await api.ask("PUT", f"/api/models/{MODEL}/enabled", {"enabled": True})).success()


async def ask(api: Api, **body: object) -> Any:
    return (await api.ask("POST", "/v1/completions", {"model": MODEL, **PROMPT, **body})).success()


async def waiting(api: Api, number: int) -> None:
    async def wait() -> bool:
        lanes = api.services.lanes
        return lanes.requests(MODEL) - lanes.asking(MODEL) == number

    await until(wait, f"{number} requests wait", 10)


@ONE_LISTENER
@pytest.mark.parametrize("policy", ["onDemand", "manual"])
async def test_so_many_are_let_through_and_all_are_answered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    api = await serve(MODEL)
    await configured(api, startPolicy=policy, maxConcurrent=2, parallelSlots=4)
    if policy == "manual":
        await started(api, MODEL)
    seen, pass_on = [], Relay.pass_on

    async def counted(relay: Relay, *arguments: Any) -> Any:
        seen.append(api.services.lanes.asking(MODEL))
        return await pass_on(relay, *arguments)

    monkeypatch.setattr(Relay, "pass_on", counted)
    await asyncio.gather(*(ask(api) for _ in range(40)))

    assert len(seen) == 40
    assert max(seen) == 2
    assert api.services.lanes.is_idle(MODEL)


@ONE_LISTENER
async def test_they_go_on_in_order_and_one_that_leaves_frees_its_place(serve: Serve) -> None:
    api = await serve(MODEL)
    await configured(api, maxConcurrent=1)
    await started(api, MODEL)
    lanes, model = api.services.lanes, api.services.registry.models[MODEL]
    order: list[int] = []

    async def enter(number: int) -> None:
        async with lanes.entered(model):
            order.append(number)
            await asyncio.sleep(0)

    async with lanes.entered(model):
        tasks = [asyncio.create_task(enter(number)) for number in range(6)]
        await waiting(api, 6)
        tasks[2].cancel()
        await waiting(api, 5)
    await asyncio.gather(*tasks, return_exceptions=True)

    assert order == [0, 1, 3, 4, 5]
    assert lanes.is_idle(MODEL)


@ONE_LISTENER
async def test_one_that_leaves_as_it_is_let_through_keeps_no_place(serve: Serve) -> None:
    api = await serve(MODEL)
    await configured(api, maxConcurrent=1)
    await started(api, MODEL)
    lanes, model = api.services.lanes, api.services.registry.models[MODEL]

    async def enter() -> None:
        async with lanes.entered(model):
            pass

    async with lanes.entered(model):
        tasks = [asyncio.create_task(enter()) for _ in range(3)]
        await waiting(api, 3)
    # It was let through just now, and has not gone on yet.
    tasks[0].cancel()
    await asyncio.wait_for(asyncio.gather(*tasks[1:]), 10)
    with contextlib.suppress(asyncio.CancelledError):
        await tasks[0]

    assert lanes.is_idle(MODEL)


async def test_those_beyond_the_queue_are_told_so_and_those_that_stream_that_something_comes(serve: Serve) -> None:
    api = await serve(MODEL, gateway_queue="1")
    await configured(api, maxConcurrent=1)
    await started(api, MODEL)
    lanes, model = api.services.lanes, api.services.registry.models[MODEL]

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(lanes.entered(model))
        stream = await api.session.post(f"{api.base}/v1/completions", json={"model": MODEL, **PROMPT, "stream": True})
        assert (await stream.content.readline()).startswith(b": api-many is not ready yet")
        await waiting(api, 1)
        for body in ({}, {"stream": True}):
            reply = await api.ask("POST", "/v1/completions", {"model": MODEL, **PROMPT, **body})
            openai_failure(reply, 429, "queue_full")
            assert reply.headers["Retry-After"]
    assert (await stream.read()).endswith(b"data: [DONE]\n\n")


@ONE_LISTENER
async def test_a_client_that_leaves_while_it_waits_frees_its_place(serve: Serve) -> None:
    api = await serve(MODEL, gateway_queue="1")
    await configured(api, maxConcurrent=1)
    await started(api, MODEL)

    async with api.services.lanes.entered(api.services.registry.models[MODEL]):
        leaving = asyncio.create_task(ask(api))
        await waiting(api, 1)
        leaving.cancel()
        await waiting(api, 0)
        next_one = asyncio.create_task(ask(api))
        await waiting(api, 1)
    await next_one


@ONE_LISTENER
async def test_those_that_wait_are_served_before_the_model_leaves_and_who_comes_then_after(serve: Serve) -> None:
    api = await serve(MODEL)
    await configured(api, maxConcurrent=1)
    await started(api, MODEL)
    lanes, model = api.services.lanes, api.services.registry.models[MODEL]
    runs: list[str] = []

    async def enter() -> None:
        async with lanes.entered(model):
            runs.append(api.services.servers.ready()[MODEL].invocation_id)
            await asyncio.sleep(0.01)

    async with lanes.entered(model):
        earlier = [asyncio.create_task(enter()) for _ in range(4)]
        await waiting(api, 4)
        away = asyncio.create_task(lanes.send_away(MODEL, "test"))
        await until(lambda: _yields(lanes), "it is to leave", 10)
        later = [asyncio.create_task(enter()) for _ in range(2)]
        await waiting(api, 6)
        earlier[1].cancel()
        await waiting(api, 5)
    await asyncio.wait_for(asyncio.gather(away, *later, earlier[0], *earlier[2:]), 60)

    assert len(set(runs[:3])) == 1
    assert len(set(runs[3:])) == 1
    assert set(runs[:3]) != set(runs[3:])
    assert lanes.is_idle(MODEL)


async def _yields(lanes: Lanes) -> bool:
    return lanes._lanes[MODEL].yields


@ONE_LISTENER
async def test_those_that_wait_for_one_that_was_stopped_are_told_so_or_have_it_started(serve: Serve) -> None:
    api = await serve(MODEL)
    await configured(api, startPolicy="manual", maxConcurrent=1)
    await started(api, MODEL)
    lanes, model = api.services.lanes, api.services.registry.models[MODEL]

    async def enter() -> None:
        async with lanes.entered(model):
            pass

    async with lanes.entered(model):
        tasks = [asyncio.create_task(enter()) for _ in range(3)]
        await waiting(api, 3)
        (await api.ask("POST", f"/api/models/servers/{MODEL}/stop?wait=60")).success()
    told = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [type(each) for each in told] == [ServiceUnavailable] * 3

    await configured(api, maxConcurrent=1)
    model = api.services.registry.models[MODEL]
    async with lanes.entered(model):
        tasks = [asyncio.create_task(enter()) for _ in range(3)]
        await waiting(api, 3)
        (await api.ask("POST", f"/api/models/servers/{MODEL}/stop?wait=60")).success()
    await asyncio.wait_for(asyncio.gather(*tasks), 60)
    assert lanes.is_idle(MODEL)


@ONE_LISTENER
async def test_a_bound_that_is_taken_away_holds_no_longer(serve: Serve) -> None:
    api = await serve(MODEL)
    await configured(api, maxConcurrent=1)
    await started(api, MODEL)

    async with api.services.lanes.entered(api.services.registry.models[MODEL]):
        (await api.ask("PUT", f"/api/models/{MODEL}/settings", {"startPolicy": "onDemand"})).success()
        await asyncio.wait_for(ask(api), 20)
