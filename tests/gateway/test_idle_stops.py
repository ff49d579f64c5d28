"""Servers that were started for requests leave when nobody asks them anything, and never under somebody's hands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from magi_agent.gateway.awaited import AwaitedAnswer
from magi_agent.gateway.relay import Relay, ServerAnswer
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.conftest import SampleModels
from tests.gateway.test_gateway import openai_failure

MODEL = "api-idle"
PROMPT = {"model": MODEL, "prompt": "a", "max_tokens": 2, "temperature": 0}
RACES = int(os.environ.get("MAGI_TEST_IDLE_RACES", "40"))
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


async def on_demand(api: Api, idle_timeout: int | None) -> None:
    settings = {"startPolicy": "onDemand", "idleTimeoutSeconds": idle_timeout}
    await api.ask("PUT", f"/api/models/{MODEL}/settings", settings)
    await api.ask("PUT", f"/api/models/{MODEL}/enabled", {"enabled": True})


async def state(api: Api) -> str:
    return str(api.services.servers.state(MODEL))


async def is_unused(api: Api) -> bool:
    return api.services.lanes.is_idle(MODEL)


async def is_stopped(api: Api) -> bool:
    return await state(api) == "stopped"


@ONE_LISTENER
async def test_one_that_nobody_asks_anything_is_stopped_and_started_for_the_next(serve: Serve) -> None:
    api = await serve(MODEL)
    await on_demand(api, 1)

    for _ in range(2):
        (await api.ask("POST", "/v1/completions", PROMPT)).success()
        answered = time.monotonic()
        assert await state(api) == "ready"
        await until(lambda: is_stopped(api), "it is stopped", 20)
        assert 0.9 < time.monotonic() - answered < 6

    wish = api.agent._desired[MODEL]
    assert wish is not None
    assert (wish.run, wish.by) == (False, "idle timeout")


@ONE_LISTENER
async def test_an_answer_that_goes_on_is_use(serve: Serve, models: Path, sample_models: SampleModels) -> None:
    # A toy would be through with it at once.
    shutil.copyfile(sample_models.smollm2, models / f"{MODEL}.gguf")
    api = await serve()
    await on_demand(api, 1)
    body = {**PROMPT, "stream": True, "max_tokens": 6000, "ignore_eos": True}

    async with api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        while not (await answer.content.readany()).startswith(b"data: "):
            pass  # it is not ready yet
        until_then = time.monotonic() + 3
        while time.monotonic() < until_then:
            assert await answer.content.readany()
        assert await state(api) == "ready"
        answer.close()

    await until(lambda: is_stopped(api), "it is stopped", 30)


@ONE_LISTENER
async def test_a_client_that_leaves_as_the_answer_comes_is_no_use_for_ever(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve(MODEL)
    await on_demand(api, None)

    async def too_late(_: AwaitedAnswer, __: bytes) -> None:
        await asyncio.sleep(2)
        raise ConnectionResetError("the client left")

    # Kept, as a traceback would: what goes by itself when nobody knows of it any more says nothing.
    kept: list[ServerAnswer] = []
    pass_on = Relay.pass_on

    async def and_keep(relay: Relay, *asked: Any) -> ServerAnswer:
        kept.append(await pass_on(relay, *asked))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(AwaitedAnswer, "write", too_late)
        patch.setattr(Relay, "pass_on", and_keep)
        async with api.session.post(f"{api.base}/v1/completions", json={**PROMPT, "stream": True}) as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()

    assert len(kept) == 1
    await until(lambda: is_unused(api), "nobody uses it any more", 5)


@ONE_LISTENER
async def test_a_client_that_leaves_right_after_the_answer_is_no_use_for_ever(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end comes to be known while what asked is let go of."""
    api = await serve(MODEL)
    await on_demand(api, None)
    pass_on = AwaitedAnswer._pass_on
    left: list[bool] = []
    kept: list[ServerAnswer] = []

    async def and_be_left(awaited: AwaitedAnswer, said: ServerAnswer, request: Any) -> None:
        await pass_on(awaited, said, request)
        task = asyncio.current_task()
        assert task is not None
        kept.append(said)
        left.append(asyncio.get_running_loop().call_soon(task.cancel) is not None)

    with monkeypatch.context() as patch:
        patch.setattr(AwaitedAnswer, "_pass_on", and_be_left)
        with contextlib.suppress(aiohttp.ClientError):
            async with api.session.post(f"{api.base}/v1/completions", json={**PROMPT, "stream": True}) as answer:
                await answer.content.read()

    assert left == [True]
    await until(lambda: is_unused(api), "nobody uses it any more", 5)


@ONE_LISTENER
async def test_use_of_its_own_port_is_use(serve: Serve) -> None:
    api = await serve(MODEL)
    # On a busy machine, a second without a request may pass by itself.
    await on_demand(api, 3)
    (await api.ask("POST", "/v1/completions", PROMPT)).success()
    url = (await api.get(f"/api/models/servers/{MODEL}"))["url"]

    async with aiohttp.ClientSession() as direct:
        for _ in range(35):
            async with direct.post(f"{url}/completion", json=PROMPT) as said:
                assert said.status == 200
            await asyncio.sleep(0.2)

    assert await state(api) == "ready"
    await until(lambda: is_stopped(api), "it is stopped", 30)


@ONE_LISTENER
async def test_a_monitor_starts_nothing_and_keeps_nothing_up(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    api = await serve(MODEL)
    await on_demand(api, 1)
    looks = [f"/api/proxy/{MODEL}{path}" for path in ("/health", "/props", "/slots", "/metrics", "/v1/models")]

    for look in looks:
        reply = await asyncio.wait_for(api.ask("GET", look), 1)
        assert openai_failure(reply, 503, "service_unavailable")["message"].startswith(f"model {MODEL} is stopped")
        assert (await asyncio.wait_for(api.ask("HEAD", look), 1)).status == 503
    assert await state(api) == "stopped"
    assert api.agent._desired[MODEL] is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "one a look"

    (await api.ask("POST", "/v1/completions", PROMPT)).success()
    answered, seen = time.monotonic(), 0
    while await state(api) == "ready":
        for look in looks:
            seen += (await api.ask("GET", look)).status == 200
            reply = await api.ask("HEAD", look)
            assert (reply.status in {200, 503}, reply.content) == (True, b"")
        assert time.monotonic() - answered < 10, "it is kept up"
        await asyncio.sleep(0.1)
    assert seen >= len(looks)
    await until(lambda: is_stopped(api), "it is stopped", 20)
    assert (await api.ask("GET", looks[0])).status == 503
    assert await state(api) == "stopped"


@ONE_LISTENER
async def test_a_look_waits_for_nobodys_turn(serve: Serve) -> None:
    api = await serve(MODEL)
    await on_demand(api, None)
    await api.ask("PUT", f"/api/models/{MODEL}/settings", {"startPolicy": "onDemand", "maxConcurrent": 1})
    (await api.ask("POST", "/v1/completions", PROMPT)).success()

    async with api.services.lanes.entered(api.services.registry.models[MODEL]):
        assert (await asyncio.wait_for(api.ask("GET", f"/api/proxy/{MODEL}/health"), 5)).status == 200


@ONE_LISTENER
async def test_one_without_such_a_timeout_or_for_other_than_requests_stays(serve: Serve) -> None:
    api = await serve(MODEL)
    await on_demand(api, 1)
    await api.ask("PUT", f"/api/models/{MODEL}/settings", {"idleTimeoutSeconds": 1})
    (await api.ask("POST", f"/api/models/servers/{MODEL}/start?wait=60")).success()
    await asyncio.sleep(3)
    assert await state(api) == "ready"

    await on_demand(api, None)
    await asyncio.sleep(2)
    assert await state(api) == "ready"
    # A timeout that is chosen while it runs holds.
    await on_demand(api, 1)
    await until(lambda: is_stopped(api), "it is stopped", 20)


@ONE_LISTENER
@pytest.mark.timeout(60 + RACES)
async def test_a_request_that_races_the_stop_is_answered(serve: Serve) -> None:
    api = await serve(MODEL)
    await on_demand(api, None)
    seed = int(os.environ.get("MAGI_TEST_SEED", str(random.randrange(1_000_000))))
    print(f"MAGI_TEST_SEED={seed}")
    rng = random.Random(seed)
    stops = api.agent._idle_stops

    async def ask(after: float) -> None:
        await asyncio.sleep(after)
        (await api.ask("POST", "/v1/completions", PROMPT)).success()

    for _ in range(RACES):
        await ask(0)
        stop = asyncio.create_task(stops._stop(MODEL, 1.0))
        await asyncio.gather(stop, *(ask(rng.uniform(0, 0.05)) for _ in range(3)))
