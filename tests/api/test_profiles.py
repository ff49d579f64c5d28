"""The endpoints for profiles, on real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from magi_agent.runtime_settings.settings import setting_names, wire_name
from tests.api.conftest import Serve

DEFAULTS: dict[str, Any] = {
    "enabledModels": [],
    "twoStage": {"enabled": False, "stage1Tier": "balanced", "stage2Tier": "powerful", "stage1MaxTokens": 500},
    "loadBalancing": {"enabled": True, "strategy": "round_robin", "healthCheckInterval": 30.0},
    "runtimeSettings": {},
}


async def test_a_profile_from_creation_to_deletion(serve: Serve, tmp_path: Path) -> None:
    api = await serve()
    assert await api.get("/api/models/profiles") == []

    created = await api.ask("POST", "/api/models/profiles", {"name": "Night Shift_2", "description": "quiet"})

    assert created.success(201) == {
        "message": "Profile 'Night Shift_2' created successfully",
        "profileName": "night-shift-2",
        "path": str(tmp_path / "profiles" / "night-shift-2.yaml"),
    }
    assert created.headers["Location"] == "/api/models/profiles/night-shift-2"
    assert await api.get("/api/models/profiles") == ["night-shift-2"]
    profile = await api.get(created.headers["Location"])
    assert list(profile) == [
        "name", "description", "enabledModels", "tierConfig", "twoStage", "loadBalancing", "runtimeSettings",
    ]  # fmt: skip
    assert (profile["name"], profile["description"]) == ("Night Shift_2", "quiet")
    assert {key: profile[key] for key in DEFAULTS} == DEFAULTS
    assert [(tier["name"], tier["maxScore"], tier["expectedTimeSeconds"]) for tier in profile["tierConfig"]] == [
        ("fast", 3.0, 2.0), ("balanced", 7.0, 5.0), ("powerful", None, 15.0),
    ]  # fmt: skip
    stored = yaml.safe_load(Path(created.body["path"]).read_text())  # noqa: ASYNC240  # a moment's work
    assert stored["profile"] == {"name": "Night Shift_2", "description": "quiet"}

    deleted = await api.ask("DELETE", "/api/models/profiles/night-shift-2")

    assert deleted.success() == {"message": "Profile 'night-shift-2' deleted successfully"}
    details = (await api.ask("DELETE", "/api/models/profiles/night-shift-2")).failure(404, "ProfileNotFound")
    assert details["availableProfiles"] == []


@pytest.mark.parametrize("camel", [True, False])
async def test_a_body_may_be_camel_case_or_snake_case(serve: Serve, camel: bool) -> None:
    api = await serve()
    body = {
        "name": "full",
        "enabledModels": ["api-one"],
        "tierConfig": [{"name": "fast", "maxScore": None, "expectedTimeSeconds": 1, "description": "all"}],
        "twoStage": {"enabled": True, "stage1Tier": "fast", "stage2Tier": "balanced", "stage1MaxTokens": 9},
        "loadBalancing": {"enabled": False, "strategy": "least_loaded", "healthCheckInterval": 5},
        "runtimeSettings": {"api-one": {"nGpuLayers": 7, "ctxSize": 4096, "nThreads": 2, "batchSize": 64}},
    }
    snake = {
        "name": "full",
        "enabled_models": ["api-one"],
        "tier_config": [{"name": "fast", "max_score": None, "expected_time_seconds": 1, "description": "all"}],
        "two_stage": {"enabled": True, "stage1_tier": "fast", "stage2_tier": "balanced", "stage1_max_tokens": 9},
        "load_balancing": {"enabled": False, "strategy": "least_loaded", "health_check_interval": 5},
        "runtime_settings": {"api-one": {"n_gpu_layers": 7, "ctx_size": 4096, "n_threads": 2, "batch_size": 64}},
    }

    (await api.ask("POST", "/api/models/profiles", body if camel else snake)).success(201)

    told = await api.get("/api/models/profiles/full")
    settings = told["runtimeSettings"].pop("api-one")
    assert told == {**body, "description": "", "runtimeSettings": {}}
    said = {name: value for name, value in settings.items() if value is not None}
    assert said == {"nGpuLayers": 7, "ctxSize": 4096, "nThreads": 2, "batchSize": 64}
    assert settings.keys() == {wire_name(name) for name in setting_names()}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"ctxSize": "4096"}, "ctxSize"),
        ({"ctx_size": -1}, "ctxSize"),
        ({"mmap": 1}, "mmap"),
        ({"xyzzy": 1}, "xyzzy"),
        ({"lora": [{"path": "/m/a.gguf", "size": 1}]}, "lora.0.size"),
        ({"lora": [{"path": "a.gguf"}]}, "lora"),
        ({"aliases": ["a", "a"]}, "aliases"),
        ({"memoryHigh": 2, "memoryMax": 1}, "memoryHigh"),
    ],
)
async def test_runtime_settings_that_are_none_are_refused_with_the_place(
    serve: Serve, settings: dict[str, Any], field: str
) -> None:
    api = await serve()
    body = {"name": "night", "runtimeSettings": {"api-one": settings}}

    details = (await api.ask("POST", "/api/models/profiles", body)).failure(422, "ValidationError")

    assert [error["field"] for error in details["errors"]] == [f"runtimeSettings.api-one.{field}"]
    assert "keyword" not in details["errors"][0]["message"] or field == "lora.0.size"
    assert await api.get("/api/models/profiles") == []


async def test_profiles_are_listed_by_slug_sorted(serve: Serve) -> None:
    api = await serve()
    for name in ("zebra", "Ant Hill", "ärmel", "mole"):
        created = await api.ask("POST", "/api/models/profiles", {"name": name})
        created.success(201)
        assert (await api.get(created.headers["Location"]))["name"] == name

    assert await api.get("/api/models/profiles") == ["ant-hill", "mole", "zebra", "ärmel"]


async def test_a_profile_that_is_there_already(serve: Serve) -> None:
    api = await serve()
    (await api.ask("POST", "/api/models/profiles", {"name": "day", "description": "first"})).success(201)

    details = (await api.ask("POST", "/api/models/profiles", {"name": "DAY"})).failure(409, "ProfileExists")

    assert details == {"profileName": "day"}
    assert (await api.get("/api/models/profiles/day"))["description"] == "first"


async def test_a_profile_that_is_not_there(serve: Serve) -> None:
    api = await serve()
    (await api.ask("POST", "/api/models/profiles", {"name": "day"})).success(201)

    for method, body in (("GET", None), ("DELETE", None), ("PUT", {"name": "night"})):
        details = (await api.ask(method, "/api/models/profiles/night", body)).failure(404, "ProfileNotFound")
        assert details == {"profileName": "night", "availableProfiles": ["day"]}


@pytest.mark.parametrize(
    "name", ["", "  ", ".hidden", "../escape", "a/b", "active", "Active", "x" * 101, "tab\tstop\n/"]
)
async def test_a_name_that_no_profile_can_have(serve: Serve, name: str, tmp_path: Path) -> None:
    api = await serve()

    details = (await api.ask("POST", "/api/models/profiles", {"name": name})).failure(422, "ValidationError")

    assert details["errors"][0]["field"] == "name"
    assert details["errors"][0]["message"]
    assert await api.get("/api/models/profiles") == []
    assert not list(tmp_path.glob("**/*.yaml"))  # noqa: ASYNC240


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", ".hidden"])
async def test_a_path_that_leads_to_no_profile(serve: Serve, name: str) -> None:
    api = await serve()

    assert (await api.ask("GET", f"/api/models/profiles/{name}")).failure(404, "ProfileNotFound")


async def test_a_profile_is_replaced(serve: Serve) -> None:
    api = await serve()
    (await api.ask("POST", "/api/models/profiles", {"name": "day", "description": "first"})).success(201)

    body = (await api.ask("PUT", "/api/models/profiles/day", {"name": "Day", "enabledModels": ["api-one"]})).success()

    assert (body["message"], body["profileName"]) == ("Profile 'Day' replaced successfully", "day")
    profile = await api.get("/api/models/profiles/day")
    assert (profile["name"], profile["description"], profile["enabledModels"]) == ("Day", "", ["api-one"])
    details = (await api.ask("PUT", "/api/models/profiles/day", {"name": "night"})).failure(422, "ValidationError")
    assert details["errors"][0]["field"] == "name"


@pytest.mark.parametrize("named", ["{name: Our team}", "{name: 'Team! (ours)'}", "{}"])
async def test_a_profile_of_a_file_of_another_name_is_put_back_as_it_was_got(
    serve: Serve, tmp_path: Path, named: str
) -> None:
    api = await serve()
    folder = tmp_path / "profiles"
    folder.mkdir(exist_ok=True)
    file = folder / "Team.yaml"
    file.write_text(f"profile: {named}\n")
    profile = await api.get("/api/models/profiles/Team")

    body = (await api.ask("PUT", "/api/models/profiles/Team", {**profile, "description": "ours"})).success()

    assert body["path"] == str(file)
    assert await api.get("/api/models/profiles/Team") == {**profile, "description": "ours"}
    assert await api.get("/api/models/profiles") == ["Team"]
    other = await api.ask("PUT", "/api/models/profiles/Team", {"name": "night"})
    assert other.failure(422, "ValidationError")["errors"][0]["field"] == "name"


@pytest.mark.parametrize(
    "content",
    [
        "tier_config: [{name: ''}]\n",
        "tier_config: [" + "{name: fast}, " * 101 + "]\n",
        f"enabled_models: [{'x' * 301}]\n",
        f"runtime_settings: {{{'x' * 301}: {{}}}}\n",
    ],
)
async def test_a_file_that_holds_what_cannot_be_told_is_no_profile(serve: Serve, tmp_path: Path, content: str) -> None:
    api = await serve()
    (await api.ask("POST", "/api/models/profiles", {"name": "day"})).success(201)
    (tmp_path / "profiles" / "odd.yaml").write_text(content)

    assert await api.get("/api/models/profiles") == ["day"]
    details = (await api.ask("GET", "/api/models/profiles/odd")).failure(500, "ProfileInvalid")
    assert details["line"] == 1
    assert list((await api.get("/api/export"))["profiles"]) == ["day"]


async def test_a_profile_called_like_a_choice_is_a_profile(serve: Serve) -> None:
    api = await serve()
    for name in ("tier", "enabled"):
        (await api.ask("POST", "/api/models/profiles", {"name": name})).success(201)
        body = {"name": name, "description": "again"}
        assert (await api.ask("PUT", f"/api/models/profiles/{name}", body)).success()["profileName"] == name


async def test_the_active_profile_is_not_deleted(serve: Serve) -> None:
    api = await serve()
    (await api.ask("POST", "/api/models/profiles", {"name": "day"})).success(201)
    await api.services.active_profile.activate("day", by="test")

    details = (await api.ask("DELETE", "/api/models/profiles/day")).failure(409, "ProfileActive")

    assert details == {"profileName": "day"}
    assert await api.get("/api/models/profiles") == ["day"]
    assert (await api.get("/health/ready"))["activeProfile"] == "day"


async def test_an_operators_profile_is_not_changed(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "operator"
    folder.mkdir()
    (folder / "day.yaml").write_text("profile: {name: Day}\nenabled_models: []\n")
    api = await serve(profiles_path=f"{folder}:{tmp_path}/profiles")

    for method, body in (("DELETE", None), ("PUT", {"name": "day"})):
        details = (await api.ask(method, "/api/models/profiles/day", body)).failure(409, "ProfileReadOnly")
        assert details["path"] == str(folder / "day.yaml")
    assert (await api.get("/api/models/profiles/day"))["name"] == "Day"


async def test_a_profile_that_cannot_be_read_harms_no_other(serve: Serve, tmp_path: Path) -> None:
    api = await serve()
    (await api.ask("POST", "/api/models/profiles", {"name": "day"})).success(201)
    broken = tmp_path / "profiles" / "broken.yaml"
    broken.write_text("profile: {name: Broken}\nenabled_models: 7\n")

    assert await api.get("/api/models/profiles") == ["day"]
    details = (await api.ask("GET", "/api/models/profiles/broken")).failure(500, "ProfileInvalid")
    assert (details["line"], details["path"]) == (2, str(broken))
    assert "enabled_models" in details["reason"]
    ready = await api.get("/health/ready")
    assert any(str(broken) in problem and "line 2" in problem for problem in ready["problems"])
