"""Draining, and restarting what changed one after the other."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.conftest import SystemdUser

WAIT = "wait=60"


async def start(api: Api, *model_ids: str) -> dict[str, int]:
    pids = {}
    for model_id in model_ids:
        pids[model_id] = (await api.ask("POST", f"/api/models/servers/{model_id}/start?{WAIT}")).success()["server"][
            "pid"
        ]
    return pids


async def pids_of(api: Api) -> dict[str, int]:
    return {server["modelId"]: server["pid"] for server in (await api.get("/api/models/servers"))["servers"]}


async def test_while_the_host_is_drained_nothing_is_started_and_what_runs_goes_on(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-up", "api-down")
    before = await start(api, "api-up")
    assert await api.get("/api/drain") == {
        "message": "servers are started as they are wanted", "draining": False, "since": None, "by": None,
    }  # fmt: skip

    drained = (await api.ask("PUT", "/api/drain", {"draining": True})).success()

    assert (drained["draining"], drained["message"]) == (True, "nothing is started any more")
    assert drained["by"]
    assert (await api.get("/health/ready"))["draining"]
    for path in ("api-down/start", "api-up/restart", "start-all", "restart-changed"):
        (await api.ask("POST", f"/api/models/servers/{path}")).failure(409, "Draining")
    assert await pids_of(api) == before
    again = (await api.ask("PUT", "/api/drain", {"draining": True})).success()
    assert again == drained, "a second word changes nothing of the first"
    assert json.loads((tmp_path / "state" / "desired.json").read_text())["drain"]["by"] == drained["by"]
    (await api.ask("PUT", "/api/models/api-down/enabled?apply=true", {"enabled": True})).failure(409, "Draining")
    (await api.ask("POST", f"/api/models/servers/api-up/stop?{WAIT}")).success()

    assert not (await api.ask("PUT", "/api/drain", {"draining": False})).success()["draining"]

    await start(api, "api-down")


async def test_what_would_start_something_is_refused_before_anything_is_chosen(serve: Serve) -> None:
    api = await serve("api-later", "api-runs")
    before = await start(api, "api-runs")
    (await api.ask("POST", "/api/models/profiles", {"name": "later", "enabledModels": ["api-later"]})).success(201)
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()

    (await api.ask("POST", "/api/models/profiles/later/activate")).failure(409, "Draining")
    (await api.ask("PUT", "/api/models/api-later/enabled?apply=true", {"enabled": True})).failure(409, "Draining")
    (await api.ask("PUT", "/api/models/api-runs/settings?apply=true", {"ctxSize": 256})).failure(409, "Draining")

    assert (await api.ask("POST", "/api/models/profiles/later/activate?dryRun=true")).success()["start"] == [
        "api-later"
    ]
    assert (await api.get("/api/models/profiles/active"))["name"] is None
    assert not (await api.model("api-later"))["enabled"]
    assert (await api.model("api-runs"))["ctxSize"] is None
    assert await pids_of(api) == before


@pytest.mark.parametrize("listener", ["unix"])
async def test_a_drain_outlives_the_agent(serve: Serve) -> None:
    api = await serve("api-drained")
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()
    await api.session.close()
    await api.agent.stop()

    api = await serve("api-drained")

    assert (await api.get("/api/drain"))["draining"]
    (await api.ask("POST", "/api/models/servers/api-drained/start")).failure(409, "Draining")


async def test_changed_servers_are_restarted_one_after_the_other(serve: Serve) -> None:
    names = ["api-a", "api-b", "api-c"]
    api = await serve(*names)
    before = await start(api, *names)
    for name in ("api-a", "api-c"):
        (await api.ask("PUT", f"/api/models/{name}/settings", {"ctxSize": 256})).success()

    operation = (await api.ask("POST", f"/api/models/servers/restart-changed?{WAIT}")).success()

    assert (operation["kind"], operation["status"]) == ("restart-changed", "succeeded")
    assert list(operation["models"]) == ["api-a", "api-c"]
    after = await pids_of(api)
    assert after["api-b"] == before["api-b"]
    assert {name for name in names if after[name] != before[name]} == {"api-a", "api-c"}
    assert not any(server["restartRequired"] for server in (await api.get("/api/models/servers"))["servers"])
    nothing = (await api.ask("POST", "/api/models/servers/restart-changed")).success()
    assert (nothing["status"], nothing["models"]) == ("succeeded", {})


async def test_what_is_stopped_before_its_turn_stays_stopped(serve: Serve, systemd_user: SystemdUser) -> None:
    api = await serve("api-a", "api-b")
    await start(api, "api-a", "api-b")
    for name in ("api-a", "api-b"):
        (await api.ask("PUT", f"/api/models/{name}/settings", {"ctxSize": 256})).success()

    operation = (await api.ask("POST", "/api/models/servers/restart-changed")).success(202)
    (await api.ask("POST", "/api/models/servers/api-b/stop")).success(202)

    async def ended() -> bool:
        return bool((await api.get(f"/api/operations/{operation['id']}"))["finishedAt"])

    await until(ended, "all had their turn")
    await api.until_state("api-b", "stopped")
    parts = (await api.get(f"/api/operations/{operation['id']}"))["models"]
    assert parts["api-b"]["message"] == "Model api-b was stopped meanwhile, and stays so"
    assert parts["api-a"]["state"] == "ready"


async def test_the_first_that_fails_to_restart_ends_it(serve: Serve, models: Path) -> None:
    names = ["api-a", "api-b", "api-c"]
    api = await serve(*names)
    before = await start(api, *names)
    for name in names:
        (await api.ask("PUT", f"/api/models/{name}/settings", {"ctxSize": 256})).success()
    # A real failure of a real llama-server: a template that no Jinja parser takes.
    (models / "broken.jinja").write_text("{% if %}")
    (await api.ask("PUT", "/api/models/api-b/settings", {"chatTemplateFile": str(models / "broken.jinja")})).success()

    operation = (await api.ask("POST", f"/api/models/servers/restart-changed?{WAIT}")).success()

    assert operation["status"] == "failed"
    assert {name: part["status"] for name, part in operation["models"].items()} == {
        "api-a": "succeeded", "api-b": "failed", "api-c": "skipped",
    }  # fmt: skip
    assert operation["models"]["api-c"]["message"] == "left as it runs, since api-b failed"
    server = await api.get("/api/models/servers/api-c")
    assert (server["state"], server["pid"]) == ("ready", before["api-c"])


@pytest.mark.parametrize("listener", ["unix"])
async def test_during_a_drain_systemd_alone_restarts_what_crashes(serve: Serve) -> None:
    api = await serve("api-crash")
    pid = (await start(api, "api-crash"))["api-crash"]
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()

    os.kill(pid, signal.SIGKILL)

    async def another() -> bool:
        server = await api.get("/api/models/servers/api-crash")
        return bool(server["state"] == "ready" and server["pid"] != pid)

    await until(another, "systemd has restarted it")
