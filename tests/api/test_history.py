"""The order in which the history of a server tells things."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from magi_agent.servers.launcher import DirectLauncher
from magi_agent.systemd.manager import SystemdManager
from tests.api.conftest import Serve

MODEL = "api-history"


async def test_a_start_is_told_before_it_is_ready_however_late_the_launcher_answers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = await serve(MODEL)
    start = DirectLauncher.start

    async def and_answer_late(launcher: DirectLauncher, *launch: Any) -> Any:
        result = await start(launcher, *launch)
        # Far longer than a toy takes to be ready.
        await asyncio.sleep(2)
        return result

    monkeypatch.setattr(DirectLauncher, "start", and_answer_late)
    caplog.set_level("INFO")
    (await api.ask("POST", f"/api/models/servers/{MODEL}/start?wait=60")).success()

    told = [record.getMessage() for record in caplog.records if f"server of {MODEL}" in record.getMessage()]
    assert [message.split()[4] for message in told] == ["started", "ready"], told


async def test_a_start_is_told_with_its_run_also_where_systemds_signals_come_late(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = await serve(MODEL)
    start, get, is_late = DirectLauncher.start, SystemdManager.get, False

    async def and_hear_late(launcher: DirectLauncher, *launch: Any) -> Any:
        nonlocal is_late
        result = await start(launcher, *launch)
        is_late = True
        asyncio.get_running_loop().call_soon(heard)
        return result

    def heard() -> None:
        nonlocal is_late
        is_late = False

    # With a launcher of its own process, its answer and the signals have different ways; here they have one.
    monkeypatch.setattr(DirectLauncher, "start", and_hear_late)
    monkeypatch.setattr(SystemdManager, "get", lambda manager, name: None if is_late else get(manager, name))
    caplog.set_level("INFO")
    (await api.ask("POST", f"/api/models/servers/{MODEL}/start?wait=60")).success()

    (told,) = [record for record in caplog.records if record.getMessage() == f"server of {MODEL} was started"]
    run = api.services.servers.ready()[MODEL].invocation_id
    assert told.__dict__["magi_invocation"] == run
