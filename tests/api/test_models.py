"""The endpoints for models: what is listed, and what people choose."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from magi_agent.runtime_settings.settings import setting_names, wire_name
from tests.api.client import until
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel, SampleModels

MODEL_KEYS = [
    "filePath", "filename", "family", "version", "sizeParams", "quantization", "isThinkingModel", "thinkingOverride",
    "isInstruct", "isCoder", "assignedTier", "tierOverride", "port", "enabled", "nGpuLayers", "ctxSize", "nThreads",
    "batchSize", "modelId",
]  # fmt: skip
"""As the contract orders them; what this agent adds comes after."""
ADDED_KEYS = {
    "displayName", "effectiveTier", "effectiveThinking", "architecture", "contextLength", "sizeBytes", "parts",
    "projectors", "hasVision", "hasAudio", "isEmbedding", "isReranker", "chatTemplate", "status", "problem",
    "parameterCount", "activeParams", "thinkingMode", "startPolicy", "runtimeSettings",
}  # fmt: skip

NOTHING_SAID = {wire_name(name): None for name in setting_names()}
"""Runtime settings that leave everything to the defaults."""


async def test_the_registry_lists_models_with_keys_in_the_contracts_order(
    serve: Serve, models: Path, sample_models: SampleModels
) -> None:
    shutil.copyfile(sample_models.smollm2, models / "api-SmolLM2-135M-Instruct.Q4_1.gguf")
    api = await serve("api-toy", model_scan_path=f"{models}:{models}/more")

    registry = await api.get("/api/models/registry")

    assert list(registry)[:5] == ["models", "scanPath", "lastScan", "portRange", "tierThresholds"]
    assert registry["scanPath"] == f"{models}:{models}/more"
    assert registry["scanPaths"] == [str(models), f"{models}/more"]
    assert registry["lastScan"].endswith("Z")
    assert registry["portRange"] == list(api.agent.settings.port_range)
    assert registry["tierThresholds"] == {"powerful_min": 14.0, "fast_max": 7.0}
    assert set(registry["models"]) == {"api-toy", "api-smollm2-135m-instruct.q4_1"}
    for model_id, model in registry["models"].items():
        assert list(model)[: len(MODEL_KEYS)] == MODEL_KEYS
        assert set(model) >= ADDED_KEYS
        assert model["modelId"] == model_id
    model = registry["models"]["api-smollm2-135m-instruct.q4_1"]
    assert (model["quantization"], model["sizeParams"], model["isInstruct"]) == ("q4_1", 0.135, True)
    assert (model["assignedTier"], model["chatTemplate"], model["status"]) == ("fast", True, "ok")
    assert model["runtimeSettings"] == NOTHING_SAID


async def test_a_path_that_is_no_utf8_is_listed_as_json_can_carry_it(
    serve: Serve, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / os.fsdecode(b"api-odd-\xff.gguf"))
    api = await serve()

    listed = (await api.get("/api/models/registry"))["models"]

    assert [model["filename"] for model in listed.values()] == ["api-odd-\ufffd.gguf"]


async def test_a_registry_of_half_a_megabyte_arrives_whole(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    for number in range(300):
        toy_model(models / f"api-{'long-' * 30}{number}.gguf")
    api = await serve()

    get, head = await api.ask("GET", "/api/models/registry"), await api.ask("HEAD", "/api/models/registry")

    assert len(get.success()["models"]) == 300
    assert len(get.content) > 500_000
    assert head.headers["Content-Length"] == get.headers["Content-Length"] == str(len(get.content))
    assert (head.status, head.content) == (200, b"")
    small = await api.ask("GET", "/api/models/servers")
    assert set(small.headers) == set(get.headers), "whatever its size, an answer has the same headers"
    assert small.headers["Content-Type"] == get.headers["Content-Type"]


async def test_one_model_comes_with_its_server(serve: Serve) -> None:
    api = await serve("api-one")

    model = await api.get("/api/models/api-one")

    server = model.pop("server")
    assert model == await api.model("api-one")
    assert (server["modelId"], server["state"], server["pid"]) == ("api-one", "stopped", None)


@pytest.mark.parametrize("path", ["/api/models/api-none", "/api/models/servers/api-none", "/api/models/start-all"])
async def test_a_model_that_is_not_there(serve: Serve, path: str) -> None:
    api = await serve()

    details = (await api.ask("GET", path)).failure(404, "ModelNotFound")

    assert details == {"modelId": path.rpartition("/")[2]}


@pytest.mark.parametrize("verb", ["tier", "thinking", "enabled"])
async def test_a_choice_for_a_model_that_is_not_there(serve: Serve, verb: str) -> None:
    api = await serve()

    reply = await api.ask("PUT", f"/api/models/api-none/{verb}", {verb: None})

    assert reply.failure(404, "ModelNotFound") == {"modelId": "api-none"}


async def test_a_model_that_is_called_like_a_verb_is_a_model(serve: Serve) -> None:
    api = await serve("start-all", "tier")

    assert (await api.get("/api/models/start-all"))["modelId"] == "start-all"
    assert (await api.get("/api/models/servers/start-all"))["modelId"] == "start-all"
    assert (await api.ask("POST", "/api/models/servers/start-all?wait=5")).success()["kind"] == "start-all"
    assert (await api.ask("PUT", "/api/models/tier/tier", {"tier": "fast"})).success()["modelId"] == "tier"


async def test_a_reserved_word_is_no_models_id(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    for name in ("registry", "rescan"):
        toy_model(models / f"{name}.gguf")
    api = await serve()

    listed = (await api.get("/api/models/registry"))["models"]

    assert len(listed) == 2
    assert not {"registry", "rescan"} & set(listed)
    assert (await api.ask("GET", "/api/models/rescan")).failure(405, "MethodNotAllowed")
    assert (await api.ask("PUT", "/api/models/registry/tier", {"tier": "fast"})).failure(404, "NotFound")


async def test_a_tier_is_overridden_and_cleared(serve: Serve) -> None:
    api = await serve("api-one")
    assigned = (await api.model("api-one"))["assignedTier"]

    body = (await api.ask("PUT", "/api/models/api-one/tier", {"tier": "powerful"})).success()

    assert body == {
        "message": "Tier updated for api-one",
        "modelId": "api-one",
        "tier": "powerful",
        "override": True,
    }
    model = await api.model("api-one")
    assert (model["tierOverride"], model["effectiveTier"], model["assignedTier"]) == ("powerful", "powerful", assigned)
    assert [model["modelId"] for model in await api.get("/api/models/tiers/powerful")] == ["api-one"]
    body = (await api.ask("PUT", "/api/models/api-one/tier", {"tier": None})).success()
    assert (body["tier"], body["override"]) == (None, True)
    assert (await api.model("api-one"))["effectiveTier"] == assigned


async def test_a_tier_that_is_none(serve: Serve) -> None:
    api = await serve("api-one")

    for reply in (
        await api.ask("PUT", "/api/models/api-one/tier", {"tier": "gigantic"}),
        await api.ask("GET", "/api/models/tiers/gigantic"),
    ):
        assert reply.failure(400, "InvalidTier") == {
            "tier": "gigantic",
            "validTiers": ["fast", "balanced", "powerful"],
        }
    assert (await api.model("api-one"))["tierOverride"] is None


async def test_tiers_list_models_by_their_effective_tier(serve: Serve) -> None:
    api = await serve("api-one-3b-q4_0", "api-two-3b-q4_0")
    before = {tier: await api.get(f"/api/models/tiers/{tier}") for tier in ("fast", "balanced", "powerful")}

    (await api.ask("PUT", "/api/models/api-one-3b-q4_0/tier", {"tier": "powerful"})).success()

    assert sum(map(len, before.values())) == 2
    registry = (await api.get("/api/models/registry"))["models"]
    for tier in before:
        listed = await api.get(f"/api/models/tiers/{tier}")
        assert listed == [model for model in registry.values() if model["effectiveTier"] == tier]


async def test_thinking_moves_a_model_to_powerful_where_nobody_chose_a_tier(serve: Serve) -> None:
    api = await serve("api-one")

    body = (await api.ask("PUT", "/api/models/api-one/thinking", {"thinking": True})).success()

    assert body == {
        "message": "Thinking capability updated for api-one",
        "modelId": "api-one",
        "thinking": True,
        "override": True,
        "tierChanged": True,
    }
    model = await api.model("api-one")
    assert (model["tierOverride"], model["thinkingOverride"], model["effectiveThinking"]) == ("powerful", True, True)
    assert model["isThinkingModel"] is False


async def test_thinking_leaves_a_chosen_tier_alone(serve: Serve) -> None:
    api = await serve("api-one")
    (await api.ask("PUT", "/api/models/api-one/tier", {"tier": "fast"})).success()

    body = (await api.ask("PUT", "/api/models/api-one/thinking", {"thinking": True})).success()

    assert body["tierChanged"] is False
    assert (await api.model("api-one"))["tierOverride"] == "fast"


async def test_thinking_off_leaves_the_tier_to_discovery(serve: Serve) -> None:
    api = await serve("api-one")

    body = (await api.ask("PUT", "/api/models/api-one/thinking", {"thinking": False})).success()

    assert (body["tierChanged"], body["override"]) == (False, True)
    model = await api.model("api-one")
    assert (model["tierOverride"], model["thinkingOverride"], model["effectiveThinking"]) == (None, False, False)


@pytest.mark.parametrize("thinking", [False, None])
async def test_thinking_off_or_cleared_never_touches_the_tier(serve: Serve, thinking: bool | None) -> None:
    api = await serve("api-one")
    (await api.ask("PUT", "/api/models/api-one/thinking", {"thinking": True})).success()

    body = (await api.ask("PUT", "/api/models/api-one/thinking", {"thinking": thinking})).success()

    assert (body["thinking"], body["tierChanged"], body["override"]) == (thinking, False, True)
    model = await api.model("api-one")
    assert (model["tierOverride"], model["thinkingOverride"]) == ("powerful", thinking)


async def test_enabling_sets_the_choice_alone_and_gives_a_port(serve: Serve) -> None:
    api = await serve("api-one")

    body = (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})).success()

    assert body == {
        "message": "Model api-one enabled",
        "modelId": "api-one",
        "enabled": True,
        "restartRequired": True,
    }
    model = await api.model("api-one")
    assert (model["enabled"], model["port"]) == (True, api.agent.settings.port_range[0])
    assert await api.state("api-one") == "stopped"
    body = (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": False})).success()
    assert (body["message"], body["restartRequired"]) == ("Model api-one disabled", False)
    assert (await api.model("api-one"))["port"] == model["port"], "a port once given stays"


async def test_a_model_whose_files_are_not_whole_cannot_be_enabled_but_disabled(
    serve: Serve, models: Path, toy_model: MakeToyModel
) -> None:
    path = toy_model(models / "api-cut.gguf")
    os.truncate(path, path.stat().st_size - 1000)
    api = await serve()

    details = (await api.ask("PUT", "/api/models/api-cut/enabled", {"enabled": True})).failure(409, "ModelNotUsable")

    assert (details["modelId"], details["status"]) == ("api-cut", "incomplete")
    assert (await api.model("api-cut"))["enabled"] is False
    assert (await api.ask("PUT", "/api/models/api-cut/enabled", {"enabled": False})).success()["enabled"] is False
    start = await api.ask("POST", "/api/models/servers/api-cut/start")
    assert start.failure(409, "ModelNotUsable")["modelId"] == "api-cut"


async def test_no_port_is_left(serve: Serve, options: dict[str, str]) -> None:
    first = options["port_range"].partition("-")[0]
    api = await serve("api-one", "api-two", port_range=f"{first}-{first}")
    (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})).success()

    reply = await api.ask("PUT", "/api/models/api-two/enabled", {"enabled": True})

    assert reply.failure(409, "NoFreePort")["portRange"] == [int(first), int(first)]
    assert (await api.model("api-two"))["enabled"] is False
    start = await api.ask("POST", "/api/models/servers/api-two/start")
    assert start.failure(409, "NoFreePort")


async def test_a_rescan_says_what_it_found(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    api = await serve("api-one", "api-two")
    (await api.ask("PUT", "/api/models/api-two/tier", {"tier": "powerful"})).success()
    (models / "api-one.gguf").unlink()

    body = (await api.ask("POST", "/api/models/rescan")).success()

    assert body["message"] == "Re-scan completed successfully"
    assert body["modelsFound"] == 1
    assert list(body) == ["message", "modelsFound", "modelsAdded", "modelsRemoved", "timestamp"]
    assert body["timestamp"].endswith("Z")
    assert set((await api.get("/api/models/registry"))["models"]) == {"api-two"}
    assert (await api.model("api-two"))["tierOverride"] == "powerful"


async def test_a_rescan_of_folders_that_are_not_there_fails_and_keeps_what_is_known(serve: Serve, models: Path) -> None:
    api = await serve("api-one")
    os.rename(models, f"{models}-elsewhere")  # noqa: PTH104  # a moment's work

    details = (await api.ask("POST", "/api/models/rescan")).failure(500, "RescanFailed")

    assert list(details["folders"]) == [str(models)]
    assert "api-one" in (await api.get("/api/models/registry"))["models"]


async def test_an_error_may_name_a_path_that_is_no_utf8(serve: Serve, tmp_path: Path) -> None:
    api = await serve(model_scan_path=os.fsdecode(os.fsencode(tmp_path) + b"/odd-\xff"))

    reply = await api.ask("POST", "/api/models/rescan")

    assert list(reply.failure(500, "RescanFailed")["folders"]) == [f"{tmp_path}/odd-\ufffd"]
    assert f"{tmp_path}/odd-\ufffd" in reply.body["message"]
    assert (await api.get("/api/models/registry"))["scanPaths"] == [f"{tmp_path}/odd-\ufffd"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/models/registry", None),
        ("GET", "/api/models/tiers/fast", None),
        ("GET", "/api/models/api-one", None),
        ("PUT", "/api/models/api-one/tier", {"tier": "fast"}),
        ("PUT", "/api/models/api-one/thinking", {"thinking": True}),
        ("PUT", "/api/models/api-one/enabled", {"enabled": True}),
    ],
)
async def test_before_the_registry_is_loaded(serve: Serve, method: str, path: str, body: object) -> None:
    api = await serve(loaded=False)

    assert (await api.ask(method, path, body)).failure(503, "ServiceUnavailable") == {"service": "registry"}
    ready = await api.ask("GET", "/health/ready")
    assert (ready.status, ready.body["status"], ready.body["models"]) == (503, "not_ready", 0)
    assert "the registry is not loaded yet; try again in a moment" in ready.body["problems"]
    assert (await api.ask("GET", "/health/live")).success() == {"status": "alive"}


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_one_schema_of_runtime_settings_is_published_for_all(serve: Serve) -> None:
    api = await serve()
    document = await api.get("/api/openapi.json")
    schemas = document["components"]["schemas"]

    assert [name for name in schemas if "RuntimeSettings" in name] == ["RuntimeSettings"]
    assert list(schemas["RuntimeSettings"]["properties"]) == [wire_name(name) for name in setting_names()]
    assert schemas["RuntimeSettings"]["additionalProperties"] is False
    holders = [
        f"{name}.{key}"
        for name, schema in schemas.items()
        for key, about in schema.get("properties", {}).items()
        if "#/components/schemas/RuntimeSettings" in str(about)
    ]
    assert len(holders) >= 3, holders
    change = document["paths"]["/api/models/{modelId}/settings"]["put"]["requestBody"]["content"]["application/json"]
    assert change["schema"] == {"$ref": "#/components/schemas/RuntimeSettings"}


async def test_a_choice_alone_is_not_carried_out_because_another_model_came(
    serve: Serve, models: Path, toy_model: MakeToyModel
) -> None:
    api = await serve("api-chosen")
    (await api.ask("PUT", "/api/models/api-chosen/enabled", {"enabled": True})).success()

    toy_model(models / "api-newcomer.gguf")

    async def listed() -> bool:
        return "api-newcomer" in (await api.get("/api/models/registry"))["models"]

    await until(listed, "the new one is listed")
    await asyncio.sleep(0.2)  # in which it would have been wanted
    assert (await api.get("/api/models/servers"))["totalServers"] == 0
