"""Activating profiles: the plan, the difference, and what is left alone."""

from __future__ import annotations

from typing import Any

from tests.api.client import Api, until
from tests.api.conftest import Serve

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
        "unknown": ["api-nobody"],
        "unusable": {},
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
