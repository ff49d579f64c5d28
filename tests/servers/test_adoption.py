"""A new agent finds what the one before it left running, and what it had been told."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.errors import StartFailed
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.systemd.jobs import JobResult
from magi_agent.vocabulary import ModelStatus, ServerState
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS
from tests.servers.system import complete, script, systemctl


class DeafLauncher(DirectLauncher):
    """Never gets to it: as if the agent died between the wish and the deed."""

    async def start(self, launch: LaunchSpecification) -> JobResult:  # noqa: ARG002
        return await asyncio.Future()

    async def stop(self, model_id: str, stop_timeout: float) -> JobResult:  # noqa: ARG002
        return await asyncio.Future()


async def test_a_new_agent_adopts_what_runs_and_proves_it_ready_again(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-heir.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-heir")
        invocation = agent.unit("srv-heir").invocation_id
    async with make_agent() as agent:
        assert agent.reconciler.state("srv-heir") is ServerState.LOADING
        after = await agent.until_state("srv-heir", ServerState.READY)
        assert after.pid == before.pid
        assert agent.unit("srv-heir").invocation_id == invocation
        assert after.port == before.port
        assert after.restart_reasons == ()
        assert after.uptime_seconds >= before.uptime_seconds
        assert agent.told("srv-heir") == ["loading", "ready"]
        assert agent.reconciler.plan().steps == ()
        assert len(await complete(after.url or "")) == 4
        agent.check_transitions()


async def test_a_server_that_runs_otherwise_than_it_should_is_left_running_and_says_so(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-otherwise.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-otherwise")
    async with make_agent(llama_server_host="127.0.0.2") as agent:
        agent.effective.hold_profile({"srv-otherwise": RuntimeSettings(ctx_size=256)})
        after = await agent.until_state("srv-otherwise", ServerState.READY)
        assert after.pid == before.pid
        assert after.restart_reasons == (
            "host: runs with 127.0.0.1, should be 127.0.0.2",
            "ctx-size: runs with the default, should be 256",
        )
        outcome = await agent.servers.restart("srv-otherwise", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.server.restart_reasons == ()
        assert outcome.server.pid != before.pid
        assert outcome.server.url == f"http://127.0.0.2:{before.port}"


async def test_a_new_port_holds_from_the_next_start_on(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-mover.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-mover")
        assert before.port is not None
        other = before.port + 3
        await agent.registry.choose("srv-mover", lambda choices: replace(choices, port=other))
        between = await agent.servers.server("srv-mover")
        assert (between.port, between.url) == (before.port, before.url)
        assert between.restart_reasons == (f"port: runs with {before.port}, should be {other}",)
        outcome = await agent.servers.restart("srv-mover", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.server.port == other
        assert outcome.server.restart_reasons == ()
        assert len(await complete(outcome.server.url or "")) == 4


async def test_a_unit_of_no_known_model_is_reported_and_left_alone(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-known.gguf")
    await systemctl("reset-failed")
    await _run_unit("magi-llama-srv-stranger.service", "sleep", "600")
    async with make_agent() as agent:
        assert agent.servers.unknown_units() == ["magi-llama-srv-stranger.service"]
        assert await agent.servers.list() == []
        operation = agent.servers.stop_all(by="test")
        assert await agent.servers.operations.finished(operation, PATIENCE_OF_TESTS)
        await agent.ready("srv-known")
        assert [server.model_id for server in await agent.servers.list()] == ["srv-known"]
        await agent.servers.stop("srv-known", by="test", wait=PATIENCE_OF_TESTS)
        assert await systemctl("is-active", "magi-llama-srv-stranger.service") == "active"


async def test_what_runs_without_a_wish_is_watched_and_not_touched(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-unasked.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-unasked")
    (agent.state / "desired.json").unlink()
    async with make_agent() as agent:
        after = await agent.until_state("srv-unasked", ServerState.READY)
        assert after.pid == before.pid
        assert agent.desired["srv-unasked"] is None
        assert agent.reconciler.plan().steps == ()
        os.kill(after.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-unasked").n_restarts == 1, "systemd restarts it")
        await agent.until_state("srv-unasked", ServerState.READY)
        outcome = await agent.servers.stop("srv-unasked", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        agent.check_transitions()


async def test_what_runs_without_a_wish_and_never_gets_ready_is_left_alone_until_somebody_wants_it(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model(models / "srv-idle.gguf")
    sleeps = str(script(tmp_path / "sleeps", "echo idle", "exec sleep 600"))
    async with make_agent(llama_server_path=sleeps) as agent:
        await agent.servers.start("srv-idle", by="test")
        before = await agent.until_state("srv-idle", ServerState.LOADING)
    (agent.state / "desired.json").unlink()
    async with make_agent(llama_server_path=sleeps, max_startup_time="0.5") as agent:
        await agent.until(lambda: "nobody asked for it, so it is left alone" in caplog.text, "it is given up on")
        after = await agent.servers.server("srv-idle")
        assert (after.state, after.pid, after.failure) == (ServerState.LOADING, before.pid, None)
        with pytest.raises(StartFailed, match="it showed no progress"):
            await agent.servers.start("srv-idle", by="test", wait=PATIENCE_OF_TESTS)
        await agent.until(lambda: not agent.manager.units, "the unit is gone")


async def test_a_wish_that_was_saved_before_the_agent_died_is_carried_out_by_the_next(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-late.gguf")
    async with make_agent(make_launcher=DeafLauncher) as agent:
        await agent.servers.start("srv-late", by="test")
        await agent.until_state("srv-late", ServerState.STARTING)
    async with make_agent() as agent:
        server = await agent.until_state("srv-late", ServerState.READY)
        assert server.is_ready
        assert agent.told("srv-late") == ["starting", "loading", "ready"]


async def test_a_stop_that_was_wished_before_the_agent_died_is_carried_out_by_the_next(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-unwanted.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-unwanted")
    async with make_agent(make_launcher=DeafLauncher) as agent:
        await agent.servers.stop("srv-unwanted", by="test")
    async with make_agent() as agent:
        await agent.until_state("srv-unwanted", ServerState.STOPPED)
        await agent.until(lambda: not agent.manager.units, "the unit is gone")
        agent.check_transitions()


@pytest.mark.parametrize("moment", [0.0, 0.005, 0.02, 0.06, 0.15])
async def test_an_agent_that_dies_in_the_middle_of_a_start_leaves_one_server_for_the_next(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, moment: float
) -> None:
    toy_model(models / "srv-relay.gguf")
    async with make_agent() as agent:
        await agent.servers.start("srv-relay", by="test")
        await asyncio.sleep(moment)
    async with make_agent() as agent:
        server = await agent.until_state("srv-relay", ServerState.READY)
        assert len(agent.manager.units) == 1
        assert server.restarts == 0
        agent.check_transitions()


async def test_a_model_whose_file_is_gone_is_not_started_and_comes_back_with_it(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    path = toy_model(models / "srv-comeback.gguf")
    async with make_agent() as agent:
        server = await agent.ready("srv-comeback")
        path.rename(models / "away")
        await agent.scan()
        assert agent.registry.model("srv-comeback").facts.status is ModelStatus.MISSING
        assert agent.reconciler.state("srv-comeback") is ServerState.READY
        # Its server ends, and there is nothing to start another from.
        os.kill(server.pid or 0, signal.SIGTERM)
        await agent.until(lambda: not agent.manager.units, "the server is gone")
        await agent.desired.wish(["srv-comeback"], run=True, by="test")
        failed = await agent.until_state("srv-comeback", ServerState.COOLDOWN)
        assert failed.failure is not None
        assert failed.failure.result == "not-usable"

        await agent.scan()
        assert "srv-comeback" not in agent.registry.models
        assert agent.servers.wanted() == {}
        assert agent.reconciler.plan().steps == ()
        (models / "away").rename(path)
        await agent.scan()
        agent.reconciler.forgive("srv-comeback")
        await agent.until_state("srv-comeback", ServerState.READY)


async def test_a_wish_for_a_model_that_never_was_does_nothing(make_agent: MakeAgent, models: Path) -> None:
    async with make_agent() as agent:
        await agent.desired.wish(["srv-ghost"], run=True, by="test")
        assert agent.reconciler.plan().steps == ()
        assert agent.reconciler.plan().wake_at is None
        assert agent.reconciler.state("srv-ghost") is ServerState.STOPPED
        assert agent.servers.wanted() == {}
        assert await agent.servers.list() == []
        assert agent.told() == []


async def _run_unit(name: str, *command: str) -> None:
    process = await asyncio.create_subprocess_exec("systemd-run", "--user", "--quiet", f"--unit={name}", *command)
    assert await process.wait() == 0
