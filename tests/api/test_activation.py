"""Activating profiles: the plan, the difference, and what is left alone."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel

WAIT = "wait=60"


async def profile(api: Api, name: str, *models: str, **more: Any) -> None:
    (await api.ask("POST", "/api/models/profiles", {"name": name, "enabledModels": list(models), **more})).success(201)


async def activate(api: Api, name: str) -> Any:
    return (await api.ask("POST", f"/api/models/profiles/{name}/activate?{WAIT}")).success()


async def test_activation_is_a_difference(serve: Serve) -> None:
    api = await serve("api-stays", "api-goes", "api-comes")
    await profile(api, "day", "api-stays", "api-goes")
    await profile(api, "night", "api-stays", "api-comes", "api-nobody", runtimeSettings={"api-stays": {"ctxSize": 256}})
    day = await activate(api, "day")
    assert (day["start"], day["stop"], day["keep"]) == (["api-goes", "api-stays"], [], [])
    before = await api.get("/api/models/servers/api-stays")
    assert before["state"] == "ready"

    plan = (await api.ask("POST", "/api/models/profiles/night/activate?dryRun=true")).success()

    assert plan == {
        "message": "Profile 'night' would be activated",
        "profile": "night",
        "dryRun": True,
        "enable": ["api-comes"],
        "disable": ["api-goes"],
        "start": ["api-comes"],
        "stop": ["api-goes"],
        "restart": ["api-stays"],
        "keep": ["api-stays"],
        "absent": [],
        "unknown": ["api-nobody"],
        "unusable": {},
        "insufficientMemory": {},
        "settingsNotUsable": {},
        "warnings": {},
        "operationId": None,
    }
    assert (await api.get("/api/models/profiles/active"))["name"] == "day"
    assert (await api.get("/api/models/servers/api-goes"))["state"] == "ready"

    begun = await api.ask("POST", "/api/models/profiles/night/activate")

    done = begun.success(202)
    assert {key: done[key] for key in ("enable", "disable", "start", "stop", "restart", "keep", "unknown")} == {
        key: plan[key] for key in ("enable", "disable", "start", "stop", "restart", "keep", "unknown")
    }
    assert begun.headers["Location"] == f"/api/operations/{done['operationId']}"

    async def ended() -> bool:
        return bool((await api.get(begun.headers["Location"]))["status"] == "succeeded")

    await until(ended, "the activation is through")
    operation = await api.get(begun.headers["Location"])
    assert operation["kind"] == "activate"
    assert {name: part["state"] for name, part in operation["models"].items()} == {
        "api-comes": "ready", "api-goes": "stopped",
    }  # fmt: skip
    stays = await api.get("/api/models/servers/api-stays")
    assert (stays["pid"], stays["restartRequired"]) == (before["pid"], True), "told, and not touched"
    models = (await api.get("/api/models/registry"))["models"]
    assert [name for name, model in models.items() if model["enabled"]] == ["api-comes", "api-stays"]
    active = await api.get("/api/models/profiles/active")
    assert (active["name"], active["profile"]["name"], active["problem"]) == ("night", "night", None)
    assert (await api.get("/api/models/api-stays/settings"))["sources"] == {"ctxSize": "profile"}
    again = await activate(api, "night")
    assert (again["enable"], again["disable"], again["start"], again["stop"]) == ([], [], [], [])


async def test_models_that_wait_for_a_request_or_a_person_are_enabled_and_not_started(serve: Serve) -> None:
    api = await serve("api-lazy", "api-hand")
    (await api.ask("PUT", "/api/models/api-hand/settings", {"startPolicy": "manual"})).success()
    await profile(api, "idle", "api-lazy", "api-hand", runtimeSettings={"api-lazy": {"startPolicy": "onDemand"}})

    plan = (await api.ask("POST", "/api/models/profiles/idle/activate?dryRun=true")).success()
    done = await activate(api, "idle")

    assert (plan["enable"], plan["start"]) == (done["enable"], [])
    assert (done["enable"], done["start"]) == (["api-hand", "api-lazy"], [])
    assert (await api.get("/api/models/servers"))["totalServers"] == 0
    assert (await api.model("api-lazy"))["startPolicy"] == "onDemand"
    assert (await api.ask("GET", "/health/ready")).status == 200


async def test_a_profile_that_is_not_there_or_cannot_be_read_changes_nothing(serve: Serve, tmp_path: Any) -> None:
    api = await serve("api-same")
    await profile(api, "good", "api-same")
    await activate(api, "good")
    (tmp_path / "profiles" / "bad.yaml").write_text(
        "profile: {name: bad}\nruntime_settings:\n  api-same:\n    ctx_siz: 1\n"
    )

    (await api.ask("POST", "/api/models/profiles/none/activate")).failure(404, "ProfileNotFound")
    details = (await api.ask("POST", "/api/models/profiles/bad/activate?dryRun=1")).failure(500, "ProfileInvalid")

    assert details["line"] == 4
    assert "ctx_siz" in details["reason"]
    assert (await api.get("/api/models/profiles/active"))["name"] == "good"
    assert (await api.model("api-same"))["enabled"]


async def test_a_model_that_fails_is_told_of_and_harms_no_other(serve: Serve, models: Any) -> None:
    api = await serve("api-fine", "api-cut")
    cut = models / "api-cut.gguf"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (await api.ask("POST", "/api/models/rescan")).success()
    await profile(api, "both", "api-fine", "api-cut")

    plan = await activate(api, "both")

    assert list(plan["unusable"]) == ["api-cut"]
    operation = await api.get(f"/api/operations/{plan['operationId']}")
    assert {name: part["status"] for name, part in operation["models"].items()} == {
        "api-fine": "succeeded", "api-cut": "failed",
    }  # fmt: skip
    assert operation["status"] == "failed"


async def test_there_may_be_no_active_profile(serve: Serve) -> None:
    api = await serve()
    assert await api.get("/api/models/profiles/active") == {"name": None, "profile": None, "problem": None}


async def test_a_model_that_failed_is_tried_again_when_a_profile_wants_it_anew(serve: Serve) -> None:
    api = await serve("api-again")
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/api-again/port", {"port": low})).success()
    await profile(api, "on", "api-again")
    await profile(api, "off")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", low))
        holder.listen()
        assert (await activate(api, "on"))["start"] == ["api-again"]
        assert await api.state("api-again") == "cooldown"
        await activate(api, "off")

    again = await activate(api, "on")

    operation = await api.get(f"/api/operations/{again['operationId']}")
    assert operation["status"] == "succeeded"
    assert await api.state("api-again") == "ready"


async def test_an_activation_whose_wishes_cannot_be_saved_changes_nothing(serve: Serve, tmp_path: Any) -> None:
    api = await serve("api-old", "api-new")
    await profile(api, "first", "api-old")
    await profile(api, "second", "api-new", runtimeSettings={"api-new": {"ctxSize": 256}})
    await activate(api, "first")
    desired = tmp_path / "state" / "desired.json"
    desired.unlink()
    (desired / "in the way").mkdir(parents=True)

    (await api.ask("POST", "/api/models/profiles/second/activate")).failure(500, "RegistrySaveFailed")

    assert (await api.get("/api/models/profiles/active"))["name"] == "first"
    models = (await api.get("/api/models/registry"))["models"]
    assert [name for name, model in models.items() if model["enabled"]] == ["api-old"]
    assert (await api.get("/api/models/api-new/settings"))["sources"] == {}
    assert await api.state("api-old") == "ready"
    (desired / "in the way").rmdir()
    desired.rmdir()
    await activate(api, "second")
    assert await api.state("api-old") == "stopped"


async def test_of_two_activations_at_once_one_holds_whole(serve: Serve) -> None:
    api = await serve("api-left", "api-right")
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()  # so that nothing needs to start or stop
    await profile(api, "left", "api-left")
    await profile(api, "right", "api-right")
    both = api.services.active_profile
    for _ in range(20):
        await asyncio.gather(both.activate("left", by="test"), both.activate("right", by="test"))
        wanted = {model_id for model_id in ("api-left", "api-right") if api.services.servers.is_wanted(model_id)}
        assert wanted == {f"api-{both.slug}"}


async def enabled(api: Api) -> list[str]:
    models = (await api.get("/api/models/registry"))["models"]
    return sorted(model_id for model_id, model in models.items() if model["enabled"])


async def test_it_holds_for_models_of_a_disk_that_is_away(
    serve: Serve, models: Path, tmp_path: Path, toy_model: MakeToyModel
) -> None:
    disk, away = models / "disk", tmp_path / "away"
    for path in (models / "api-here.gguf", disk / "api-before.gguf", disk / "api-after.gguf", disk / "api-unsaid.gguf"):
        toy_model(path)
    api = await serve()
    low, _ = (await api.get("/api/models/registry"))["portRange"]
    (await api.ask("PUT", "/api/models/api-before/port", {"port": low})).success()
    await profile(api, "before", "api-here", "api-before")
    await profile(api, "after", "api-here", "api-after", "api-unsaid", "api-nobody")
    for verb in ("start", "stop"):
        (await api.ask("POST", f"/api/models/servers/api-after/{verb}?{WAIT}")).success()
    with socket.socket() as holder:
        # Wanted, and not running when its file goes.
        holder.bind(("127.0.0.1", low))
        holder.listen()
        await activate(api, "before")
    disk.rename(away)
    (await api.ask("POST", "/api/models/rescan")).success()
    assert list((await api.get("/api/models/registry"))["models"]) == ["api-here"]

    plan = await activate(api, "after")

    told = ("enable", "disable", "start", "stop", "keep", "absent", "unknown", "unusable")
    assert {key: plan[key] for key in told} == {
        "enable": ["api-after", "api-unsaid"],
        "disable": ["api-before"],
        "start": [],
        "stop": [],
        "keep": ["api-here"],
        "absent": ["api-after", "api-unsaid"],
        "unknown": ["api-nobody"],
        "unusable": {},
    }
    assert (await api.get(f"/api/operations/{plan['operationId']}"))["status"] == "succeeded"
    again = await activate(api, "after")
    assert (again["enable"], again["disable"], again["absent"]) == ([], [], plan["absent"])

    away.rename(disk)
    (await api.ask("POST", "/api/models/rescan")).success()

    async def ready() -> bool:
        return {await api.state(model_id) for model_id in plan["absent"]} == {"ready"}

    await until(ready, "what came back runs")
    assert await enabled(api) == ["api-after", "api-here", "api-unsaid"]
    servers = (await api.get("/api/models/servers"))["servers"]
    assert [server["modelId"] for server in servers] == ["api-after", "api-here", "api-unsaid"]


async def test_choices_of_an_earlier_magi_are_not_undone_because_their_disk_is_away_at_the_first_start(
    serve: Serve, models: Path, tmp_path: Path, toy_model: MakeToyModel
) -> None:
    path = models / "api-former.gguf"
    (tmp_path / "state").mkdir()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "empty.yaml").write_text("profile: {name: empty}\n")
    (tmp_path / "state" / "registry.json").write_text(
        json.dumps({"models": {"former id": {"file_path": str(path), "enabled": True}}})
    )
    api = await serve(active_profile="empty")

    async def active() -> bool:
        return bool((await api.get("/api/models/profiles/active"))["name"] == "empty")

    await until(active, "the first profile is active")
    await profile(api, "former", "former id", runtimeSettings={"former id": {"startPolicy": "manual"}})
    plan = (await api.ask("POST", "/api/models/profiles/former/activate?dryRun=true")).success()
    assert (plan["absent"], plan["unknown"], plan["enable"]) == (["api-former"], [], [])
    toy_model(path)
    (await api.ask("POST", "/api/models/rescan")).success()
    assert await enabled(api) == ["api-former"]


async def test_a_dry_run_says_whose_settings_could_not_be_carried_out(serve: Serve) -> None:
    api = await serve("api-odd", "api-even")
    body = {
        "name": "odd",
        "enabledModels": ["api-odd", "api-even"],
        "runtimeSettings": {"api-odd": {"extraFlags": ["--verbose"]}},
    }
    (await api.ask("POST", "/api/models/profiles", body)).success(201)

    plan = (await api.ask("POST", "/api/models/profiles/odd/activate?dryRun=true")).success()

    assert plan["start"] == ["api-even", "api-odd"]
    assert list(plan["settingsNotUsable"]) == ["api-odd"]
    assert "--verbose is not allowed" in plan["settingsNotUsable"]["api-odd"]


async def test_a_dry_run_says_what_would_not_fit_into_memory(serve: Serve) -> None:
    api = await serve("api-big", "api-fits")
    settings = {"api-big": {"ctxSize": 100_000_000, "batchSize": 4096, "ubatchSize": 4096}}
    body = {"name": "large", "enabledModels": ["api-big", "api-fits"], "runtimeSettings": settings}
    (await api.ask("POST", "/api/models/profiles", body)).success(201)

    plan = (await api.ask("POST", "/api/models/profiles/large/activate?dryRun=true")).success()

    assert plan["start"] == ["api-big", "api-fits"]
    assert list(plan["insufficientMemory"]) == ["api-big"]
    assert plan["insufficientMemory"]["api-big"].startswith("model api-big does not fit: it needs ")
    done = (await api.ask("POST", "/api/models/profiles/large/activate?wait=60")).success()
    operation = await api.get(f"/api/operations/{done['operationId']}")
    assert {each: part["status"] for each, part in operation["models"].items()} == {
        "api-big": "failed",
        "api-fits": "succeeded",
    }
    assert "model api-big does not fit" in operation["models"]["api-big"]["message"]


async def test_limits_that_are_too_narrow_are_in_the_plan_and_keep_nothing_from_being_done(serve: Serve) -> None:
    api = await serve("api-narrow", "api-wide", "api-other")
    by_hand = {"startPolicy": "manual"}
    await put_settings(api, "api-other", {"memoryMax": 1 << 20})
    limits = {"api-narrow": {**by_hand, "memoryMax": 1 << 20}, "api-wide": {**by_hand, "memoryMax": 8 << 30}}
    await profile(api, "tight", "api-narrow", "api-wide", runtimeSettings=limits)

    plan = (await api.ask("POST", "/api/models/profiles/tight/activate?dryRun=true")).success()
    done = await activate(api, "tight")

    assert plan["warnings"].keys() == {"api-narrow"}, "of what the profile has in use alone"
    [warning] = plan["warnings"]["api-narrow"]
    assert warning.startswith("memory_max is 1 MiB, and the server needs ")
    assert done["warnings"] == plan["warnings"]
    assert (done["enable"], plan["insufficientMemory"]) == (["api-narrow", "api-wide"], {})
    assert (await api.get("/api/models/api-narrow/settings"))["warnings"] == [warning]


async def put_settings(api: Api, model_id: str, settings: dict[str, Any]) -> None:
    (await api.ask("PUT", f"/api/models/{model_id}/settings", settings)).success()
