"""Other people's hands: systemctl, signals, the bus, systemd itself."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel, SystemdUser
from tests.cuttable_bus import CuttableBus
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import complete, stand_in, systemctl

UNIT = "magi-llama-{}.service"


async def test_a_killed_server_is_restarted_by_systemd_and_proven_ready_again(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-killed.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-killed")
        os.kill(before.pid or 0, signal.SIGKILL)
        await agent.until(lambda: "ready" in agent.told("srv-killed")[3:], "it is ready again")
        after = await agent.servers.server("srv-killed")
        assert after.pid != before.pid
        assert after.restarts == 1
        assert after.failure is None
        assert agent.told("srv-killed") == ["starting", "loading", "ready", "starting", "loading", "ready"]
        assert len(await complete(after.url or "")) == 4
        agent.check_transitions()


async def test_systemctl_stop_is_respected_and_remembered_by_the_next_agent(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-by-hand.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-by-hand")
        await systemctl("stop", UNIT.format("srv-by-hand"))
        await agent.until_state("srv-by-hand", ServerState.STOPPED)
        await agent.until(lambda: not agent.desired.wants("srv-by-hand"), "the stop is remembered")
        wish = agent.desired["srv-by-hand"]
        assert wish is not None
        assert wish.by == "systemctl"
        assert agent.reconciler.plan().steps == ()
        assert agent.told("srv-by-hand")[3:] == ["stopping", "stopped"]
        agent.check_transitions()
    async with make_agent() as agent:
        assert agent.reconciler.state("srv-by-hand") is ServerState.STOPPED
        assert agent.reconciler.plan().steps == ()
        assert agent.told() == []
        await agent.ready("srv-by-hand")


async def test_systemctl_stop_while_it_loads_is_respected_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-hasty.gguf")
    async with make_agent() as agent:
        start = asyncio.create_task(agent.servers.start("srv-hasty", by="test", wait=PATIENCE_OF_TESTS))
        await agent.until_state("srv-hasty", ServerState.LOADING)
        await systemctl("stop", UNIT.format("srv-hasty"))
        await asyncio.gather(start, return_exceptions=True)
        await agent.until(lambda: not agent.desired.wants("srv-hasty"), "the stop is remembered")
        await agent.until_state("srv-hasty", ServerState.STOPPED)
        assert agent.reconciler.failure("srv-hasty") is None


async def test_systemctl_stop_in_the_pause_before_a_restart_of_systemds_is_respected(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-pausing.gguf")
    async with make_agent() as agent:
        server = await agent.ready("srv-pausing")
        os.kill(server.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-pausing").sub_state == "auto-restart", "systemd is about to restart")
        await systemctl("stop", server.unit)
        await agent.until(lambda: not agent.desired.wants("srv-pausing"), "the stop is remembered")
        await agent.until_state("srv-pausing", ServerState.STOPPED)
        assert agent.reconciler.failure("srv-pausing") is None
        agent.check_transitions()


async def test_a_restart_in_the_pause_before_a_restart_of_systemds_starts_one_server(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-both.gguf")
    async with make_agent() as agent:
        server = await agent.ready("srv-both")
        os.kill(server.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-both").sub_state == "auto-restart", "systemd is about to restart")
        outcome = await agent.servers.restart("srv-both", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        assert outcome.server.restarts == 0
        assert agent.desired.wants("srv-both")
        agent.check_transitions()


async def test_a_wish_that_is_newer_than_the_stop_by_hand_wins(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-newer.gguf")
    slow_to_stop = stand_in(tmp_path / "slow-to-stop", stop="time.sleep(1); os._exit(0)")
    async with make_agent(llama_server_path=str(slow_to_stop)) as agent:
        server = await agent.ready("srv-newer")
        by_hand = asyncio.create_task(systemctl("stop", UNIT.format("srv-newer")))
        await agent.until_state("srv-newer", ServerState.STOPPING)
        outcome = await agent.servers.start("srv-newer", by="test", wait=PATIENCE_OF_TESTS)
        await by_hand
        assert outcome.settled
        assert outcome.server.pid != server.pid
        assert agent.desired.wants("srv-newer")
        agent.check_transitions()


async def test_systemctl_restart_is_a_restart_and_no_stop(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-renewed.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-renewed")
        for restarts in range(1, 4):
            await systemctl("restart", UNIT.format("srv-renewed"))
            told = ["starting", "loading", "ready", *(["stopping", "starting", "loading", "ready"] * restarts)]
            await agent.until(partial(_was_told, agent, "srv-renewed", told), "another process is ready")
            assert agent.desired.wants("srv-renewed")
        agent.check_transitions()


async def test_stopping_the_slice_stops_all_and_is_respected(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-one", "srv-two"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent() as agent:
        await asyncio.gather(agent.ready("srv-one"), agent.ready("srv-two"))
        await systemctl("stop", "magi-llama.slice")
        for model_id in ("srv-one", "srv-two"):
            await agent.until_state(model_id, ServerState.STOPPED)
        await agent.until(
            lambda: not agent.desired.wants("srv-one") and not agent.desired.wants("srv-two"), "both are remembered"
        )
        assert agent.reconciler.plan().steps == ()
        # And the slice comes back with the next start.
        assert (await agent.ready("srv-one")).is_ready
        agent.check_transitions()


async def test_the_bus_killed_while_servers_run_costs_nothing(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-busless.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-busless")
        for _ in range(3):
            await systemctl("kill", "--signal=KILL", "dbus.service")
            await agent.until(lambda: not agent.manager.connected, "the connection is lost")
            await agent.until(lambda: agent.manager.connected, "the connection is back")
        after = await agent.servers.server("srv-busless")
        assert after.pid == before.pid
        assert after.state is ServerState.READY
        assert agent.told("srv-busless") == ["starting", "loading", "ready"]
        assert agent.desired.wants("srv-busless")
        outcome = await agent.servers.stop("srv-busless", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled


async def test_the_connection_cut_at_any_moment_of_starts_and_stops_loses_and_doubles_nothing(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, systemd_user: SystemdUser, tmp_path: Path
) -> None:
    ids = ["srv-cut-one", "srv-cut-two"]
    for model_id in ids:
        toy_model(models / f"{model_id}.gguf")
    async with (
        CuttableBus(systemd_user.bus_address, tmp_path / "bus") as bus,
        make_agent(bus_address=bus.address) as agent,
    ):
        for moment in (0.0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.02, 0.03):
            for model_id in ids:
                await agent.servers.start(model_id, by="test")
            await asyncio.sleep(moment)
            bus.cut()
            await agent.until(lambda: agent.manager.connected, "the connection is back")
            for model_id in ids:
                await agent.until_state(model_id, ServerState.READY)
            assert sorted(agent.manager.units) == [UNIT.format(model_id) for model_id in ids]
            assert [server.restarts for server in await agent.servers.list()] == [0, 0]
            assert [server.failure for server in await agent.servers.list()] == [None, None]

            for model_id in ids:
                await agent.servers.stop(model_id, by="test")
            await asyncio.sleep(moment)
            bus.cut()
            await agent.until(lambda: not agent.manager.connected, "the connection is lost")
            await agent.until(lambda: agent.manager.connected, "the connection is back")
            for model_id in ids:
                await agent.until_state(model_id, ServerState.STOPPED)
            await agent.until(lambda: not agent.manager.units, "both units are gone")
        agent.check_transitions()


async def test_the_connection_that_ends_with_any_answer_loses_and_doubles_nothing(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, systemd_user: SystemdUser, tmp_path: Path
) -> None:
    toy_model(models / "srv-cut-off.gguf")
    async with (
        CuttableBus(systemd_user.bus_address, tmp_path / "bus") as bus,
        make_agent(bus_address=bus.address) as agent,
    ):
        for answers in range(1, 16):
            bus.cut_after(answers)
            await agent.servers.start("srv-cut-off", by="test")
            server = await agent.until_state("srv-cut-off", ServerState.READY, seconds=20)
            assert (server.restarts, server.failure) == (0, None)
            await agent.servers.stop("srv-cut-off", by="test")
            await agent.until_state("srv-cut-off", ServerState.STOPPED, seconds=20)
            await agent.until(lambda: not agent.manager.units, "the unit is gone", seconds=20)
        agent.check_transitions()


async def test_a_wish_made_while_the_bus_is_down_is_carried_out_when_it_is_back(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-patient.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-patient")
        await systemctl("stop", "dbus.socket", "dbus.service")
        try:
            await agent.until(lambda: not agent.manager.connected, "the connection is lost")
            outcome = await agent.servers.stop("srv-patient", by="test", wait=0.1)
            assert not outcome.settled
        finally:
            await systemctl("start", "dbus.socket")
        await agent.until_state("srv-patient", ServerState.STOPPED)
        agent.check_transitions()


async def test_a_server_that_was_stopped_while_the_bus_was_down_stays_stopped(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-unseen.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-unseen")
        await agent.until(lambda: agent.desired.is_met("srv-unseen"), "it is known to run as wished")
        await systemctl("stop", "dbus.socket", "dbus.service")
        try:
            await agent.until(lambda: not agent.manager.connected, "the connection is lost")
            await systemctl("stop", UNIT.format("srv-unseen"))
        finally:
            await systemctl("start", "dbus.socket")
        await agent.until(lambda: not agent.desired.wants("srv-unseen"), "the stop is respected")
        assert agent.reconciler.state("srv-unseen") is ServerState.STOPPED
        wish = agent.desired["srv-unseen"]
        assert wish is not None
        assert (wish.run, wish.by) == (False, "systemctl")
        assert (await agent.servers.start("srv-unseen", by="test", wait=PATIENCE_OF_TESTS)).settled
        agent.check_transitions()


async def test_while_the_host_is_drained_nothing_is_even_tried(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-drained.gguf")
    async with make_agent() as agent:
        await agent.servers.set_drain(True, by="test")
        await agent.desired.wish(["srv-drained"], run=True, by="test")
        looks = agent.reconciler.last_look
        agent.reconciler.wake()
        await agent.until(lambda: agent.reconciler.last_look > looks, "it looks again")
        assert [step.verb for step in agent.reconciler.plan().steps] == ["start"]
        assert agent.reconciler._record("srv-drained").step is None
        assert agent.told("srv-drained") == []
        await agent.servers.set_drain(False, by="test")
        await agent.until_state("srv-drained", ServerState.READY)


async def test_a_server_that_was_stopped_while_no_agent_was_there_stays_stopped(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-meanwhile.gguf")
    toy_model(models / "srv-goes-on.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-meanwhile")
        runs = await agent.ready("srv-goes-on")
        await agent.until(lambda: agent.desired.is_met("srv-meanwhile"), "it is known to run as wished")
    await systemctl("stop", UNIT.format("srv-meanwhile"))
    async with make_agent() as agent:
        await agent.until_state("srv-goes-on", ServerState.READY)
        assert agent.reconciler.state("srv-meanwhile") is ServerState.STOPPED
        assert not agent.desired.wants("srv-meanwhile")
        assert agent.unit("srv-goes-on").main_pid == runs.pid
        assert agent.reconciler.plan().steps == ()
        await agent.ready("srv-meanwhile")


@pytest.mark.parametrize("moment", ["before the start", "between the stop and the start of a restart"])
async def test_an_agent_that_died_in_the_middle_of_its_own_work_is_not_mistaken_for_an_operator(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, moment: str
) -> None:
    toy_model(models / "srv-cut.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-cut")
        await agent.until(lambda: agent.desired.is_met("srv-cut"), "it is known to run as wished")
        if moment == "before the start":
            await agent.servers.stop("srv-cut", by="test", wait=PATIENCE_OF_TESTS)
            agent.reconciler.halt()
            await agent.servers.start("srv-cut", by="test")
    if moment != "before the start":
        await agent.desired.note_met("srv-cut", False)
        await systemctl("stop", UNIT.format("srv-cut"))
    async with make_agent() as agent:
        await agent.until_state("srv-cut", ServerState.READY)


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
async def test_systemd_reloaded_and_executed_anew_changes_nothing(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, command: str
) -> None:
    toy_model(models / "srv-constant.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-constant")
        boot = await agent.manager.boot_id()
        await systemctl(command)
        await systemctl(command)
        await agent.until(lambda: agent.manager.connected, "systemd is followed")
        await agent.manager.refresh(UNIT.format("srv-constant"))
        after = await agent.servers.server("srv-constant")
        assert (after.state, after.pid) == (ServerState.READY, before.pid)
        assert after.restart_reasons == ()
        assert agent.told("srv-constant") == ["starting", "loading", "ready"]
        assert await agent.manager.boot_id() == boot
        # What systemd wrote down and read again still starts the same server.
        os.kill(after.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.told("srv-constant")[3:] == ["starting", "loading", "ready"], "ready again")
        again = await agent.servers.server("srv-constant")
        assert again.restart_reasons == ()
        assert len(await complete(again.url or "")) == 4
        agent.check_transitions()


def _was_told(agent: ServingAgent, model_id: str, states: list[str]) -> bool:
    return agent.told(model_id) == states
