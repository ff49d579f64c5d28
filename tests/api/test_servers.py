"""The endpoints for servers, on real units with a real llama-server."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from magi_agent.servers.launch import unit_name
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.conftest import PortRanges

SERVER_KEYS = [
    "modelId", "displayName", "port", "pid", "isReady", "isRunning", "uptimeSeconds", "tier", "isThinking",
]  # fmt: skip
"""As the contract orders them; what this agent adds comes after."""
ADDED_KEYS = {
    "unit", "state", "url", "restarts", "memoryBytes", "cpuSeconds", "failure", "restartRequired", "restartReasons",
}  # fmt: skip
WAIT = "wait=60"


async def start(api: Api, model_id: str) -> None:
    assert (await api.ask("POST", f"/api/models/servers/{model_id}/start?{WAIT}")).success()["server"]["isReady"]


async def test_a_server_from_start_to_stop(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    assert await api.get("/api/models/servers") == {"totalServers": 0, "readyServers": 0, "servers": []}

    begun = await api.ask("POST", "/api/models/servers/api-one/start")

    body = begun.success(202)
    assert begun.headers["Location"] == "/api/models/servers/api-one"
    assert (body["message"], body["modelId"], body["changed"]) == ("Model api-one is starting", "api-one", True)
    await api.until_state("api-one", "ready")
    listed = await api.get("/api/models/servers")
    assert (listed["totalServers"], listed["readyServers"]) == (1, 1)
    (server,) = listed["servers"]
    assert list(server)[: len(SERVER_KEYS)] == SERVER_KEYS
    assert set(server) >= ADDED_KEYS
    assert (server["modelId"], server["state"], server["isRunning"], server["isReady"]) == (
        "api-one", "ready", True, True,
    )  # fmt: skip
    assert (server["unit"], server["url"]) == (unit_name("api-one"), f"http://127.0.0.1:{server['port']}")
    assert server["pid"] > 0
    assert server["memoryBytes"] is None or 0 < server["memoryBytes"] < 1 << 40, "systemd's 'not set' is null"
    assert (server["failure"], server["restartRequired"], server["restartReasons"]) == (None, False, [])
    one = await api.get(begun.headers["Location"])
    assert list(one) == list(server)
    assert (await api.get("/api/models/api-one"))["server"]["pid"] == server["pid"]

    again = (await api.ask("POST", "/api/models/servers/api-one/start")).success()

    assert (again["message"], again["changed"]) == ("Model api-one is running already", False)
    stopped = (await api.ask("POST", f"/api/models/servers/api-one/stop?{WAIT}")).success()
    assert (stopped["message"], stopped["changed"], stopped["server"]["state"]) == (
        "Model api-one is stopped", True, "stopped",
    )  # fmt: skip
    again = (await api.ask("POST", "/api/models/servers/api-one/stop")).success()
    assert (again["message"], again["changed"]) == ("Model api-one is stopped already", False)


async def test_a_restart_brings_another_process(serve: Serve) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    before = (await api.get("/api/models/servers/api-one"))["pid"]

    begun = await api.ask("POST", "/api/models/servers/api-one/restart")
    assert begun.success(202)["message"] == "Model api-one is restarting"
    assert begun.headers["Location"] == "/api/models/servers/api-one"
    body = (await api.ask("POST", f"/api/models/servers/api-one/restart?{WAIT}")).success()

    assert body["server"]["isReady"]
    assert body["server"]["pid"] not in (None, before)


async def test_settings_that_changed_ask_for_a_restart(serve: Serve) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    profile = {"name": "api more", "enabledModels": ["api-one"], "runtimeSettings": {"api-one": {"ctxSize": 256}}}
    (await api.ask("POST", "/api/models/profiles", profile)).success(201)
    await api.services.active_profile.activate("api-more", by="test")

    server = await api.get("/api/models/servers/api-one")

    assert server["restartRequired"] is True
    assert "256" in server["restartReasons"][0]


async def test_enabling_with_apply_starts_and_disabling_stops(serve: Serve) -> None:
    api = await serve("api-one")

    body = (await api.ask("PUT", f"/api/models/api-one/enabled?apply=true&{WAIT}", {"enabled": True})).success()

    assert body["restartRequired"] is False
    assert await api.state("api-one") == "ready"
    disabled = (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": False})).success()
    assert disabled["restartRequired"] is True, "it runs, and the choice is that it should not"
    assert await api.state("api-one") == "ready"
    begun = await api.ask("PUT", "/api/models/api-one/enabled?apply=true", {"enabled": False})
    assert begun.success(202)["restartRequired"] is False
    assert begun.headers["Location"] == "/api/models/servers/api-one"
    await api.until_state("api-one", "stopped")


@pytest.mark.parametrize("policy", ["onDemand", "manual"])
async def test_a_model_that_waits_to_be_asked_for_is_enabled_and_not_started(serve: Serve, policy: str) -> None:
    api = await serve("api-one")
    (await api.ask("PUT", "/api/models/api-one/settings", {"startPolicy": policy})).success()

    body = (await api.ask("PUT", "/api/models/api-one/enabled?apply=true&wait=5", {"enabled": True})).success()

    assert body["restartRequired"] is False
    assert await api.state("api-one") == "stopped"
    model = await api.model("api-one")
    assert (model["enabled"], model["startPolicy"]) == (True, policy)
    assert model["port"] is not None
    (await api.ask("POST", "/api/models/servers/api-one/start")).success(202)
    ready = (await api.ask("GET", "/health/ready")).body
    # Started by a person, a manual one should be up; one that waits for requests never makes the host not ready.
    assert ready["serversWanted"] == (1 if policy == "manual" else 0)
    if policy == "onDemand":
        assert (ready["status"], ready["missing"]) == ("ready", {})
    await api.until_state("api-one", "ready")
    assert (await api.get("/health/ready"))["status"] == "ready"


async def test_all_are_started_and_stopped(serve: Serve) -> None:
    api = await serve("api-one", "api-two", "api-three")
    for model_id in ("api-one", "api-two"):
        (await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})).success()

    begun = await api.ask("POST", "/api/models/servers/start-all")

    operation = begun.success(202)
    assert begun.headers["Location"] == f"/api/operations/{operation['id']}"
    assert (operation["kind"], operation["status"], operation["finishedAt"]) == ("start-all", "running", None)
    assert set(operation["models"]) == {"api-one", "api-two"}
    assert operation["startedAt"].endswith("Z")

    async def over() -> bool:
        return bool((await api.get(begun.headers["Location"]))["status"] != "running")

    await until(over, "all are started")
    operation = await api.get(begun.headers["Location"])
    assert operation["status"] == "succeeded"
    assert operation["models"]["api-one"] == {
        "status": "succeeded", "state": "ready", "message": "Model api-one is ready",
    }  # fmt: skip
    stopped = (await api.ask("POST", f"/api/models/servers/stop-all?{WAIT}")).success()
    assert {model_id: part["state"] for model_id, part in stopped["models"].items()} == {
        "api-one": "stopped", "api-two": "stopped",
    }  # fmt: skip

    async def none_listed() -> bool:
        # systemd forgets a unit a moment after it stopped; until then it is loaded, and listed.
        return bool((await api.get("/api/models/servers"))["totalServers"] == 0)

    await until(none_listed, "no unit is loaded any more")


async def test_an_operation_that_is_not_there(serve: Serve) -> None:
    api = await serve()

    assert (await api.ask("GET", "/api/operations/none")).failure(404, "OperationNotFound") == {"operationId": "none"}


async def test_a_start_that_fails_says_why(serve: Serve) -> None:
    api = await serve("api-one", llama_server_path="/bin/false", max_startup_time="20")

    failed = await api.ask("POST", f"/api/models/servers/api-one/start?{WAIT}")

    details = failed.failure(500, "StartFailed")
    assert (details["modelId"], details["result"], details["exitStatus"]) == ("api-one", "exit-code", 1)
    # It has failed once, and cools down for ten seconds.
    assert 8 <= int(failed.headers["Retry-After"]) <= 10
    server = await api.get("/api/models/servers/api-one")
    assert (server["state"], server["failure"]["exitStatus"]) == ("cooldown", 1)
    assert server["retryInSeconds"] > 0
    assert server["failure"]["at"].endswith("Z")
    ready = await api.ask("GET", "/health/ready")
    assert (ready.status, ready.body["status"], ready.body["missing"]) == (503, "not_ready", {"api-one": "cooldown"})
    applied = await api.ask("PUT", f"/api/models/api-one/enabled?apply=true&{WAIT}", {"enabled": True})
    assert applied.failure(500, "StartFailed")
    # A model that fails is not tried for ever once it is disabled.
    (await api.ask("PUT", f"/api/models/api-one/enabled?apply=true&{WAIT}", {"enabled": False})).success()
    assert await api.state("api-one") == "stopped"


@pytest.mark.parametrize("verb", ["api-one/start", "api-one/stop", "api-one/restart", "start-all", "stop-all"])
async def test_a_wait_that_is_none(serve: Serve, verb: str) -> None:
    api = await serve("api-one")

    for wait in ("-1", "soon", "nan", "inf", "12001"):
        details = (await api.ask("POST", f"/api/models/servers/{verb}?wait={wait}")).failure(422, "ValidationError")
        assert details["errors"][0]["field"] == "wait"

    assert await api.state("api-one") == "stopped"


async def test_a_wait_that_is_too_short_answers_in_time(serve: Serve) -> None:
    api = await serve("api-one")

    begun = await api.ask("POST", "/api/models/servers/api-one/start?wait=0.01")

    assert begun.success(202)["server"]["state"] in ("starting", "loading")
    assert begun.headers["Location"] == "/api/models/servers/api-one"


async def test_while_systemd_is_away_nobody_is_told_what_may_not_be_so(serve: Serve, unused_ports: PortRanges) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    bus = ("systemctl", "--user")
    await run(*bus, "stop", "dbus.socket", "dbus.service")
    try:

        async def gone() -> bool:
            return not api.services.manager.connected

        await until(gone, "the agent has noticed")
        for method, path in (
            ("GET", "/api/models/servers"),
            ("GET", "/api/models/servers/api-one"),
            ("GET", "/api/models/api-one"),
            ("GET", "/metrics/targets"),
            ("POST", "/api/models/servers/api-one/start"),
            ("POST", "/api/models/servers/api-one/stop"),
            ("POST", "/api/models/servers/api-one/restart"),
            ("POST", "/api/models/servers/start-all"),
            ("POST", "/api/models/servers/stop-all"),
        ):
            assert (await api.ask(method, path)).failure(503, "ServiceUnavailable") == {"service": "systemd"}
        reply = await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})
        assert reply.failure(503, "ServiceUnavailable") == {"service": "systemd"}
        assert (await api.model("api-one"))["enabled"] is False, "nothing is changed by what answers with an error"
        (await api.ask("PUT", "/api/models/api-one/tier", {"tier": "fast"})).success()
        ready = await api.ask("GET", "/health/ready")
        assert (ready.status, ready.body["systemdConnected"]) == (503, False)
        assert (await api.ask("GET", "/health/live")).success()
    finally:
        await run(*bus, "start", "dbus.socket")
    await until(lambda: _connected(api), "the agent is connected again")
    await api.until_state("api-one", "ready")


async def _connected(api: Api) -> bool:
    return api.services.manager.connected


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, env=os.environ)
    assert await process.wait() == 0


async def test_systemd_that_executes_itself_anew_is_waited_for(serve: Serve) -> None:
    """As each upgrade of systemd has it do."""
    api = await serve("api-one")
    manager = api.services.manager

    async def lost_and_found() -> None:
        while manager.connected:  # noqa: ASYNC110  # a moment that nobody tells of
            await asyncio.sleep(0.001)
        await manager.wait_connected(10)

    executing = asyncio.create_task(run("systemctl", "--user", "daemon-reexec"))
    watching = asyncio.create_task(lost_and_found())
    async with asyncio.timeout(20):
        while not watching.done():
            (await api.ask("GET", "/api/models/servers")).success()
    await asyncio.gather(watching, executing)


async def test_what_does_not_fit_into_memory_is_refused_unless_it_is_forced(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "magi_agent.api.changes")
    api = await serve("api-one", "api-two", memory_reserve="1000T")
    path = "/api/models/servers/api-one"
    for verb in ("start", "restart", "start?force=false"):
        details = (await api.ask("POST", f"{path}/{verb}")).failure(409, "InsufficientMemory")
        assert details["modelId"] == "api-one"
        assert details["reserveBytes"] == 1000 << 40
        assert details["neededBytes"] == details["anonymousBytes"] + details["mappedBytes"] + details["sharedBytes"] > 0
        assert (
            details["shortByBytes"]
            == sum(details[each] for each in ("neededBytes", "reserveBytes", "promisedBytes"))
            - details["availableBytes"]
        )
        assert "magictl start --force api-one" in details["advice"]
    assert (await api.get(path))["state"] == "stopped"
    (await api.ask("POST", f"{path}/start?force=perhaps")).failure(422, "ValidationError")

    forced = (await api.ask("POST", f"{path}/start?{WAIT}&force=true")).success()

    assert forced["server"]["state"] == "ready"
    assert any(
        f"POST {path}/start by force: 200" in record.getMessage()
        for record in caplog.records
        if record.name == "magi_agent.api.changes"
    )
    assert (await api.ask("POST", f"{path}/start")).success()["changed"] is False
    # It was forced once, and is that until it is stopped.
    assert (await api.ask("POST", f"{path}/restart?{WAIT}")).success()["server"]["state"] == "ready"

    for model_id in ("api-one", "api-two"):
        (await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})).success()
    operation = (await api.ask("POST", f"/api/models/servers/start-all?{WAIT}")).success()
    parts = operation["models"]
    assert parts["api-one"]["status"] == "succeeded"
    assert parts["api-two"]["status"] == "failed"
    assert parts["api-two"]["message"].startswith("model api-two does not fit: it needs ")
    server = await api.get("/api/models/servers/api-two")
    assert (server["state"], server["failure"]["result"]) == ("cooldown", "insufficient-memory")
    (await api.ask("POST", f"/api/models/servers/api-two/start?{WAIT}")).failure(409, "InsufficientMemory")
    (await api.ask("POST", f"/api/models/servers/stop-all?{WAIT}")).success()


async def test_a_model_whose_file_is_mended_is_tried_at_once(
    serve: Serve, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magi_agent.servers.record._FIRST_COOLDOWN", 3600.0)
    api = await serve("api-cut", "api-other")
    whole = (models / "api-cut.gguf").read_bytes()
    (models / "api-cut.gguf").write_bytes(whole[:-2000])
    (await api.ask("POST", "/api/models/rescan")).success()
    await api.services.servers._desired.wish(["api-cut"], run=True, by="test")
    await api.until_state("api-cut", "cooldown")
    (models / "api-other.gguf").write_bytes(whole + b"x")
    (await api.ask("POST", "/api/models/rescan")).success()
    assert (await api.get("/api/models/servers/api-cut"))["retryInSeconds"] > 200, "that was another's file"

    (models / "api-cut.gguf").write_bytes(whole)
    (await api.ask("POST", "/api/models/rescan")).success()

    await api.until_state("api-cut", "ready")
