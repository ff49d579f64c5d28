"""A draft by one tier, refined by another, on real servers."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from magi_agent.gateway import lanes as lanes_module
from magi_agent.gateway import staged
from magi_agent.gateway.awaited import AwaitedAnswer
from magi_agent.gateway.relay import Relay
from magi_agent.gateway.tallies import Tally
from magi_agent.gateway.two_stage import INSTRUCTION
from magi_agent.metrics import metrics as metrics_module
from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve, systemctl
from tests.api.test_metrics import scrape
from tests.conftest import MakeToyModel, SampleModels
from tests.gateway.test_gateway import openai_failure, started
from tests.gateway.test_gateway_metrics import of
from tests.gateway.test_room import CONTEXT, ROOM
from tests.gateway.test_tiers import killed

FIRST, SECOND, OTHER = "api-draft", "api-refine", "api-another"
HARD = "Prove step by step that the sum of two even numbers is even."
"""Worth the tier balanced."""
CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": HARD}], "max_tokens": 12}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
THINKS = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
BUDGET = 7
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
BOTH_FORMS = pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
Asked = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Which model was asked what, in order."""
    seen: Asked = []
    pass_on = Relay.pass_on

    async def noted(
        relay: Relay, request: Any, model_id: str, reach: Any, path: str, body: bytes | None, tally: Tally
    ) -> Any:
        seen.append((model_id, json.loads(body or b"null")))
        return await pass_on(relay, request, model_id, reach, path, body, tally)

    monkeypatch.setattr(Relay, "pass_on", noted)
    return seen


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What each model's server answered."""
    seen: dict[str, bytes] = {}
    keep = Tally.keep

    def noted(tally: Tally, piece: bytes) -> None:
        seen[tally._model_id] = seen.get(tally._model_id, b"") + piece
        keep(tally, piece)

    monkeypatch.setattr(Tally, "keep", noted)
    return seen


async def configured(api: Api, *, tiers: dict[str, str], budget: int = BUDGET, **settings: object) -> None:
    """Have each model in its tier, started for requests, and the profile active that drafts with fast ones."""
    for model_id, tier in tiers.items():
        await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})
        chosen = {"startPolicy": "onDemand", **settings}
        (await api.ask("PUT", f"/api/models/{model_id}/settings", chosen)).success()
    stages = {"enabled": True, "stage1Tier": "fast", "stage2Tier": "powerful", "stage1MaxTokens": budget}
    profile = {"name": "staged", "enabledModels": list(tiers), "twoStage": stages}
    assert (await api.ask("POST", "/api/models/profiles", profile)).status == 201
    (await api.ask("POST", "/api/models/profiles/staged/activate")).success()


@pytest.fixture
def pair(serve: Serve, models: Path, toy_model: MakeToyModel) -> Callable[..., Any]:
    """Starts an agent with a model for each stage; toys, unless a file is given."""

    async def start(first: Path | None = None, second: Path | None = None, **given: Any) -> Api:
        for model_id, file, seed in ((FIRST, first, 1), (SECOND, second, 2)):
            if file is None:
                toy_model(models / f"{model_id}.gguf", chat_template=TEMPLATE, seed=seed, context_length=8192)
            else:
                shutil.copyfile(file, models / f"{model_id}.gguf")
                with (models / f"{model_id}.gguf").open("ab") as copy:
                    copy.write(model_id.encode())
        api = await serve()
        await configured(api, tiers={FIRST: "fast", SECOND: "powerful"}, **given)
        for model_id in (FIRST, SECOND):
            await started(api, model_id)
        return api

    return start


def events(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in content.split(b"\n") if line.startswith(b"data: {")]


def told(content: bytes, name: str) -> str:
    """All that a stream tells in one field of its deltas."""
    deltas = [choice["delta"] for event in events(content) for choice in event.get("choices", [])]
    return "".join(delta.get(name) or "" for delta in deltas)


def answer_in(reply: Reply, is_stream: bool) -> str:
    assert reply.status == 200, reply.content[:2000]
    return told(reply.content, "content") if is_stream else reply.body["choices"][0]["message"]["content"]


def ids(asked: Asked) -> list[str]:
    return [model_id for model_id, _ in asked]


def is_of_draft(event: dict[str, Any]) -> bool:
    return any("reasoning_content" in choice["delta"] for choice in event["choices"])


def is_refined(body: dict[str, Any]) -> bool:
    return bool(body["messages"][-1]["content"] == INSTRUCTION)


async def slots_free(api: Api) -> None:
    """Nothing is under way at any server, or in the gateway."""

    async def free() -> bool:
        # llama-server looks for who has left a whole answer after a second without a word to anybody.
        await asyncio.sleep(1.2)
        servers = api.services.servers.ready()
        usages = await api.get("/api/usage")
        busy = [usage["slotsBusy"] for usage in usages["servers"] if usage["modelId"] in servers]
        assert len(busy) == len(servers) > 0
        return not any(busy) and all(api.services.lanes.is_idle(model_id) for model_id in (FIRST, SECOND))

    await until(free, "the slots are free", 10)


async def test_the_draft_is_streamed_as_thinking_and_then_the_second_servers_stream(
    pair: Any, asked: Asked, said: dict[str, bytes]
) -> None:
    api = await pair()

    reply = await api.ask("POST", CHAT, {**ASKED, "stream": True, "temperature": 0, "seed": 5})

    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    heads = [reply.headers[f"X-Magi-{name}"] for name in ("Model", "Draft-Model", "Tier", "Score")]
    assert heads == [SECOND, FIRST, "powerful", "6.14"]
    draft = told(said[FIRST], "content")
    assert len(draft) == BUDGET
    assert told(reply.content, "reasoning_content") == f"{draft}\n\n"
    before, _, last = reply.content.partition(said[SECOND])
    assert last == b""
    assert said[SECOND].endswith(b"data: [DONE]\n\n")
    assert all("role" not in event["choices"][0]["delta"] for event in events(before))
    assert {event["model"] for event in events(reply.content)} == {SECOND}
    # The second one has heard all that the first one said, and each is told what it was asked and no more.
    (_, first), (_, second) = asked
    assert ids(asked) == [FIRST, SECOND]
    assert (first["messages"], first["max_tokens"], first["temperature"], first["seed"]) == (
        *(ASKED["messages"], BUDGET, 0, 5),
    )
    assert second["messages"] == [
        *(*ASKED["messages"], {"role": "assistant", "content": draft}, {"role": "user", "content": INSTRUCTION}),
    ]
    assert {**second, "messages": 0} == {
        **ASKED,
        "model": SECOND,
        "messages": 0,
        "stream": True,
        "temperature": 0,
        "seed": 5,
    }


async def test_without_a_stream_the_second_servers_answer_is_all(pair: Any, said: dict[str, bytes]) -> None:
    api = await pair()

    reply = await api.ask("POST", CHAT, ASKED)

    assert reply.content == said[SECOND]
    assert reply.success()["usage"]["completion_tokens"] == 12
    assert (reply.headers["X-Magi-Model"], reply.headers["X-Magi-Draft-Model"]) == (SECOND, FIRST)
    assert len(told(said[FIRST], "content")) == BUDGET


@ONE_LISTENER
async def test_each_stage_is_counted_for_its_model(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_FRESH", 0.0)
    api = await pair()

    for is_stream in (False, True):
        await api.ask("POST", CHAT, {**ASKED, "stream": is_stream})

    samples = await scrape(api)
    for model_id, tokens in ((FIRST, 2 * BUDGET), (SECOND, 24)):
        assert of(samples, "completion_tokens_total", model_id) == tokens
        assert of(samples, "requests_total", model_id, outcome="answered") == 2
        assert of(samples, "requests_under_way", model_id) == 0


@ONE_LISTENER
@BOTH_FORMS
async def test_what_needs_no_draft_or_would_be_spoilt_by_one_has_none(pair: Any, asked: Asked, is_stream: bool) -> None:
    api = await pair()
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    cases: list[tuple[str, dict[str, Any], str]] = [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}, FIRST),
        (CHAT, {"tools": [tool]}, SECOND),
        (CHAT, {"model": SECOND}, SECOND),
        (CHAT, {"model": "tier:powerful"}, SECOND),
        ("/chat/completions", {}, SECOND),
        ("/v1/completions", {"prompt": HARD}, SECOND),
    ]
    for path, more, model_id in cases:
        asked.clear()
        reply = await api.ask("POST", path, {**ASKED, **more, "stream": is_stream})
        assert reply.status == 200, reply.content[:2000]
        assert ids(asked) == [model_id], path
        assert (reply.headers["X-Magi-Model"], "X-Magi-Draft-Model" in reply.headers) == (model_id, False)
        assert INSTRUCTION not in json.dumps(asked)

    profile = {"name": "alone", "enabledModels": [FIRST, SECOND], "twoStage": {"enabled": False, "stage1Tier": "fast"}}
    assert (await api.ask("POST", "/api/models/profiles", profile)).status == 201
    (await api.ask("POST", "/api/models/profiles/alone/activate")).success()
    asked.clear()
    assert (await api.ask("POST", CHAT, {**ASKED, "stream": is_stream})).status == 200
    assert ids(asked) == [SECOND]


async def answered_alone(api: Api, asked: Asked, is_stream: bool, *, after: tuple[str, ...] = (), **more: Any) -> Reply:
    """The second stage answers, and is asked what the client asked; ``after`` are those that were asked before."""
    asked.clear()
    reply = await api.ask("POST", CHAT, {**ASKED, "stream": is_stream, **more})
    assert len(answer_in(reply, is_stream)) == 12
    assert ids(asked) == [*after, SECOND]
    assert asked[-1][1] == {**ASKED, "model": SECOND, "stream": is_stream, **more}
    assert reply.headers["X-Magi-Model"] == SECOND
    return reply


@ONE_LISTENER
@BOTH_FORMS
async def test_where_there_is_no_first_stage_the_second_answers_alone(pair: Any, asked: Asked, is_stream: bool) -> None:
    api = await pair()
    # It is not up, and is not started for requests.
    (await api.ask("PUT", f"/api/models/{FIRST}/settings", {"startPolicy": "manual"})).success()
    (await api.ask("POST", f"/api/models/servers/{FIRST}/stop?wait=60")).success()
    assert "X-Magi-Draft-Model" not in (await answered_alone(api, asked, is_stream)).headers
    # It is, but may not be.
    (await api.ask("PUT", f"/api/models/{FIRST}/settings", {"startPolicy": "onDemand"})).success()
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()
    reply = await answered_alone(api, asked, is_stream)
    assert not is_stream or reply.content.startswith(b": the answer of api-refine is not ready yet\n\n")
    assert not is_stream or not told(reply.content, "reasoning_content")
    # There is none in its tier.
    (await api.ask("PUT", f"/api/models/{FIRST}/tier", {"tier": "balanced"})).success()
    assert "X-Magi-Draft-Model" not in (await answered_alone(api, asked, is_stream)).headers


@ONE_LISTENER
@BOTH_FORMS
async def test_a_first_stage_that_refuses_makes_no_draft(
    pair: Any, asked: Asked, is_stream: bool, models: Path, toy_model: MakeToyModel
) -> None:
    short = toy_model(models.parent / "short.gguf", chat_template=TEMPLATE, context_length=256)
    api = await pair(first=short)
    long = [{"role": "user", "content": f"{HARD} {'a' * 300}"}]
    reply = await answered_alone(api, asked, is_stream, after=(FIRST,), messages=long)
    assert "X-Magi-Draft-Model" not in reply.headers


@ONE_LISTENER
@BOTH_FORMS
async def test_a_first_stage_that_only_thinks_makes_no_draft(
    pair: Any, asked: Asked, is_stream: bool, models: Path, toy_model: MakeToyModel, said: dict[str, bytes]
) -> None:
    api = await pair(first=toy_model(models.parent / "thinks.gguf", chat_template=THINKS))

    reply = await answered_alone(api, asked, is_stream, after=(FIRST,))

    assert told(said[FIRST], "reasoning_content")
    assert not is_stream or not told(reply.content, "reasoning_content")


@ONE_LISTENER
@BOTH_FORMS
async def test_a_first_stage_that_hangs_is_waited_for_no_longer_than_a_while(
    pair: Any, asked: Asked, is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await pair()
    monkeypatch.setattr(staged, "_LONGEST", 1.0)
    systemctl("kill", "--signal=STOP", f"magi-llama-{FIRST}.service")
    try:
        await answered_alone(api, asked, is_stream, after=(FIRST,))
    finally:
        systemctl("kill", "--signal=CONT", f"magi-llama-{FIRST}.service")
    assert api.services.lanes.is_idle(FIRST)


async def drafting(said: dict[str, bytes]) -> None:
    """Wait until there is something of a draft."""

    async def there() -> bool:
        return bool(told(said.get(FIRST, b""), "content").strip())

    await until(there, "a draft comes", 20)


@ONE_LISTENER
@BOTH_FORMS
@pytest.mark.parametrize("why", ["killed", "slow", "long"])
async def test_what_there_is_of_a_draft_that_breaks_off_is_used(
    pair: Any,
    asked: Asked,
    said: dict[str, bytes],
    is_stream: bool,
    sample_models: SampleModels,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    api = await pair(first=sample_models.smollm2, budget=4000)
    if why != "killed":
        monkeypatch.setattr(staged, "_LONGEST" if why == "slow" else "_MOST", 3.0 if why == "slow" else 40)
    body = {**ASKED, "stream": is_stream, "max_tokens": 4000, "ignore_eos": True}
    asking = asyncio.create_task(api.ask("POST", CHAT, body))
    if why == "killed":
        await drafting(said)
        systemctl("kill", "--signal=KILL", f"magi-llama-{FIRST}.service")

    reply = await asyncio.wait_for(asking, 60)

    assert answer_in(reply, is_stream)
    assert ids(asked) == [FIRST, SECOND]
    draft = asked[1][1]["messages"][-2]["content"]
    assert is_refined(asked[1][1])
    assert draft.strip()
    assert len(draft) < 6000
    assert draft == told(said[FIRST], "content")
    if is_stream:
        assert told(reply.content, "reasoning_content") == f"{draft}\n\n"
        assert reply.content.endswith(b"data: [DONE]\n\n")
    await slots_free(api) if why != "killed" else None


@ONE_LISTENER
@BOTH_FORMS
async def test_a_draft_that_the_second_model_cannot_take_is_dropped(
    pair: Any, asked: Asked, is_stream: bool, models: Path, toy_model: MakeToyModel
) -> None:
    api = await pair(second=toy_model(models.parent / "short.gguf", chat_template=TEMPLATE, context_length=256))

    await answered_alone(api, asked, is_stream, after=(FIRST, SECOND))

    assert is_refined(asked[1][1])


@ONE_LISTENER
@BOTH_FORMS
async def test_where_there_is_no_second_stage_the_tiers_are_asked_as_ever(
    pair: Any, asked: Asked, is_stream: bool
) -> None:
    api = await pair()
    (await api.ask("PUT", f"/api/models/{SECOND}/settings", {"startPolicy": "manual"})).success()
    (await api.ask("POST", f"/api/models/servers/{SECOND}/stop?wait=60")).success()

    reply = await api.ask("POST", CHAT, {**ASKED, "stream": is_stream})

    assert len(answer_in(reply, is_stream)) == 12
    assert (ids(asked), reply.headers["X-Magi-Tier"]) == ([FIRST], "fast")
    assert "X-Magi-Draft-Model" not in reply.headers


@ONE_LISTENER
@BOTH_FORMS
async def test_a_second_stage_that_fails_is_an_error(pair: Any, asked: Asked, is_stream: bool) -> None:
    api = await pair()
    (await api.ask("POST", f"/api/models/servers/{SECOND}/stop?wait=60")).success()
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()

    reply = await api.ask("POST", CHAT, {**ASKED, "stream": is_stream})

    assert ids(asked) == [FIRST]
    if is_stream:
        assert reply.status == 200
        assert len(told(reply.content, "reasoning_content").strip()) == BUDGET
        assert events(reply.content)[-1]["error"]["code"] == "draining"
        assert b"[DONE]" not in reply.content
    else:
        openai_failure(reply, 409, "draining")


@ONE_LISTENER
@BOTH_FORMS
async def test_servers_that_have_just_died(
    serve: Serve,
    models: Path,
    toy_model: MakeToyModel,
    asked: Asked,
    is_stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for model_id in (FIRST, SECOND, OTHER):
        toy_model(models / f"{model_id}.gguf", chat_template=TEMPLATE, context_length=2048)
    api = await serve(server_access="port")
    await configured(api, tiers={FIRST: "fast", SECOND: "powerful", OTHER: "powerful"})
    for model_id in (FIRST, SECOND, OTHER):
        await started(api, model_id)
    # The moment in which nobody has noticed yet, for as long as the test takes.
    servers = api.services.servers
    reaches = {model_id: servers.reach_if_ready(model_id) for model_id in (FIRST, SECOND, OTHER)}
    monkeypatch.setattr(type(servers), "reach_if_ready", lambda _, model_id: reaches[model_id])
    monkeypatch.setattr(lanes_module, "_NOTICED_WITHIN", 0.0)
    await killed(api, OTHER)

    # The one after the one that was asked last is the one that is gone: the other one answers, with the draft.
    replies = [await api.ask("POST", CHAT, {**ASKED, "stream": is_stream}) for _ in range(2)]
    assert [len(answer_in(reply, is_stream)) for reply in replies] == [12] * 2
    assert ids(asked) == [FIRST, OTHER, SECOND] * 2
    assert all(is_refined(body) for model_id, body in asked if model_id != FIRST)
    assert all(body["model"] == model_id for model_id, body in asked)
    if is_stream:
        # Who answers is said in its header already, and in the draft; the answer itself names who it is from.
        for reply in replies:
            drafts = {event["model"] for event in events(reply.content) if is_of_draft(event)}
            answers = {event["model"] for event in events(reply.content) if not is_of_draft(event)}
            assert (reply.headers["X-Magi-Model"], drafts, answers) == (OTHER, {OTHER}, {SECOND})
            assert len(told(reply.content, "reasoning_content").strip()) == BUDGET
            assert reply.content.endswith(b"data: [DONE]\n\n")
    else:
        assert [reply.body["model"] for reply in replies] == [SECOND] * 2
        assert [reply.headers["X-Magi-Model"] for reply in replies] == [SECOND] * 2

    await killed(api, FIRST)
    asked.clear()
    replies = [await api.ask("POST", CHAT, {**ASKED, "stream": is_stream}) for _ in range(2)]
    assert [len(answer_in(reply, is_stream)) for reply in replies] == [12] * 2
    assert not any(is_refined(body) or "X-Magi-Draft-Model" in reply.headers for _, body in asked for reply in replies)

    # Where there is nobody else either, that is an error, and each is asked once.
    await killed(api, SECOND)
    asked.clear()
    reply = await api.ask("POST", CHAT, {**ASKED, "stream": is_stream})
    openai_failure(reply, 502, "server_failed")
    assert sorted(ids(asked)) == [OTHER, FIRST, SECOND]


@ONE_LISTENER
@BOTH_FORMS
async def test_a_bad_request_is_refused_as_ever(pair: Any, asked: Asked, is_stream: bool) -> None:
    api = await pair()

    reply = await api.ask("POST", CHAT, {**ASKED, "stream": is_stream, "samplers": 5, "temperature": "hot"})

    assert reply.status == 400
    assert reply.body["error"]["message"]
    assert ids(asked) == [FIRST, SECOND]


@ONE_LISTENER
@BOTH_FORMS
async def test_no_draft_is_made_for_a_second_stage_that_has_no_place(
    serve: Serve, models: Path, toy_model: MakeToyModel, asked: Asked, is_stream: bool
) -> None:
    for model_id in (FIRST, SECOND):
        toy_model(models / f"{model_id}.gguf", chat_template=TEMPLATE, context_length=2048)
    api = await serve(gateway_queue="0")
    await configured(api, tiers={FIRST: "fast", SECOND: "powerful"}, maxConcurrent=1)
    await started(api, FIRST)
    await started(api, SECOND)

    async with api.services.lanes.entered(api.services.registry.models[SECOND]):
        reply = await api.ask("POST", CHAT, {**ASKED, "stream": is_stream})
    openai_failure(reply, 429, "queue_full")
    assert asked == []
    # Nor by a first one.
    async with api.services.lanes.entered(api.services.registry.models[FIRST]):
        await answered_alone(api, asked, is_stream)


@ONE_LISTENER
@BOTH_FORMS
async def test_a_large_body_goes_through_both(pair: Any, asked: Asked, is_stream: bool) -> None:
    api = await pair()
    padding = {"metadata": {"image": "A" * 3_000_000}}

    body = json.dumps({**ASKED, **padding, "stream": is_stream}).encode()
    reply = await api.ask("POST", CHAT, data=io.BytesIO(body))

    assert len(answer_in(reply, is_stream)) == 12
    assert [body["metadata"] for _, body in asked] == [padding["metadata"]] * 2
    assert is_refined(asked[1][1])


@ONE_LISTENER
@BOTH_FORMS
@pytest.mark.parametrize("stage", [FIRST, SECOND])
async def test_a_client_that_leaves_frees_the_slot_of_either_stage(
    pair: Any, said: dict[str, bytes], asked: Asked, sample_models: SampleModels, is_stream: bool, stage: str
) -> None:
    # A toy would be through with it at once.
    api = await pair(
        **{"first" if stage == FIRST else "second": sample_models.smollm2}, budget=6000 if stage == FIRST else BUDGET
    )
    body = {**ASKED, "stream": is_stream, "max_tokens": 6000, "ignore_eos": True}
    asking = asyncio.create_task(api.ask("POST", CHAT, body))

    async def under_way() -> bool:
        return stage in ids(asked) and api.services.lanes.asking(stage) == 1

    await until(under_way, "it is under way", 20)
    if is_stream or stage == FIRST:
        await until(lambda: _has_begun(said, stage), "it has begun", 20)
    else:
        await asyncio.sleep(0.5)
    assert not asking.done()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    await slots_free(api)
    assert stage == SECOND or SECOND not in ids(asked)


async def _has_begun(said: dict[str, bytes], model_id: str) -> bool:
    return bool(said.get(model_id))


@ONE_LISTENER
async def test_a_client_that_leaves_before_the_stream_begins_leaves_no_draft_behind(
    pair: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await pair()

    async def gone(*_: object) -> None:
        raise ConnectionResetError("the client has just left")

    monkeypatch.setattr(AwaitedAnswer, "prepare", gone)
    with pytest.raises(aiohttp.ClientError):
        await api.ask("POST", CHAT, {**ASKED, "stream": True})

    assert ids(asked) == [FIRST]
    await until(lambda: _is_idle(api, FIRST), "its place is free", 5)


async def _is_idle(api: Api, model_id: str) -> bool:
    return api.services.lanes.is_idle(model_id)


@ONE_LISTENER
@pytest.mark.timeout(600)
async def test_memory_for_one_model_is_enough(
    memory_to_itself: None, serve: Serve, models: Path, sample_models: SampleModels, said: dict[str, bytes]
) -> None:
    for model_id in (FIRST, SECOND):
        shutil.copyfile(sample_models.smollm2, models / f"{model_id}.gguf")
        with (models / f"{model_id}.gguf").open("ab") as file:
            file.write(model_id.encode())
    api = await serve(memory_reserve=str(psutil.virtual_memory().available - ROOM))
    await configured(api, tiers={FIRST: "fast", SECOND: "powerful"}, ctxSize=CONTEXT, parallelSlots=4)

    reply = await asyncio.wait_for(api.ask("POST", CHAT, {**ASKED, "stream": True}), 120)

    assert reply.content.startswith(b": the answer of api-refine is not ready yet\n\n")
    draft = told(said[FIRST], "content")
    assert draft.strip()
    assert told(reply.content, "reasoning_content") == f"{draft}\n\n"
    assert told(reply.content, "content").strip()
    assert reply.content.endswith(b"data: [DONE]\n\n")
    assert sorted(api.services.servers.ready()) == [SECOND]


@ONE_LISTENER
@BOTH_FORMS
async def test_who_waits_for_a_draft_as_the_agent_stops_is_told_so(
    serve: Serve, models: Path, toy_model: MakeToyModel, asked: Asked, is_stream: bool
) -> None:
    for model_id in (FIRST, SECOND):
        toy_model(models / f"{model_id}.gguf", chat_template=TEMPLATE, context_length=2048)
    api = await serve()
    await configured(api, tiers={FIRST: "fast", SECOND: "powerful"}, maxConcurrent=1)
    await started(api, FIRST)
    lanes = api.services.lanes

    async def waits() -> bool:
        return lanes.is_awaited(FIRST)

    async with lanes.entered(api.services.registry.models[FIRST]):
        asking = asyncio.create_task(api.ask("POST", CHAT, {**ASKED, "stream": is_stream}))
        await until(waits, "it waits for its draft")
        lanes.turn_away()
        reply = await asyncio.wait_for(asking, 10)

    if is_stream:
        assert "the agent is stopping" in events(reply.content)[-1]["error"]["message"]
    else:
        assert "the agent is stopping" in openai_failure(reply, 503, "service_unavailable")["message"]
    assert asked == []
    assert await api.state(SECOND) == "stopped"
