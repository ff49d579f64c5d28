"""Export of all choices, and import on the same host and on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.client import Api
from tests.api.conftest import Serve

CHOICES = {"tierOverride", "thinkingOverride", "enabled", "port", "runtimeSettings"}


async def choose(api: Api, low: int) -> None:
    for path, body in (
        ("api-one/tier", {"tier": "powerful"}),
        ("api-one/settings", {"ctxSize": 512, "lora": None, "aliases": ["the-one"], "cpuQuota": 1.5}),
        ("api-two/thinking", {"thinking": True}),
        ("api-two/enabled", {"enabled": True}),
        ("api-two/port", {"port": low + 2}),
    ):
        (await api.ask("PUT", f"/api/models/{path}", body)).success()
    profile = {"name": "Night Shift", "enabledModels": ["api-two"], "runtimeSettings": {"api-two": {"nThreads": 1}}}
    (await api.ask("POST", "/api/models/profiles", profile)).success(201)


async def test_what_is_exported_can_be_imported_where_nothing_was_chosen(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-one", "api-two", "api-three")
    low, high = (await api.get("/api/models/registry"))["portRange"]
    await choose(api, low)
    (await api.ask("PUT", "/api/models/port-range", {"portRange": [low + 1, high]})).success()

    export = await api.get("/api/export")

    assert (export["version"], sorted(export["models"]), list(export["profiles"])) == (
        1, ["api-one", "api-two"], ["night-shift"],
    )  # fmt: skip
    assert export["models"]["api-one"]["runtimeSettings"]["aliases"] == ["the-one"]
    await api.session.close()
    await api.agent.stop()
    for path in (tmp_path / "state").iterdir():
        path.unlink()
    (tmp_path / "profiles" / "night-shift.yaml").unlink()
    api = await serve("api-one", "api-two", "api-three")
    assert (await api.get("/api/export"))["models"] == {}

    trial = (await api.ask("POST", "/api/import?dryRun=true", export)).success()

    assert (trial["dryRun"], trial["changed"], trial["profiles"]) == (True, ["api-one", "api-two"], ["night-shift"])
    assert (await api.get("/api/export"))["models"] == {}, "a dry run changes nothing"
    assert await api.get("/api/models/profiles") == []

    report = (await api.ask("POST", "/api/import", export)).success()

    assert {**report, "message": trial["message"], "dryRun": True} == trial
    again = await api.get("/api/export")
    assert {**again, "exportedAt": export["exportedAt"]} == export
    repeated = (await api.ask("POST", "/api/import", export)).success()
    assert (repeated["changed"], repeated["profiles"], repeated["problems"]) == ([], [], [])
    assert (await api.get("/api/models/servers"))["totalServers"] == 0, "what runs is not touched"


async def test_a_model_of_another_id_is_told_by_its_content(serve: Serve, models: Path) -> None:
    api = await serve("api-here")
    (await api.ask("PUT", "/api/models/api-here/tier", {"tier": "fast"})).success()
    export = await api.get("/api/export")
    sent = export["models"].pop("api-here")
    sent["tierOverride"] = "powerful"
    export["models"] = {"called-otherwise-there": sent, "api-nowhere": {"enabled": True, "fingerprint": "00"}}

    report = (await api.ask("POST", "/api/import", export)).success()

    assert (report["changed"], report["unknown"]) == (["api-here"], ["api-nowhere"])
    assert (await api.model("api-here"))["tierOverride"] == "powerful"


async def test_a_port_that_is_given_here_stays_where_it_is(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/api-one/port", {"port": low})).success()
    export = await api.get("/api/export")
    export["models"] = {"api-two": {"port": low, "enabled": True}}

    report = (await api.ask("POST", "/api/import", export)).success()

    assert report["problems"] == [f"api-two: port {low} is given to api-one here, so it keeps what it has"]
    two = await api.model("api-two")
    assert (two["enabled"], two["port"]) == (True, None)
    assert (await api.model("api-one"))["port"] == low


async def test_ports_may_change_places(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    for name, port in (("api-one", low), ("api-two", low + 1)):
        (await api.ask("PUT", f"/api/models/{name}/port", {"port": port})).success()
    export = await api.get("/api/export")
    export["models"]["api-one"]["port"], export["models"]["api-two"]["port"] = low + 1, low

    report = (await api.ask("POST", "/api/import", export)).success()

    assert (report["changed"], report["problems"]) == (["api-one", "api-two"], [])
    assert (await api.model("api-one"))["port"] == low + 1


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"version": 2},
        {"version": 1, "models": []},
        {"version": 1, "models": {"api-one": {"port": 0}}},
        {"version": 1, "models": {"api-one": {"runtimeSettings": {"ctxSize": -1}}}},
        {"version": 1, "models": {"api-one": {"runtimeSettings": {"memoryHigh": 2, "memoryMax": 1}}}},
        {"version": 1, "profiles": {"x": {"name": "x", "runtimeSettings": {"y": {"memoryHigh": 2, "memoryMax": 1}}}}},
        {"version": 1, "unknown": 1},
    ],
)
async def test_what_is_no_export_changes_nothing(serve: Serve, bad: dict[str, Any]) -> None:
    api = await serve("api-one")
    before = await api.get("/api/export")

    (await api.ask("POST", "/api/import", bad)).failure(422, "ValidationError")

    assert {**(await api.get("/api/export")), "exportedAt": None} == {**before, "exportedAt": None}


async def test_operators_profiles_and_missing_ones_are_named(serve: Serve, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "fixed.yaml").write_text("profile: {name: fixed}\n")
    api = await serve(profiles_path=f"{theirs}:{tmp_path / 'profiles'}")
    export = await api.get("/api/export")
    assert export["profiles"] == {}, "what the operator owns is not ours to give"
    export |= {
        "profiles": {"fixed": {"name": "fixed", "enabledModels": ["x"]}, "..": {"name": "x"}},
        "activeProfile": "gone",
    }

    report = (await api.ask("POST", "/api/import", export)).success()

    assert report["profiles"] == []
    assert len(report["problems"]) == 3
    assert all(any(word in problem for problem in report["problems"]) for word in ("fixed", "..", "gone"))
    assert json.loads(json.dumps(report["problems"]))
