"""GET /api/events of a real agent, over both listeners: what is told, to whom, and where a client goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from magi_agent import events
from magi_agent.api import event_routes, streaming
from magi_agent.api.event_documents import TYPES
from magi_agent.events import ChoicesChanged, Event, ModelsChanged, ServerProgress
from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import EventType, TokenScope
from tests.api.client import Api
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel


@dataclass
class Heard:
    """A client of the stream, which reads it as the standard says."""

    answer: aiohttp.ClientResponse
    last_id: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)

    async def block(self) -> dict[str, str]:
        """The fields of the next block that is more than a comment."""
        fields: dict[str, str] = {}
        while True:
            async with asyncio.timeout(30):
                line = (await self.answer.content.readline()).decode()
            assert line.endswith("\n"), "the stream has ended"
            if line == "\n":
                if fields:
                    self.last_id = fields.get("id", self.last_id)
                    return fields
            elif not line.startswith(":"):
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value

    async def next(self) -> dict[str, Any]:
        """The next event's data."""
        while "data" not in (fields := await self.block()):
            pass
        event: dict[str, Any] = json.loads(fields["data"])
        assert (event["type"], event["id"]) == (fields["event"], fields["id"])
        assert event["at"].endswith("Z")
        assert list(event)[:3] == ["id", "type", "at"]
        self.seen.append(event)
        return event

    async def until(self, kind: str, **what: object) -> dict[str, Any]:
        """The next event of a kind with these values."""
        while True:
            event = await self.next()
            if event["type"] == kind and what.items() <= event.items():
                return event

    async def place(self) -> str:
        """Where the stream begins, which it says before anything else."""
        while not self.last_id:
            await self.block()
        return self.last_id


@contextlib.asynccontextmanager
async def listening(api: Api, query: str = "", **headers: str) -> AsyncIterator[Heard]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with api.session.get(f"{api.base}/api/events{query}", headers=named) as answer:
        assert answer.status == 200, await answer.read()
        assert answer.content_type == "text/event-stream"
        yield Heard(answer)


async def choose(api: Api, model_id: str, tier: str) -> None:
    (await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})).success()


async def test_a_servers_life_is_told(serve: Serve) -> None:
    api = await serve("api-one")
    async with listening(api) as heard:
        await heard.place()
        (await api.ask("POST", "/api/models/servers/api-one/start?wait=60")).success()
        ready = await heard.until("serverChanged", after="ready")
        assert ready["modelId"] == "api-one"
        assert ready["failure"] is None
        (await api.ask("POST", "/api/models/servers/api-one/stop?wait=60")).success()
        await heard.until("serverChanged", after="stopped")
    states = [event["after"] for event in heard.seen if event["type"] == "serverChanged"]
    assert not any(event.get("forced") for event in heard.seen)
    assert states == ["starting", "loading", "ready", "stopping", "stopped"]
    numbers = [int(event["id"].rpartition("-")[2]) for event in heard.seen]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "none is missing, in order"


async def test_a_start_by_force_is_told_as_one(serve: Serve) -> None:
    api = await serve("api-one", "api-two", memory_reserve="1000T")
    async with listening(api, "?types=serverChanged&modelId=api-one") as heard:
        await heard.place()
        (await api.ask("POST", "/api/models/servers/api-one/start?wait=60&force=true")).success()
        ready = await heard.until("serverChanged", after="ready")
    told = [(event["after"], event["forced"]) for event in heard.seen]
    assert told == [("starting", True), ("loading", True), ("ready", False)]
    assert list(ready)[-2:] == ["failure", "forced"]


async def test_a_server_that_dies_is_told_with_the_reason(serve: Serve) -> None:
    api = await serve("api-one")
    server = (await api.ask("POST", "/api/models/servers/api-one/start?wait=60")).success()["server"]
    async with listening(api) as heard:
        await heard.place()
        os.kill(server["pid"], signal.SIGKILL)
        died = await heard.next()
        while died["type"] != "serverChanged":
            died = await heard.next()
        assert (died["before"], died["after"]) == ("ready", "starting")
        assert died["failure"] == {"result": "signal", "message": "it was ended by SIGKILL"}
        assert (await heard.until("serverChanged", after="ready"))["failure"] is None


async def test_a_server_that_cannot_run_is_told_with_the_reason(serve: Serve, models: Path) -> None:
    api = await serve("api-one")
    (await api.ask("PUT", "/api/models/api-one/settings", {"ctxSize": 64, "nGpuLayers": 0})).success()
    (models / "api-one.gguf").write_bytes((models / "api-one.gguf").read_bytes()[:-2000])
    (await api.ask("POST", "/api/models/rescan")).success()
    async with listening(api) as heard:
        await heard.place()
        await api.services.servers._desired.wish(["api-one"], run=True, by="test")
        failed = await heard.until("serverChanged", after="cooldown")
        assert failed["failure"]["result"] == "not-usable"
        assert failed["failure"]["message"]


async def test_a_start_anew_is_not_told_with_what_the_last_run_failed_with(
    serve: Serve, models: Path, toy_model: MakeToyModel
) -> None:
    api = await serve("api-one")
    toy_model(models / "api-broken.gguf", architecture="nonesuch")
    (await api.ask("POST", "/api/models/rescan")).success()
    start = "/api/models/servers/api-broken/start"
    async with listening(api, "?types=serverChanged") as heard:
        await heard.place()
        (await api.ask("POST", start)).success(202)
        failed = await heard.until("serverChanged", after="cooldown")
        assert failed["failure"]["result"] == "exit-code"
        (await api.ask("POST", start)).success(202)
        again = await heard.until("serverChanged", before="cooldown")
        assert (again["after"], again["failure"]) == ("starting", None)
        # systemd's own starts, after it has died, are told with it.
        died = await heard.until("serverChanged", before="loading")
        assert (died["after"], died["failure"]["result"]) == ("starting", "exit-code")
    (await api.ask("POST", "/api/models/servers/api-broken/stop?wait=60")).success()


async def held_while_it_loads(api: Api, heard: Heard) -> int:
    """The process of a server that is started, and was stopped before it was ready; a busy machine may be too late."""
    server = "/api/models/servers/api-one"
    for _ in range(10):
        (await api.ask("POST", f"{server}/start")).success(202)
        await heard.until("serverChanged", after="loading")
        pid = int((await api.get(server))["pid"])
        os.kill(pid, signal.SIGSTOP)
        if (await api.get(server))["state"] == "loading":
            return pid
        os.kill(pid, signal.SIGCONT)
        (await api.ask("POST", f"{server}/stop?wait=60")).success()
    pytest.fail("it was always ready before it was stopped")


async def test_a_server_that_loads_is_told_how_far_it_is(serve: Serve) -> None:
    api = await serve("api-one")
    async with listening(api) as heard:
        await heard.place()
        pid = await held_while_it_loads(api, heard)
        try:
            first = await heard.until("serverProgress")
            second = await heard.until("serverProgress")
        finally:
            os.kill(pid, signal.SIGCONT)
        await heard.until("serverChanged", after="ready")
    assert 0 < first["elapsedSeconds"] < second["elapsedSeconds"]
    assert first["modelId"] == "api-one"
    assert first["modelBytes"] == (await api.model("api-one"))["sizeBytes"]
    assert first["cpuSeconds"] is not None


async def test_what_is_found_chosen_and_activated_is_told(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    api = await serve("api-one")
    async with listening(api) as heard:
        await heard.place()
        toy_model(models / "api-two.gguf")
        (await api.ask("POST", "/api/models/rescan")).success()
        found = await heard.until("modelsChanged")
        assert (found["added"], found["changed"], found["removed"], found["unlisted"]) == (["api-two"], [], [], 0)
        await choose(api, "api-one", "fast")
        assert (await heard.until("choicesChanged"))["modelId"] == "api-one"
        (await api.ask("POST", "/api/models/profiles", {"name": "day"})).success(201)
        assert (await heard.until("profilesChanged"))["name"] == "day"
        (await api.ask("POST", "/api/models/profiles/day/activate")).success()
        activated = await heard.until("profileActivated")
        assert activated["name"] == "day"
        assert activated["by"]
        (await api.ask("PUT", "/api/drain", {"draining": True})).success()
        assert (await heard.until("drainChanged"))["draining"] is True
        (await api.ask("PUT", "/api/drain", {"draining": True})).success()
        (await api.ask("PUT", "/api/drain", {"draining": False})).success()
        assert (await heard.until("drainChanged"))["draining"] is False
        await api.agent.reload()
        assert (await heard.until("configurationReloaded"))["changed"] == []
    kinds = [event["type"] for event in heard.seen]
    assert kinds.count("drainChanged") == 2, "to say again what holds is no change"
    assert kinds.count("profilesChanged") == 1


async def test_an_operation_that_ends_is_told(serve: Serve) -> None:
    api = await serve("api-one")
    (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})).success()
    async with listening(api, "?modelId=api-one&types=operationFinished") as heard:
        await heard.place()
        begun = (await api.ask("POST", "/api/models/servers/start-all")).success(202)
        ended = await heard.next()
    assert ended["operationId"] == begun["id"]
    assert (ended["kind"], ended["succeeded"]) == ("start-all", True)


async def test_a_client_goes_on_where_it_was(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    async with listening(api) as heard:
        await choose(api, "api-one", "fast")
        event = await heard.until("choicesChanged")
    await choose(api, "api-two", "fast")
    await choose(api, "api-one", "balanced")
    for query, header in (("", event["id"]), (f"?lastEventId={event['id']}", "")):
        async with listening(api, query, **({"Last_Event_ID": header} if header else {})) as again:
            missed = [await again.next(), await again.next()]
        assert [event["modelId"] for event in missed] == ["api-two", "api-one"]


async def test_a_client_that_heard_nothing_misses_nothing(serve: Serve) -> None:
    api = await serve("api-one")
    async with listening(api) as heard:
        place = await heard.place()
    await choose(api, "api-one", "fast")
    async with listening(api, Last_Event_ID=place) as again:
        assert (await again.next())["modelId"] == "api-one"


async def test_the_header_wins_over_the_query(serve: Serve) -> None:
    """A browser that connects again has the address of the beginning, and the header of now."""
    api = await serve("api-one")
    async with listening(api) as heard:
        beginning = await heard.place()
        await choose(api, "api-one", "fast")
        now = (await heard.until("choicesChanged"))["id"]
    await choose(api, "api-one", "balanced")
    async with listening(api, f"?lastEventId={beginning}", Last_Event_ID=now) as again:
        event = await again.next()
        assert event["id"] != now
        assert event["type"] == "choicesChanged"
        assert not await nothing_more(again)


async def nothing_more(heard: Heard) -> list[dict[str, Any]]:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            return [await heard.next()]
    return []


@pytest.mark.parametrize(
    ("last_id", "reason"),
    [
        ("0000ffff-1", "agentRestarted"),
        ("{life}-999999999999", "unknownId"),
        ("{life}-9999999999999999999999", "unknownId"),
        ("nonsense", "unknownId"),
        ("{life}-1", "tooOld"),
    ],
)
async def test_what_is_missing_is_said(serve: Serve, last_id: str, reason: str) -> None:
    api = await serve("api-one")
    stream = api.services.events
    for _ in range(1100):
        stream.publish(ChoicesChanged(model_id="api-one"))
    async with listening(api, Last_Event_ID=last_id.format(life=stream.life)) as heard:
        gap = await heard.next()
        assert (gap["type"], gap["reason"]) == ("gap", reason)
        assert "ask for it again" in gap["message"]
        assert gap["id"] == f"{stream.life}-{stream.last}", "and it goes on from now"
        await choose(api, "api-one", "fast")
        assert (await heard.next())["type"] == "choicesChanged"


async def test_who_is_too_slow_is_told_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve("api-one")
    stream = api.services.events
    async with listening(api) as heard:
        await heard.place()
        for _ in range(1500):
            stream.publish(ChoicesChanged(model_id="api-one"))
        assert [(await heard.next())["type"] for _ in range(1)] == ["gap"]
        assert heard.seen[-1]["reason"] == "tooSlow"
        stream.publish(ChoicesChanged(model_id="api-two"))
        assert (await heard.next())["modelId"] == "api-two"


async def test_only_what_was_asked_for(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    async with (
        listening(api, "?types=choicesChanged,drainChanged") as kinds,
        listening(api, "?modelId=api-two") as models,
        listening(api, "?types=choicesChanged&modelId=api-one&modelId=api-two") as both,
    ):
        for heard in (kinds, models, both):
            await heard.place()
        await api.agent.reload()
        await choose(api, "api-one", "fast")
        await choose(api, "api-two", "fast")
        assert [(await kinds.next())["modelId"] for _ in range(2)] == ["api-one", "api-two"]
        assert (await models.next())["modelId"] == "api-two"
        assert [(await both.next())["modelId"] for _ in range(2)] == ["api-one", "api-two"]


async def test_who_asked_for_little_is_told_where_it_stands(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its last id would be too old one day, and nothing was missed."""
    monkeypatch.setattr(event_routes, "_PASSED_OVER", 5)
    api = await serve("api-one")
    async with listening(api, "?types=drainChanged") as heard:
        place = await heard.place()
        for _ in range(11):
            api.services.events.publish(ChoicesChanged(model_id="api-one"))
        first, second = await heard.block(), await heard.block()
    number = int(place.rpartition("-")[2])
    assert [fields["id"] for fields in (first, second)] == [
        f"{api.services.events.life}-{number + passed}" for passed in (5, 10)
    ]
    assert "data" not in first


async def test_progress_of_before_is_no_news(serve: Serve) -> None:
    api = await serve("api-one")
    stream = api.services.events
    place = f"{stream.life}-{stream.last}"
    stream.publish(ServerProgress(model_id="api-one", elapsed_seconds=1.0))
    stream.publish(ChoicesChanged(model_id="api-one"))
    async with listening(api, Last_Event_ID=place) as heard:
        assert (await heard.next())["type"] == "choicesChanged"
        stream.publish(ServerProgress(model_id="api-one", elapsed_seconds=2.0))
        assert (await heard.next())["elapsedSeconds"] == 2.0


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?types=serverChanged,nothing", "types"),
        ("?types=gap", "types"),
        ("?" + "&".join(f"modelId=m{number}" for number in range(101)), "modelId"),
    ],
)
async def test_what_cannot_be_asked_for(serve: Serve, query: str, field: str) -> None:
    api = await serve()
    details = (await api.ask("GET", f"/api/events{query}")).failure(422, "ValidationError")
    assert details["errors"][0]["field"] == field


async def test_a_large_scan_is_told_within_bounds(serve: Serve) -> None:
    api = await serve()
    async with listening(api) as heard:
        await heard.place()
        ids = tuple(f"model-{number}" for number in range(20_000))
        api.services.events.publish(ModelsChanged(added=ids, removed=ids[:3]))
        event = await heard.until("modelsChanged")
    assert event["added"] == list(ids[:500])
    assert event["unlisted"] == 19_500
    assert event["removed"] == list(ids[:3])


async def test_lines_of_json_say_the_same(serve: Serve) -> None:
    api = await serve("api-one")
    headers = {"Accept": "application/x-ndjson"}
    async with api.session.get(f"{api.base}/api/events", headers=headers) as answer:
        assert answer.content_type == "application/x-ndjson"
        assert await answer.content.readline() == b"\n"
        await choose(api, "api-one", "fast")
        event = json.loads(await answer.content.readline())
    assert (event["type"], event["modelId"]) == ("choicesChanged", "api-one")
    assert event["id"].startswith(api.services.events.life)


async def test_a_page_of_an_allowed_site_may_listen(serve: Serve) -> None:
    api = await serve("api-one", cors_origins="https://ui.example")
    async with listening(api, Origin="https://ui.example") as heard:
        assert heard.answer.headers["Access-Control-Allow-Origin"] == "https://ui.example"
    asked = {
        "Origin": "https://ui.example",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization,last-event-id",
    }
    preflight = await api.ask("OPTIONS", "/api/events", headers=asked)
    assert "Last-Event-ID" in preflight.headers["Access-Control-Allow-Headers"]


async def test_one_user_has_no_more_than_a_share(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ANY", streaming.Share("streams", 2))
    secret = new_secret()
    (tmp_path / "tokens").write_text(f"{line_of(Token('page', TokenScope.READ, digest_of(secret)))}\n")
    api = await serve("api-one")
    async with listening(api), listening(api):
        refused = await api.ask("GET", "/api/events")
        assert refused.failure(429, "TooManyStreams") == {"most": 2, "of": f"uid {os.geteuid()}"}
        assert refused.headers["Retry-After"] == "5"
        async with listening(api, Authorization=f"Bearer {secret}") as heard:
            await heard.place()


async def test_who_may_not_read_hears_nothing(serve: Serve) -> None:
    api = await serve(tcp_access="none")
    reply = await api.ask("GET", "/api/events", headers={"X-Forwarded-For": "10.0.0.1"})
    reply.failure(401, "Unauthorized")


async def test_who_may_not_read_any_more_hears_no_more(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is revoked ends what it has opened."""
    monkeypatch.setattr(streaming, "_KEEP_ALIVE", 0.1)
    secret = new_secret()
    written = f"{line_of(Token('page', TokenScope.READ, digest_of(secret)))}\n"
    (tmp_path / "tokens").write_text(written)
    api = await serve("api-one")
    async with listening(api, Authorization=f"Bearer {secret}") as heard:
        await choose(api, "api-one", "fast")
        await heard.until("choicesChanged")
        (tmp_path / "tokens").write_text("")
        await api.agent.reload()
        async with asyncio.timeout(30):
            await heard.answer.content.read()
    refused = await api.ask("GET", "/api/events", headers={"Authorization": f"Bearer {secret}"})
    refused.failure(401, "Unauthorized")


async def test_the_document_says_what_is_streamed(serve: Serve) -> None:
    api = await serve()
    document = await api.get("/api/openapi.json")
    operation = document["paths"]["/api/events"]["get"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"text/event-stream", "application/x-ndjson"}
    for form in content.values():
        assert form["x-itemSchema"] == {"$ref": "#/components/schemas/EventAnswer"}
    kinds = document["components"]["schemas"]["EventAnswer"]["discriminator"]["mapping"]
    assert set(kinds) == {*EventType, "gap"}
    assert [parameter["name"] for parameter in operation["parameters"]] == [
        "types",
        "modelId",
        "lastEventId",
        "Last-Event-ID",
    ]


async def test_the_agent_stops_at_once_whoever_listens(serve: Serve) -> None:
    api = await serve("api-one")
    async with contextlib.AsyncExitStack() as all_of_them:
        heard = [await all_of_them.enter_async_context(listening(api)) for _ in range(20)]
        for one in heard:
            await one.place()
        began = asyncio.get_running_loop().time()
        await api.agent.stop()
        assert asyncio.get_running_loop().time() - began < 3.0
        for one in heard:
            async with asyncio.timeout(30):
                await one.answer.content.read()


def test_every_event_has_a_form_on_the_wire() -> None:
    assert {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)} - {
        Event
    } == set(TYPES)
