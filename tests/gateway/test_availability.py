"""What load balancers are told of a model, of a tier and of ``auto``."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from toy_projector import write_toy_ear, write_toy_eye

from magi_agent.gateway import lanes
from magi_agent.gateway.tiers import Kind
from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel, SampleModels
from tests.gateway.test_gateway import PROMPT, openai_failure, started
from tests.servers.system import script

A, B, C = MODELS = ["api-avail-a", "api-avail-b", "api-avail-c"]
READY, NOT_READY = (200, "ready"), (503, "not_ready")
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
ON_DEMAND = "?onDemand=true"


def said(reply: Reply) -> tuple[int, str]:
    assert list(reply.body) == ["status"]
    return reply.status, str(reply.body["status"])


async def of_model(api: Api, name: str = A, query: str = "") -> tuple[int, str]:
    return said(await api.ask("GET", f"/health/models/{name}{query}"))


async def of_tier(api: Api, tier: str = "fast", query: str = "") -> tuple[int, str]:
    return said(await api.ask("GET", f"/health/tiers/{tier}{query}"))


async def of_auto(api: Api, query: str = "") -> tuple[int, str]:
    return said(await api.ask("GET", f"/health/auto{query}"))


async def configure(
    api: Api, model_id: str = A, *, enabled: bool = True, tier: str = "fast", **settings: object
) -> None:
    settings = {"startPolicy": "onDemand", **settings}
    (await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})).success()
    (await api.ask("PUT", f"/api/models/{model_id}/settings", settings)).success()
    (await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": enabled})).success()


async def stop(api: Api, model_id: str = A) -> None:
    (await api.ask("POST", f"/api/models/servers/{model_id}/stop?wait=60")).success()


async def complete(api: Api, name: str = A) -> Reply:
    return await api.ask("POST", "/v1/completions", {"model": name, **PROMPT})


async def test_a_model_is_ready_from_when_its_server_is_until_it_stops(serve: Serve) -> None:
    api = await serve(A)
    assert await of_model(api) == NOT_READY

    (await api.ask("POST", f"/api/models/servers/{A}/start")).success(202)
    assert await api.state(A) in ("starting", "loading")
    assert await of_model(api) == NOT_READY
    await api.until_state(A, "ready")
    # It was never enabled: somebody had it started, and what is asked of it is answered.
    assert await of_model(api) == READY
    assert (await complete(api)).status == 200

    await stop(api)
    assert await of_model(api) == NOT_READY


@ONE_LISTENER
async def test_what_there_is_not_is_told_like_what_is_not_ready(serve: Serve) -> None:
    api = await serve(A, B, C)
    await configure(api, B, enabled=False)
    await configure(api, C)
    names = [
        *MODELS,
        "none-such",
        "%0Anone%0A",
        "tier:fast",
        "auto",
        "%00",
        "%FF",
        "%2F",
        "../..",
        "a/b",
        "{}",
        "x" * 4000,
        "%F0%9F%A6%99",
    ]

    for query in ("", "?onDemand=false"):
        replies = [await api.ask("GET", f"/health/models/{name}{query}") for name in names]
        assert {reply.status for reply in replies} == {503}
        assert {reply.content for reply in replies} == {b'{"status":"not_ready"}'}
        assert len({frozenset(reply.headers) for reply in replies}) == 1


@ONE_LISTENER
async def test_a_model_goes_by_all_its_names(serve: Serve, models: Path) -> None:
    api = await serve(A, B)
    shutil.copyfile(models / f"{A}.gguf", models / "API avail ü 50%.gguf")
    with (models / "API avail ü 50%.gguf").open("ab") as file:
        file.write(b"another")
    (await api.ask("POST", "/api/models/rescan")).success()
    (odd,) = set(api.services.registry.models) - {A, B}
    await configure(api, odd, aliases=["org/odd:latest", "gpt-4o"])
    await configure(api, B)
    await started(api, odd)

    for name in (odd, "org/odd:latest", quote("org/odd:latest", safe=""), "gpt-4o", quote("API avail ü 50%")):
        assert await of_model(api, name) == READY, name
        assert await of_model(api, name, ON_DEMAND) == READY, name
    assert await of_model(api, B) == NOT_READY


@pytest.mark.parametrize("path", [f"models/{A}", "tiers/fast", "auto"])
async def test_the_head_of_an_answer_can_be_had_alone(serve: Serve, path: str) -> None:
    api = await serve(A)
    await configure(api)
    assert [await _head(api, path), await _head(api, f"{path}{ON_DEMAND}")] == [503, 200]
    await started(api, A)
    assert await _head(api, path) == 200


async def _head(api: Api, path: str) -> int:
    reply = await api.ask("HEAD", f"/health/{path}")
    assert reply.content == b""
    assert reply.headers["Content-Type"].startswith("application/json")
    return reply.status


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_nobody_needs_a_token(serve: Serve, tmp_path: Path) -> None:
    token = Token("front", TokenScope.INFER, digest_of(new_secret()))
    (tmp_path / "tokens").write_text(line_of(token) + "\n")
    (tmp_path / "tokens").chmod(0o600)
    api = await serve(A, tcp_access="none")
    assert (await api.ask("GET", "/v1/models")).status == 401

    for headers in ({}, {"Authorization": "Bearer magi_nobodys"}, {"Host": "balancer.example"}):
        for path in (f"models/{A}", "models/none-such", "tiers/fast", "auto"):
            assert said(await api.ask("GET", f"/health/{path}", headers=headers)) == NOT_READY
    (await api.ask("PUT", f"/health/models/{A}")).failure(401, "Unauthorized")


@ONE_LISTENER
@pytest.mark.parametrize(
    ("path", "status", "error", "field"),
    [
        (f"models/{A}?onDemand=perhaps", 422, "ValidationError", "onDemand"),
        ("models/none-such?onDemand=2", 422, "ValidationError", "onDemand"),
        (f"models/{A}?onDemand=", 422, "ValidationError", "onDemand"),
        ("models/none-such?onDemand", 422, "ValidationError", "onDemand"),
        ("tiers/fast?kind=", 422, "ValidationError", "kind"),
        ("tiers/fast?onDemand=yes", 422, "ValidationError", "onDemand"),
        ("tiers/fast?kind=chat", 422, "ValidationError", "kind"),
        ("tiers/huge", 400, "InvalidTier", None),
        ("tiers/FAST", 400, "InvalidTier", None),
        ("tiers/fast/", 404, "NotFound", None),
        ("tiers/fast?vision=1", 422, "ValidationError", "vision"),
        ("tiers/fast?audio=", 422, "ValidationError", "audio"),
        ("auto?kind=chat", 422, "ValidationError", "kind"),
        ("auto?vision=yes&audio=true", 422, "ValidationError", "vision"),
        ("auto?onDemand", 422, "ValidationError", "onDemand"),
        ("auto/", 404, "NotFound", None),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    serve: Serve, path: str, status: int, error: str, field: str | None
) -> None:
    api = await serve(A)

    details = (await api.ask("GET", f"/health/{path}")).failure(status, error)

    assert field is None or details["errors"][0]["field"] == field


@ONE_LISTENER
async def test_one_that_a_request_would_have_started_counts_where_that_is_asked_for(serve: Serve) -> None:
    api = await serve(*MODELS)
    await configure(api, A)
    await configure(api, B, startPolicy="manual")
    await configure(api, C, enabled=False)

    assert [await of_model(api, model_id, ON_DEMAND) for model_id in MODELS] == [READY, NOT_READY, NOT_READY]
    assert await of_model(api, A, "?onDemand=false") == await of_model(api, A) == NOT_READY
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()
    assert await of_model(api, A, ON_DEMAND) == NOT_READY
    assert (await complete(api)).status == 409
    (await api.ask("PUT", "/api/drain", {"draining": False})).success()
    assert [await api.state(model_id) for model_id in MODELS] == ["stopped"] * 3


@ONE_LISTENER
async def test_one_whose_file_is_gone_would_not_be_started(serve: Serve, models: Path) -> None:
    api = await serve(A, B)
    await configure(api, A)
    await configure(api, B)
    (models / f"{A}.gguf").unlink()
    with (models / f"{B}.gguf").open("r+b") as file:
        file.truncate(1000)
    (await api.ask("POST", "/api/models/rescan")).success()
    assert B in api.services.registry.models

    assert [await of_model(api, model_id, ON_DEMAND) for model_id in (A, B)] == [NOT_READY] * 2
    assert await of_tier(api, query=ON_DEMAND) == NOT_READY


@ONE_LISTENER
async def test_one_that_failed_would_not_be_started(serve: Serve) -> None:
    api = await serve(A, llama_server_path="/bin/false", max_startup_time="20")
    await configure(api)
    assert [await of_model(api, query=ON_DEMAND), await of_tier(api, query=ON_DEMAND)] == [READY] * 2

    openai_failure(await complete(api), 500, "start_failed")

    # It is tried again by the agent itself, whoever asks.
    api.services.lanes._lanes[A].failed_at = float("-inf")
    assert await api.state(A) == "cooldown"
    assert [await of_model(api, query=ON_DEMAND), await of_tier(api, query=ON_DEMAND)] == [NOT_READY] * 2


@ONE_LISTENER
@pytest.mark.timeout(600)
async def test_a_start_that_was_refused_is_remembered_for_a_while(
    memory_to_itself: None, serve: Serve, models: Path, sample_models: SampleModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit into memory is down as before, and the next request would fare no better."""
    shutil.copyfile(sample_models.smollm2, models / f"{A}.gguf")
    api = await serve(memory_reserve=str(psutil.virtual_memory().available - (4 << 30)))
    # Some 7 GB of cache.
    await configure(api, ctxSize=300_000)
    openai_failure(await complete(api), 409, "insufficient_memory")
    assert await api.state(A) == "stopped"
    assert [await of_model(api, query=ON_DEMAND), await of_tier(api, query=ON_DEMAND)] == [NOT_READY] * 2

    with monkeypatch.context() as patched:
        patched.setattr(lanes, "_FAILED_FOR", 0.0)
        assert [await of_model(api, query=ON_DEMAND), await of_tier(api, query=ON_DEMAND)] == [READY] * 2
    await configure(api, ctxSize=512)
    assert (await complete(api)).status == 200
    await stop(api)
    assert await of_model(api, query=ON_DEMAND) == READY, "since then a start went well"


@ONE_LISTENER
async def test_one_that_as_many_wait_for_as_may_is_full(serve: Serve, tmp_path: Path) -> None:
    silent = script(tmp_path / "silent", "sleep 1000")
    api = await serve(A, gateway_queue="2", llama_server_path=str(silent))
    await configure(api)
    model = api.services.registry.models[A]

    async with _waiting(api, 1):
        assert await of_model(api, query=ON_DEMAND) == await of_tier(api, query=ON_DEMAND) == READY
        async with _waiting(api, 1):
            assert await of_model(api, query=ON_DEMAND) == await of_tier(api, query=ON_DEMAND) == NOT_READY
            with pytest.raises(lanes.QueueFull):
                api.services.lanes.has_to_wait(model)
        assert await of_model(api, query=ON_DEMAND) == READY


@asynccontextmanager
async def _waiting(api: Api, number: int) -> AsyncIterator[None]:
    """Have so many more requests wait."""
    before = api.services.lanes.requests(A)
    asking = [asyncio.create_task(complete(api)) for _ in range(number)]

    async def wait() -> bool:
        return api.services.lanes.requests(A) == before + number

    await until(wait, "they wait", 10)
    yield
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)

    async def gone() -> bool:
        return api.services.lanes.requests(A) == before

    await until(gone, "they are gone", 10)


@ONE_LISTENER
async def test_one_that_is_to_leave_is_not_ready_while_it_answers_the_last(serve: Serve) -> None:
    api = await serve(A)
    await configure(api)
    await started(api, A)
    model = api.services.registry.models[A]

    async with api.services.lanes.entered(model):
        assert await of_model(api) == await of_tier(api) == READY
        leaving = asyncio.create_task(api.services.lanes.send_away(A, "test"))
        await asyncio.sleep(0.05)
        assert await api.state(A) == "ready"
        assert await of_model(api) == await of_tier(api) == NOT_READY
        assert await of_model(api, query=ON_DEMAND) == await of_tier(api, query=ON_DEMAND) == READY
    await leaving


@ONE_LISTENER
async def test_one_that_has_all_it_may_is_ready(serve: Serve) -> None:
    """Else all of a load balancer's hosts would be down whenever they are busy."""
    api = await serve(A)
    await configure(api, maxConcurrent=1)
    await started(api, A)

    async with api.services.lanes.entered(api.services.registry.models[A]):
        assert not api.services.lanes.is_open(A)
        assert await of_model(api) == await of_tier(api) == READY


@ONE_LISTENER
async def test_asking_is_no_use_and_starts_nothing(serve: Serve) -> None:
    api = await serve(A, B)
    await configure(api, A, idleTimeoutSeconds=2)
    await configure(api, B, idleTimeoutSeconds=2)
    assert (await complete(api)).status == 200
    answered = time.monotonic()
    paths = [f"models/{model_id}{query}" for model_id in (A, B) for query in ("", ON_DEMAND)]

    async def stopped() -> bool:
        for path in (*paths, "tiers/fast", f"tiers/fast{ON_DEMAND}", "auto", f"auto{ON_DEMAND}"):
            await api.ask("GET", f"/health/{path}")
        return await api.state(A) == "stopped"

    await until(stopped, "it is stopped", 20)

    assert time.monotonic() - answered < 6
    for model_id in (A, B):
        assert await api.state(model_id) == "stopped"
        assert not api.services.servers.is_wanted(model_id)


async def test_a_tier_is_ready_where_a_request_for_it_finds_a_model_that_is(serve: Serve) -> None:
    api = await serve(*MODELS)
    for model_id in MODELS:
        await configure(api, model_id, startPolicy="manual")

    for up in ([], [B], [B, C], [C], []):
        for model_id in MODELS:
            verb = "start" if model_id in up else "stop"
            (await api.ask("POST", f"/api/models/servers/{model_id}/{verb}?wait=60")).success()
        expected, status = (READY, 200) if up else (NOT_READY, 503)
        assert await of_tier(api) == await of_tier(api, query=ON_DEMAND) == expected
        assert (await complete(api, "tier:fast")).status == status
        assert await of_tier(api, "powerful") == NOT_READY
    assert (await complete(api, "tier:powerful")).status == 404


@ONE_LISTENER
async def test_of_a_tier_each_kind_is_asked_for_by_itself(serve: Serve) -> None:
    api = await serve(A, B)
    await configure(api, A)
    await configure(api, B, mode="embedding", pooling="mean")
    await started(api, B)

    kinds = {kind: await of_tier(api, query=f"?kind={kind}") for kind in Kind}

    assert kinds == {Kind.COMPLETION: NOT_READY, Kind.EMBEDDING: READY, Kind.RERANKING: NOT_READY}
    assert await of_tier(api) == NOT_READY
    started_for_it = {kind: await of_tier(api, query=f"{ON_DEMAND}&kind={kind}") for kind in Kind}
    assert started_for_it == {Kind.COMPLETION: READY, Kind.EMBEDDING: READY, Kind.RERANKING: NOT_READY}


@ONE_LISTENER
async def test_of_a_tier_the_one_is_looked_at_that_a_request_would_wait_for(serve: Serve) -> None:
    api = await serve(A, B)
    await configure(api, A)
    await configure(api, B)
    lane = api.services.lanes._lanes.setdefault(A, lanes._Lane())
    lane.failed_at = asyncio.get_running_loop().time()

    # The smallest, and of equal ones the first by id.
    assert [await of_model(api, model_id, ON_DEMAND) for model_id in (A, B)] == [NOT_READY, READY]
    assert await of_tier(api, query=ON_DEMAND) == NOT_READY
    # One that comes up already is waited for before that.
    (await api.ask("POST", f"/api/models/servers/{B}/start")).success(202)
    assert await api.state(B) in ("starting", "loading")
    assert await of_tier(api) == NOT_READY
    assert await of_tier(api, query=ON_DEMAND) == READY


@ONE_LISTENER
async def test_who_asks_an_agent_that_has_just_come_up_is_told_what_a_request_would_find(serve: Serve) -> None:
    api = await serve(A)
    await configure(api)
    await started(api, A)
    opening = api.services.opening._open
    opening.clear()

    asked = [asyncio.create_task(each) for each in (of_model(api), of_tier(api), of_auto(api))]
    done, _ = await asyncio.wait(asked, timeout=0.5)
    assert not done
    opening.set()

    assert await asyncio.gather(*asked) == [READY] * 3


@ONE_LISTENER
async def test_before_any_model_is_known_none_is_ready(serve: Serve) -> None:
    api = await serve(loaded=False)
    api.services.opening._open.set()

    for query in ("", ON_DEMAND):
        assert await of_model(api, query=query) == await of_tier(api, query=query) == NOT_READY
        assert await of_auto(api, query) == NOT_READY


HARD = {"prompt": "Prove step by step that the sum of two even numbers is even.", "max_tokens": 2}


async def to_auto(api: Api, body: dict[str, object]) -> int:
    return (await api.ask("POST", "/v1/completions", {"model": "auto", **body})).status


async def test_auto_is_ready_where_any_request_for_it_finds_a_model_that_is(serve: Serve) -> None:
    api = await serve(*MODELS)
    tiers = {A: "fast", B: "balanced", C: "powerful"}
    for model_id, tier in tiers.items():
        await configure(api, model_id, tier=tier, startPolicy="manual")

    # Where nothing would be started, whatever is up answers.
    for up in ([], [A], [B], [C], [A, C], []):
        for model_id in MODELS:
            verb = "start" if model_id in up else "stop"
            (await api.ask("POST", f"/api/models/servers/{model_id}/{verb}?wait=60")).success()
        expected, status = (READY, 200) if up else (NOT_READY, 503)
        assert await of_auto(api) == await of_auto(api, ON_DEMAND) == expected
        assert await to_auto(api, PROMPT) == await to_auto(api, HARD) == status


@ONE_LISTENER
async def test_auto_is_not_ready_where_some_request_for_it_would_have_a_model_started(serve: Serve) -> None:
    api = await serve(*MODELS)
    await configure(api, A)
    await configure(api, B, tier="powerful")
    assert (await of_auto(api), await of_auto(api, ON_DEMAND)) == (NOT_READY, READY)
    await started(api, A)
    assert (await of_auto(api), await of_auto(api, ON_DEMAND)) == (NOT_READY, READY)

    # The hard one would be started in vain.
    api.services.lanes._lanes.setdefault(B, lanes._Lane()).failed_at = asyncio.get_running_loop().time()
    assert await of_auto(api, ON_DEMAND) == NOT_READY
    api.services.lanes._lanes[B].failed_at = float("-inf")
    await started(api, B)
    assert await of_auto(api) == await of_auto(api, ON_DEMAND) == READY
    (await api.ask("POST", f"/api/models/servers/{A}/stop?wait=60")).success()
    assert (await of_auto(api), await of_auto(api, ON_DEMAND)) == (NOT_READY, READY)


@ONE_LISTENER
async def test_auto_is_what_the_active_profile_makes_of_it(serve: Serve) -> None:
    api = await serve(*MODELS)
    await configure(api, A)
    await configure(api, B, tier="powerful")
    await configure(api, C, tier="balanced", startPolicy="manual")
    await started(api, A)
    every = {"maxScore": None, "expectedTimeSeconds": 1, "description": ""}

    async def under(name: str, **profile: object) -> tuple[tuple[int, str], tuple[int, str]]:
        body = {"name": name, "enabledModels": MODELS, **profile}
        assert (await api.ask("POST", "/api/models/profiles", body)).status == 201
        (await api.ask("POST", f"/api/models/profiles/{name}/activate")).success()
        return await of_auto(api), await of_auto(api, ON_DEMAND)

    assert await under("all", tierConfig=[{"name": "fast", **every}]) == (READY, READY)
    assert await under("hard", tierConfig=[{"name": "powerful", **every}]) == (NOT_READY, READY)
    bounds = [{"name": "fast", **every, "maxScore": 4}, {"name": "balanced", **every, "maxScore": 3}]
    assert await under("unreachable", tierConfig=bounds) == (NOT_READY, READY)
    # What is drafted by the first is for the second, whatever tier it would have gone to.
    two_tiers = [{"name": "fast", **every, "maxScore": 3}, {"name": "balanced", **every}]
    await started(api, C)
    assert await under("apart", tierConfig=two_tiers) == (READY, READY)
    staged = {"enabled": True, "stage1Tier": "fast", "stage2Tier": "powerful"}
    assert await under("staged", tierConfig=two_tiers, twoStage=staged) == (NOT_READY, READY)


@ONE_LISTENER
async def test_a_model_that_is_called_auto_is_looked_at_in_its_place(serve: Serve) -> None:
    api = await serve(A, B)
    await configure(api, A, aliases=["auto"])
    await configure(api, B)
    await started(api, B)

    assert (await of_auto(api), await of_auto(api, ON_DEMAND)) == (NOT_READY, READY)
    assert await of_auto(api) == await of_model(api, "auto")
    await started(api, A)
    assert await of_auto(api) == await of_model(api, "auto") == READY


@ONE_LISTENER
async def test_what_sees_and_what_hears_is_asked_for_by_itself(
    serve: Serve, models: Path, toy_model: MakeToyModel
) -> None:
    write_toy_eye(models / f"mmproj-{B}.gguf")
    write_toy_ear(models / f"mmproj-{C}.gguf")
    api = await serve(*MODELS)
    for model_id in MODELS:
        await configure(api, model_id)
    senses = ["", "vision=true", "audio=true", "vision=true&audio=true", "vision=false&audio=false"]

    async def told(query: str) -> list[bool]:
        """Of a tier, and of ``auto``, what each of the senses is told: always the same of both."""
        of_tiers = [await of_tier(api, query=f"?{query}&{sense}") for sense in senses]
        assert of_tiers == [await of_auto(api, f"?{query}&{sense}") for sense in senses]
        return [each == READY for each in of_tiers]

    assert await told("onDemand=true") == [True, True, True, False, True]
    await started(api, A)
    assert await told("onDemand=false") == [True, False, False, False, True]
    await started(api, C)
    assert await told("onDemand=false") == [True, False, True, False, True]
    assert await told("onDemand=true") == [True, True, True, False, True]
    await started(api, B)
    assert await told("onDemand=false") == [True, True, True, False, True]
    assert await told("kind=embedding") == [False] * 5
