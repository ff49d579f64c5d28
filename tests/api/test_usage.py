"""GET /api/usage, with real servers that work, and with one that does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp
import pytest

from magi_agent.servers.reach import Reach
from magi_agent.servers.self_reports import SelfReports
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel


async def usage(api: Api, model_id: str) -> dict[str, object]:
    servers = {server["modelId"]: server for server in (await api.get("/api/usage"))["servers"]}
    found: dict[str, object] = servers[model_id]
    return found


async def started(api: Api, model_id: str) -> dict[str, object]:
    begun = (await api.ask("POST", f"/api/models/servers/{model_id}/start?wait=60")).success()
    server: dict[str, object] = begun["server"]
    return server


async def test_a_server_that_works(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "api-one.gguf", context_length=65_536)
    api = await serve()
    (await api.ask("PUT", "/api/models/api-one/settings", {"parallelSlots": 2, "ctxSize": 65_536})).success()
    server = await started(api, "api-one")
    idle = await usage(api, "api-one")
    assert (idle["state"], idle["problem"]) == ("ready", None)
    assert (idle["slotsTotal"], idle["slotsBusy"], idle["requestsWaiting"]) == (2, 0, 0)
    assert (idle["promptTokens"], idle["generatedTokens"]) == (0, 0)
    assert idle["memoryBytes"]

    asked = {"prompt": "once", "n_predict": 1_000_000, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{server['url']}/completion", json=asked) as answer:
        assert await answer.content.readline()

        async def counts() -> bool:
            now = await usage(api, "api-one")
            return now["slotsBusy"] == 1 and isinstance(now["generatedTokens"], int) and now["generatedTokens"] > 0

        await until(counts, "tokens", 8.0)


async def test_a_server_that_does_not_answer_holds_nobody_up(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    pid = int(str((await started(api, "api-one"))["pid"]))
    await started(api, "api-two")
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        both = {server["modelId"]: server for server in (await api.get("/api/usage"))["servers"]}
        assert time.monotonic() - began < 10
    finally:
        os.kill(pid, signal.SIGCONT)
    assert both["api-one"]["slotsTotal"] is None
    assert both["api-one"]["problem"] == "it did not say how busy it is: it takes too long"
    assert both["api-one"]["memoryBytes"]
    assert (both["api-two"]["slotsBusy"], both["api-two"]["problem"]) == (0, None)


async def test_a_server_is_asked_no_more_often_than_is_good_for_it(serve: Serve) -> None:
    api = await serve("api-one")
    await started(api, "api-one")
    first = await asyncio.gather(*(api.get("/api/usage") for _ in range(20)))
    assert len({answer["at"] for answer in first}) == 1
    await asyncio.sleep(2.1)
    assert (await api.get("/api/usage"))["at"] > first[0]["at"]


async def test_usage_and_metrics_have_a_server_asked_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve("api-one")
    await started(api, "api-one")
    asked: list[str] = []
    fetch = SelfReports._fetch

    async def counted(self: SelfReports, reach: Reach, path: str) -> tuple[int, bytes | None]:
        asked.append(path)
        return await fetch(self, reach, path)

    monkeypatch.setattr(SelfReports, "_fetch", counted)
    told, scraped = await asyncio.gather(usage(api, "api-one"), api.ask("GET", "/metrics"))

    assert (told["generatedTokens"], told["problem"]) == (0, None)
    assert b'llamacpp:tokens_predicted_total{model="api-one"} 0.0' in scraped.content
    assert asked.count("/slots") == 1
    assert asked.count("/metrics") <= 2, "the second where slots were not wanted yet when the first was asked"

    asked.clear()
    await asyncio.sleep(2.1)
    await api.ask("GET", "/metrics")
    await usage(api, "api-one")
    assert sorted(asked) == ["/metrics", "/slots"]


async def test_a_server_that_is_not_ready_has_no_figures_of_its_own(serve: Serve) -> None:
    api = await serve("api-one")
    assert (await api.get("/api/usage"))["servers"] == []
    await started(api, "api-one")
    await usage(api, "api-one")
    (await api.ask("PUT", "/api/models/api-one/settings", {"ctxSize": 1024})).success()
    pid = int(str((await api.get("/api/models/servers/api-one"))["pid"]))
    os.kill(pid, signal.SIGKILL)
    await api.until_state("api-one", "starting", "loading")
    told = await usage(api, "api-one")
    assert told["state"] in ("starting", "loading", "ready")
    if told["state"] != "ready":
        assert told["slotsTotal"] is None
    await api.until_state("api-one", "ready")
