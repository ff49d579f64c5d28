"""The order in which the history of a server tells things."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from magi_agent.servers.launcher import DirectLauncher
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
