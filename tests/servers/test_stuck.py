"""A server whose process survives SIGKILL: told, left alone, and healed by itself."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from magi_agent.errors import StopFailed
from magi_agent.servers import survivors
from magi_agent.servers.launch import unit_name
from magi_agent.servers.survivors import survived
from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.freezer import frozen
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import complete, processes_of, properties, systemctl

STUCK_AFTER = "0.3"
"""Seconds a server has to stop; systemd gives up on what survives after four times that."""


@pytest.fixture
def ice(no_units_left: None) -> Iterator[ExitStack]:
    """What is frozen by entering it is let go at the end, before anybody looks what is left."""
    with ExitStack() as stack:
        yield stack


async def _freeze(agent: ServingAgent, ice: ExitStack, model_id: str) -> int:
    server = await agent.ready(model_id)
    assert server.pid is not None
    ice.enter_context(frozen(server.pid))
    return server.pid


async def test_what_survives_sigkill_is_stuck_until_it_is_gone(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    ice: ExitStack,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    toy_model(models / "srv-stuck.gguf")
    toy_model(models / "srv-other.gguf")
    async with make_agent(stop_timeout=STUCK_AFTER) as agent:
        other = await agent.ready("srv-other")
        pid = await _freeze(agent, ice, "srv-stuck")

        with pytest.raises(StopFailed) as stop:
            await agent.servers.stop("srv-stuck", by="test", wait=PATIENCE_OF_TESTS)

        assert str(stop.value).startswith(f"model srv-stuck: it survived SIGKILL: process {pid} (llama-server, state D")
        assert f"cat /proc/{pid}/stack" in str(stop.value)
        assert str(stop.value.details["advice"]) in str(stop.value)
        assert await properties(unit_name("srv-stuck"), "ActiveState", "Result") == {
            "ActiveState": "failed",
            "Result": "timeout",
        }
        server = await agent.servers.server("srv-stuck")
        assert (server.state, server.is_running, server.is_ready, server.pid) == (ServerState.STUCK, True, False, None)
        assert server.failure is not None
        assert (server.failure.result, server.failure.advice) == ("stuck", stop.value.details["advice"])
        assert agent.servers.problems == (f"server of srv-stuck: {server.failure.message}",)
        [event] = [each for each in agent.events.changes if each.after is ServerState.STUCK]
        assert (event.result, event.message) == ("stuck", server.failure.message)

        for verb in (agent.servers.start, agent.servers.restart, agent.servers.stop):
            with pytest.raises(StopFailed, match="survived SIGKILL"):
                await verb("srv-stuck", by="test", wait=PATIENCE_OF_TESTS)
        await asyncio.sleep(1.5)
        assert processes_of(agent.unit("srv-stuck").control_group) == [pid]
        assert agent.told("srv-stuck")[-1] == "stuck"

        ice.close()

        await agent.until_state("srv-stuck", ServerState.STOPPED)
        await agent.until(lambda: agent.manager.get(unit_name("srv-stuck")) is None, "its name is free")
        assert not agent.servers.problems
        assert (await agent.servers.server("srv-stuck")).failure is None
        after = await agent.servers.server("srv-other")
        assert (after.state, after.pid) == (ServerState.READY, other.pid)
        agent.check_transitions()
    told = [each for each in caplog.records if getattr(each, "magi_result", None) == "stuck"]
    assert len(told) == 1
    assert not [each for each in caplog.records if getattr(each, "magi_event", None) == "stopped"]
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.INFO]
    assert said.count("server of srv-stuck: what had survived SIGKILL is gone") == 1


async def test_one_that_should_run_is_started_as_soon_as_what_was_stuck_is_gone(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, ice: ExitStack
) -> None:
    toy_model(models / "srv-again.gguf")
    async with make_agent(stop_timeout=STUCK_AFTER) as agent:
        pid = await _freeze(agent, ice, "srv-again")
        with pytest.raises(StopFailed, match="survived SIGKILL"):
            await agent.servers.restart("srv-again", by="test", wait=PATIENCE_OF_TESTS)
        assert agent.reconciler.wants("srv-again")
        assert agent.servers.wanted() == {"srv-again": ServerState.STUCK}

        ice.close()

        after = await agent.until_state("srv-again", ServerState.READY)
        assert after.pid != pid
        assert len(await complete(after.url or "")) == 4
        assert agent.told("srv-again")[-4:] == ["stuck", "starting", "loading", "ready"]
        agent.check_transitions()


@pytest.mark.parametrize("clear", [False, True])
async def test_a_new_agent_sees_what_is_stuck_and_starts_nothing_in_its_place(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, ice: ExitStack, clear: bool
) -> None:
    toy_model(models / "srv-found.gguf")
    async with make_agent(stop_timeout=STUCK_AFTER) as agent:
        pid = await _freeze(agent, ice, "srv-found")
        with pytest.raises(StopFailed):
            await agent.servers.restart("srv-found", by="test", wait=PATIENCE_OF_TESTS)
    if clear:
        await systemctl("reset-failed", unit_name("srv-found"))

    async with make_agent(stop_timeout=STUCK_AFTER) as agent:
        server = await agent.until_state("srv-found", ServerState.STUCK)
        assert server.failure is not None
        assert f"process {pid} " in server.failure.message
        await asyncio.sleep(1.0)
        assert agent.told("srv-found") == ["stuck"]

        ice.close()

        assert (await agent.until_state("srv-found", ServerState.READY)).pid != pid


async def test_one_that_somebody_stopped_and_that_does_not_die_is_stuck_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, ice: ExitStack
) -> None:
    toy_model(models / "srv-outside.gguf")
    async with make_agent(stop_timeout=STUCK_AFTER) as agent:
        await _freeze(agent, ice, "srv-outside")
        await systemctl("stop", unit_name("srv-outside"))
        await agent.until_state("srv-outside", ServerState.STUCK)
        assert not [each for each in agent.events.changes if each.after is ServerState.COOLDOWN]


def test_who_may_not_look_at_a_process_names_it_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").write_text("0\n4711\n4712\n")
    monkeypatch.setattr(survivors, "groups_of", lambda _: [group])
    stuck = survived("/some/group", proc=tmp_path)
    assert stuck is not None
    assert "process 4711, process 4712, 1 more still there" in stuck.message
    assert "/proc/4711/stack" in (stuck.advice or "")

    (group / "cgroup.procs").write_text("0\n")
    stuck = survived("/some/group", proc=tmp_path)
    assert stuck is not None
    assert "1 of its processes still there" in stuck.message

    (group / "cgroup.procs").write_text("")
    assert survived("/some/group", proc=tmp_path) is None


def test_a_name_with_brackets_is_told_from_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    monkeypatch.setattr(survivors, "groups_of", lambda _: [tmp_path])
    folder = tmp_path / str(os.getpid())
    folder.mkdir()
    (folder / "stat").write_text("1 (od) (d) D 1 1")
    (folder / "wchan").write_text("nfs_wait_bit_killable")
    stuck = survived("/some/group", proc=tmp_path)
    assert stuck is not None
    assert f"process {os.getpid()} (od) (d, state D, in nfs_wait_bit_killable)" in stuck.message
