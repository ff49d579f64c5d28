"""Requests that name a tier."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.gateway import lanes as lanes_module
from magi_agent.gateway import tier_models
from magi_agent.gateway.relay import Relay
from magi_agent.gateway.tiers import Candidate, Kind, in_order, kind_for, tier_of, to_start
from magi_agent.profiles.profile import LoadBalancing, LoadBalancingStrategy
from magi_agent.vocabulary import ServerState, Tier
from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve
from tests.conftest import SampleModels
from tests.gateway.test_gateway import PROMPT, openai_failure, started

A, B, C = MODELS = ["api-tier-a", "api-tier-b", "api-tier-c"]
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        model_id=st.sampled_from("abcdef"),
        state=st.sampled_from(ServerState),
        is_open=st.booleans(),
        is_ready=st.booleans(),
        starts=st.booleans(),
        is_awaited=st.booleans(),
        free_slots=st.integers(-3, 3),
        is_silent=st.booleans(),
        size_bytes=st.integers(0, 3),
    ),
    unique_by=lambda one: one.model_id,
)
BALANCING = st.builds(LoadBalancing, enabled=st.booleans(), strategy=st.sampled_from(LoadBalancingStrategy))
LEAST_LOADED = LoadBalancing(strategy=LoadBalancingStrategy.LEAST_LOADED)


def ready(model_id: str, free_slots: int = 1, *, is_open: bool = True, is_silent: bool = False) -> Candidate:
    return Candidate(
        model_id, ServerState.READY, is_open, is_ready=True, starts=False, free_slots=free_slots, is_silent=is_silent
    )


def ids(candidates: list[Candidate]) -> str:
    return "".join(one.model_id for one in candidates)


@given(CANDIDATES, BALANCING, st.none() | st.sampled_from("abcdef"), st.integers())
def test_only_what_answers_is_in_the_order_and_what_answers_at_once_is_first(
    candidates: list[Candidate], balancing: LoadBalancing, last: str | None, seed: int
) -> None:
    order = in_order(candidates, balancing, last, random.Random(seed))

    assert sorted(ids(order)) == sorted(one.model_id for one in candidates if one.is_ready)
    if balancing.enabled:
        assert [one.is_open for one in order] == sorted((one.is_open for one in order), reverse=True)
    else:
        assert ids(order) == "".join(sorted(ids(order)))
    if balancing == LEAST_LOADED:
        keys = [(not one.is_open, one.is_silent, -one.free_slots) for one in order]
        assert keys == sorted(keys)
    assert {one.model_id for one in to_start(candidates)} == {one.model_id for one in candidates if one.starts}


@pytest.mark.parametrize(("last", "order"), [(None, "abc"), ("a", "bca"), ("b", "cab"), ("c", "abc"), ("bb", "cab")])
def test_round_robin_goes_on_after_the_last_one(last: str | None, order: str) -> None:
    assert ids(in_order([ready("c"), ready("a"), ready("b")], LoadBalancing(), last, random.Random())) == order


@pytest.mark.parametrize(
    ("candidates", "order"),
    [
        ([ready("a", 1), ready("b", 3), ready("c", -2)], "bac"),
        ([ready("a", 3, is_silent=True), ready("b", 0)], "ba"),
        ([ready("a", 3, is_open=False), ready("b", 0)], "ba"),
        ([ready("a", 2), ready("b", 2)], "ba"),
    ],
)
def test_the_least_loaded_has_most_free_slots(candidates: list[Candidate], order: str) -> None:
    assert ids(in_order(candidates, LEAST_LOADED, "a", random.Random())) == order


def test_what_comes_up_already_is_waited_for_before_another_is_started() -> None:
    def started_for_requests(model_id: str, state: str, size: int, *, awaited: bool = False) -> Candidate:
        return Candidate(
            model_id,
            ServerState(state),
            is_open=False,
            is_ready=False,
            starts=True,
            is_awaited=awaited,
            size_bytes=size,
        )

    candidates = [
        started_for_requests("a", "failed", 1),
        started_for_requests("b", "stopped", 3),
        started_for_requests("c", "stopped", 2),
        started_for_requests("d", "loading", 9),
        started_for_requests("e", "stopped", 9, awaited=True),
        Candidate("f", ServerState.LOADING, is_open=False, is_ready=False, starts=False),
    ]
    assert ids(to_start(candidates)) == "decba"


def test_what_names_a_tier() -> None:
    assert [tier_of(name) for name in (None, "fast", "x:fast", "tier", "tier:fast", "Tier:FAST")] == [
        *(None, None, None, None),
        *(Tier.FAST, Tier.FAST),
    ]
    with pytest.raises(ValueError, match="quick"):
        tier_of("tier:quick")
    assert {kind_for(path) for path in ("/v1/embeddings", "/embedding", "/embeddings")} == {Kind.EMBEDDING}
    assert {kind_for(path) for path in ("/v1/rerank", "/rerank", "/reranking")} == {Kind.RERANKING}
    assert {kind_for(path) for path in ("/v1/chat/completions", "/tokenize", "/v1/messages")} == {Kind.COMPLETION}


async def ask(api: Api, name: str = "tier:fast", path: str = "/v1/completions", **body: Any) -> Reply:
    return await api.ask("POST", path, {"model": name, **PROMPT, **body})


async def chosen(api: Api, **body: Any) -> str:
    """The model that a request for the tier went to."""
    reply = await ask(api, **body)
    model = str(reply.success()["model"])
    assert reply.headers["X-Magi-Model"] == model
    return model


async def configure(api: Api, model_id: str, *, enabled: bool = True, **settings: object) -> None:
    (await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": "fast"})).success()
    settings = {"startPolicy": "onDemand", **settings}
    (await api.ask("PUT", f"/api/models/{model_id}/settings", settings)).success()
    (await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": enabled})).success()


async def balance(api: Api, **balancing: object) -> None:
    """Have a profile hold that says how requests are balanced, and enables what is enabled."""
    enabled = [model.model_id for model in api.services.registry.models.values() if model.choices.enabled]
    profile = {"name": "balanced", "enabledModels": enabled, "loadBalancing": balancing}
    reply = await api.ask("POST", "/api/models/profiles", profile)
    if reply.status == 409:
        (await api.ask("PUT", "/api/models/profiles/balanced", profile)).success()
    (await api.ask("POST", "/api/models/profiles/balanced/activate")).success()


async def all_ready(api: Api, **settings: Any) -> None:
    for model_id in MODELS:
        await configure(api, model_id, **settings)
    for model_id in MODELS:
        await started(api, model_id)


async def test_ready_ones_have_their_turns(serve: Serve) -> None:
    api = await serve(*MODELS)
    await all_ready(api)

    assert [await chosen(api) for _ in range(6)] == [*MODELS, *MODELS]


@ONE_LISTENER
async def test_the_profile_says_how_they_share(serve: Serve) -> None:
    api = await serve(*MODELS)
    await all_ready(api)

    await balance(api, enabled=False)
    assert [await chosen(api) for _ in range(4)] == [A] * 4
    await balance(api, strategy="random")
    counted = Counter([await chosen(api) for _ in range(60)])
    assert set(counted) == set(MODELS)
    assert [await chosen(api) for _ in range(12)] != [*MODELS] * 4
    await balance(api, strategy="round_robin")
    assert sorted([await chosen(api) for _ in range(3)]) == MODELS


@ONE_LISTENER
async def test_the_least_loaded_is_known_by_what_is_under_way(serve: Serve) -> None:
    api = await serve(*MODELS)
    await all_ready(api, parallelSlots=2)
    await balance(api, strategy="least_loaded", healthCheckInterval=3600)
    lanes, models = api.services.lanes, api.services.registry.models

    assert sorted([await chosen(api) for _ in range(3)]) == MODELS
    async with lanes.entered(models[A]), lanes.entered(models[B]):
        assert {await chosen(api) for _ in range(4)} == {C}
        async with lanes.entered(models[C]), lanes.entered(models[C]):
            assert {await chosen(api) for _ in range(4)} == {A, B}


@ONE_LISTENER
async def test_what_others_ask_directly_is_known_within_the_interval(
    serve: Serve, models: Path, sample_models: SampleModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model_id in (A, B):
        # A toy would be through with it at once.
        shutil.copyfile(sample_models.smollm2, models / f"{model_id}.gguf")
        with (models / f"{model_id}.gguf").open("ab") as file:
            file.write(model_id.encode())
    api = await serve()
    for model_id in (A, B):
        await configure(api, model_id, parallelSlots=2)
        await started(api, model_id)
    url = (await api.get(f"/api/models/{A}"))["server"]["url"]
    # Where the machine is busy, an answer may take longer than a request would wait for it.
    monkeypatch.setattr(tier_models, "_PATIENCE", 10.0)
    await balance(api, strategy="least_loaded", healthCheckInterval=1)
    looks, ask_all = [], api.services.usage.all

    async def counted() -> Any:
        looks.append(asyncio.get_running_loop().time())
        return await ask_all()

    monkeypatch.setattr(type(api.services.usage), "all", lambda _: counted())
    assert sorted([await chosen(api) for _ in range(2)]) == [A, B]
    body = {"prompt": "a", "n_predict": 6000, "stream": True, "ignore_eos": True}
    async with aiohttp.ClientSession() as direct, direct.post(f"{url}/completion", json=body) as answer:
        await answer.content.readany()
        await asyncio.sleep(3.1)
        assert {await chosen(api) for _ in range(6)} == {B}
    assert len(looks) <= 4


@ONE_LISTENER
async def test_the_servers_are_asked_no_more_often_than_the_interval(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve(*MODELS)
    await all_ready(api)
    await balance(api, strategy="least_loaded", healthCheckInterval=3600)
    looks, ask_all = [], api.services.usage.all

    async def counted() -> Any:
        looks.append(1)
        return await ask_all()

    monkeypatch.setattr(type(api.services.usage), "all", lambda _: counted())
    await asyncio.gather(*(chosen(api) for _ in range(20)))
    assert len(looks) in {1, 2}
    await asyncio.gather(*(chosen(api) for _ in range(20)))
    assert len(looks) in {1, 2}


async def test_one_is_started_where_none_is_ready(serve: Serve) -> None:
    api = await serve(*MODELS)
    await configure(api, B)
    await configure(api, C)

    asked = await asyncio.gather(*(chosen(api) for _ in range(20)))

    assert set(asked) == {B}
    assert list(api.services.servers.ready()) == [B]


@ONE_LISTENER
@pytest.mark.timeout(600)
async def test_one_that_fits_is_started_before_a_smaller_one_that_does_not(
    memory_to_itself: None, serve: Serve, models: Path, sample_models: SampleModels
) -> None:
    for model_id, more in ((A, b"a"), (B, b"as large as it is, and a little more")):
        shutil.copyfile(sample_models.smollm2, models / f"{model_id}.gguf")
        with (models / f"{model_id}.gguf").open("ab") as file:
            file.write(more)
    # Room for the larger one, and for some 7 GB of the smaller one's cache by far not.
    api = await serve(memory_reserve=str(psutil.virtual_memory().available - (4 << 30)))
    await configure(api, A, ctxSize=300_000)
    await configure(api, B, ctxSize=512)

    assert await chosen(api) == B


@ONE_LISTENER
async def test_who_streams_is_told_which_one_is_started(serve: Serve) -> None:
    api = await serve(*MODELS)
    await configure(api, C)

    reply = await ask(api, stream=True)

    assert (reply.status, reply.headers["X-Magi-Model"]) == (200, C)
    assert reply.content.startswith(b": api-tier-c is not ready yet")
    assert json.loads(reply.content.split(b"data: ")[1])["model"] == C


async def test_where_none_can_be_had_it_says_what_they_are_doing(serve: Serve) -> None:
    api = await serve(*MODELS)
    await configure(api, A, startPolicy="manual")
    await configure(api, B, enabled=False)

    error = openai_failure(await ask(api), 503, "service_unavailable")
    assert error["details"] == {"service": "tier:fast", "models": {A: "stopped"}}
    assert f"{A} is stopped" in error["message"]

    for name in ("tier:powerful", "tier:quick", "tier:"):
        openai_failure(await ask(api, name), 404, "model_not_found")
    openai_failure(await ask(api, path="/v1/rerank"), 404, "model_not_found")


async def test_each_path_has_models_that_are_for_it(serve: Serve) -> None:
    api = await serve(*MODELS)
    await all_ready(api)
    await configure(api, B, mode="embedding", pooling="mean")
    (await api.ask("POST", f"/api/models/servers/{B}/restart?wait=60")).success()

    assert {await chosen(api) for _ in range(4)} == {A, C}
    for path in ("/v1/embeddings", "/embedding"):
        reply = await api.ask("POST", path, {"model": "tier:fast", "input": "a", "content": "a"})
        assert (reply.status, reply.headers["X-Magi-Model"]) == (200, B)
    data = (await api.get("/v1/models"))["data"]
    (entry,) = [entry for entry in data if entry["id"].startswith("tier:")]
    assert (entry["id"], entry["state"], entry["models"]) == ("tier:fast", "ready", MODELS)
    assert sorted(entry["capabilities"]) == ["completion", "embedding"]


@ONE_LISTENER
async def test_one_that_has_just_died_is_passed_over(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve(A, B, server_access="port")
    for model_id in (A, B):
        await configure(api, model_id)
        await started(api, model_id)
    # The moment in which nobody has noticed yet, for as long as the test takes.
    servers = api.services.servers
    reaches = {model_id: servers.reach_if_ready(model_id) for model_id in (A, B)}
    monkeypatch.setattr(type(servers), "reach_if_ready", lambda _, model_id: reaches[model_id])
    monkeypatch.setattr(lanes_module, "_NOTICED_WITHIN", 0.0)
    await killed(api, A)

    assert [await chosen(api) for _ in range(3)] == [B] * 3
    await killed(api, B)
    openai_failure(await ask(api), 502, "server_failed")
    openai_failure(await ask(api, B), 502, "server_failed")


@ONE_LISTENER
async def test_what_may_have_ended_a_server_at_once_is_asked_of_no_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve(A, B, server_access="port")
    for model_id in (A, B):
        await configure(api, model_id)
        await started(api, model_id)
    # Each has a connection now that is kept open.
    first, second = [await chosen(api) for _ in range(2)]
    asked, pass_on = [], Relay.pass_on

    async def noted(relay: Relay, request: Any, model_id: str, *rest: Any) -> Any:
        asked.append(model_id)
        return await pass_on(relay, request, model_id, *rest)

    monkeypatch.setattr(Relay, "pass_on", noted)
    for model_id in (first, second):
        os.kill(main_pid(api, model_id), signal.SIGSTOP)
    asking = asyncio.create_task(ask(api))
    await asyncio.sleep(0.2)
    assert not asking.done()
    await killed(api, first)

    openai_failure(await asyncio.wait_for(asking, 10), 502, "server_failed")
    assert asked == [first]
    await killed(api, second)


def main_pid(api: Api, model_id: str) -> int:
    unit = next(unit for name, unit in api.services.manager.units.items() if name.endswith(f"{model_id}.service"))
    assert unit.main_pid
    return unit.main_pid


async def killed(api: Api, model_id: str) -> None:
    pid = main_pid(api, model_id)
    os.kill(pid, signal.SIGKILL)

    async def gone() -> bool:
        return not psutil.pid_exists(pid)

    await until(gone, "it is gone", 10)


async def test_a_path_with_an_id_knows_no_tiers(serve: Serve) -> None:
    api = await serve(A)
    await configure(api, A)

    reply = await api.ask("POST", "/api/proxy/tier:fast/tokenize", {"content": "a"})
    openai_failure(reply, 404, "model_not_found")
    reply = await api.ask("PUT", f"/api/models/{A}/settings", {"aliases": ["tier:fast"]})
    assert reply.status == 422
