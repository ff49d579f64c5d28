"""Servers that fail, each in its own way: what is told of it, and what is done about it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from magi_agent.errors import ModelNotUsable, NoFreePort, PortInUse, StartFailed
from magi_agent.launcher.messages import Unreachable
from magi_agent.servers import record as record_module
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.systemd.jobs import JobResult
from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import complete, is_free, processes_of, script, stand_in, systemctl


@pytest.fixture
def strangers() -> Iterator[list[socket.socket]]:
    """Sockets of this process, which is no server of ours; closed at the end."""
    sockets: list[socket.socket] = []
    yield sockets
    for each in sockets:
        each.close()


async def test_a_binary_that_exits_at_once_is_tried_again_by_systemd_then_reported_then_left_to_cool_down(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, quick_retries: None
) -> None:
    toy_model(models / "srv-exits.gguf")
    exits = script(tmp_path / "exits", "echo first words", "echo last words >&2", "exit 7")
    async with make_agent(llama_server_path=str(exits)) as agent:
        with pytest.raises(StartFailed) as failed:
            await agent.servers.start("srv-exits", by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.message == "model srv-exits did not start: it exited with status 7"
        # A busy journald asks late which run of the unit a line is from, and is told the last one.
        lines = failed.value.details["logLines"]
        assert lines in [["first words", "last words"] * runs for runs in range(1, 5)]
        assert failed.value.details == {
            "modelId": "srv-exits",
            "result": "exit-code",
            "advice": None,
            "exitStatus": 7,
            "signal": None,
            "logLines": lines,
        }
        server = await agent.servers.server("srv-exits")
        assert server.state is ServerState.COOLDOWN
        # systemd counts the restart that its limit refused; the program ran once, and three times more.
        assert server.restarts == 4
        assert server.retry_in is not None
        assert 8 < server.retry_in <= 10
        assert server.failure is not None
        assert server.failure.restarts == 4
        assert server.failure.invocation_id == agent.unit("srv-exits").invocation_id
        assert agent.told("srv-exits")[-1] == "cooldown"
        assert agent.told("srv-exits").count("cooldown") == 1
        assert agent.reconciler.plan().steps == ()
        assert [listed.model_id for listed in await agent.servers.list()] == ["srv-exits"]
        agent.check_transitions()

        outcome = await agent.servers.stop("srv-exits", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        assert outcome.server.failure is None
        await agent.until(lambda: not agent.manager.units, "the failed unit is cleared away")
        agent.check_transitions()


async def test_the_pause_doubles_with_each_failure_and_a_start_by_hand_forgives(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, quick_retries: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(record_module, "_FIRST_COOLDOWN", 0.4)
    toy_model(models / "srv-doubles.gguf")
    exits = script(tmp_path / "exits", "echo out of order", "exit 1")
    async with make_agent(llama_server_path=str(exits)) as agent:
        await agent.servers.start("srv-doubles", by="test")
        pauses = []
        for expected in (0.4, 0.8, 1.6):
            server = await agent.until_state("srv-doubles", ServerState.COOLDOWN)
            assert server.retry_in is not None
            pauses.append(server.retry_in)
            assert server.retry_in <= expected
            await agent.until_state("srv-doubles", ServerState.STARTING, ServerState.LOADING)
        assert pauses[2] > 0.8
        await agent.until_state("srv-doubles", ServerState.COOLDOWN)
        with pytest.raises(StartFailed):
            await agent.servers.start("srv-doubles", by="test", wait=PATIENCE_OF_TESTS)
        again = agent.reconciler.retry_in("srv-doubles")
        assert again is not None
        assert again <= 0.4
        agent.check_transitions()


async def test_a_start_by_hand_after_the_cause_is_gone_does_not_wait(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    tmp_path: Path,
    llama_server: Path,
    quick_retries: None,
) -> None:
    toy_model(models / "srv-mended.gguf")
    program = script(tmp_path / "program", "exit 1")
    # The program runs another, which the unit must see too.
    folders = f"{models}:{llama_server.parent}"
    async with make_agent(llama_server_path=str(program), model_scan_path=folders) as agent:
        with pytest.raises(StartFailed):
            await agent.servers.start("srv-mended", by="test", wait=PATIENCE_OF_TESTS)
        script(program, f'exec {llama_server} "$@"')
        server = await agent.ready("srv-mended")
        assert server.failure is None
        assert server.retry_in is None
        assert server.restarts == 0
        agent.check_transitions()


async def test_a_binary_that_is_not_there_is_named_in_a_sentence(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, quick_retries: None
) -> None:
    toy_model(models / "srv-missing.gguf")
    program = tmp_path / "nothing" / "llama-server"
    async with make_agent(llama_server_path=str(program)) as agent:
        (tmp_path / "nothing").mkdir()
        with pytest.raises(
            StartFailed, match=f"systemd could not execute llama-server: there is no {program}"
        ) as failed:
            await agent.servers.start("srv-missing", by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.details["exitStatus"] == 203
        assert failed.value.details["result"] == "exit-code"
        assert failed.value.message.endswith(f"llama-server: there is no {tmp_path}/nothing/llama-server")
        assert str(failed.value.details["advice"]).startswith("install llama-server there, or name another")
        agent.check_transitions()


async def test_a_server_that_ends_cleanly_before_it_is_ready_has_failed(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-early-end.gguf")
    ends = script(tmp_path / "ends", "echo nothing to do", "sleep 0.2")
    async with make_agent(llama_server_path=str(ends)) as agent:
        with pytest.raises(StartFailed, match="it ended by itself, with status 0, before it was ready") as failed:
            await agent.servers.start("srv-early-end", by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.details["result"] == "ended-early"
        assert _lines(failed.value) == ["nothing to do"]
        assert agent.desired.wants("srv-early-end")
        assert agent.reconciler.state("srv-early-end") is ServerState.COOLDOWN
        assert agent.told("srv-early-end") == ["starting", "loading", "starting", "cooldown"]


async def test_one_that_never_gets_ready_is_stopped_and_its_last_words_are_told(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-never.gguf")
    sleeps = script(tmp_path / "sleeps", "echo waiting for nothing", "exec sleep 600")
    async with make_agent(llama_server_path=str(sleeps), max_startup_time="1") as agent:
        with pytest.raises(StartFailed, match="it showed no progress for 1 seconds and was not ready") as failed:
            await agent.servers.start("srv-never", by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.details["result"] == "start-timeout"
        assert str(failed.value.details["advice"]).startswith("magictl logs srv-never shows how far it came")
        assert _lines(failed.value) == ["waiting for nothing"]
        server = await agent.servers.server("srv-never")
        assert server.state is ServerState.COOLDOWN
        assert server.retry_in is not None
        assert server.retry_in > 5
        await agent.until(lambda: not agent.manager.units, "the unit is gone")
        assert agent.told("srv-never") == ["starting", "loading", "stopping", "cooldown"]
        assert agent.desired.wants("srv-never")
        agent.check_transitions()


async def test_the_pause_before_a_restart_of_systemds_is_no_stillness_of_the_server(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-restless.gguf")
    exits = script(tmp_path / "exits", "echo not yet", "sleep 0.2", "exit 5")
    async with make_agent(llama_server_path=str(exits), max_startup_time="0.4") as agent:
        with pytest.raises(StartFailed, match="it exited with status 5"):
            await agent.servers.start("srv-restless", by="test", wait=PATIENCE_OF_TESTS)


async def test_a_restart_of_one_that_never_gets_ready_ends_with_its_failure_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-never-again.gguf")
    sleeps = script(tmp_path / "sleeps", "exec sleep 600")
    async with make_agent(llama_server_path=str(sleeps), max_startup_time="1") as agent:
        await agent.servers.start("srv-never-again", by="test")
        await agent.until_state("srv-never-again", ServerState.LOADING)
        with pytest.raises(StartFailed, match="it showed no progress"):
            await agent.servers.restart("srv-never-again", by="test", wait=PATIENCE_OF_TESTS)
        assert not agent.reconciler.restart_pending("srv-never-again")
        assert (agent.reconciler.retry_in("srv-never-again") or 0) > 5


class UnheardLauncher(DirectLauncher):
    """Starts, and never learns how its job ended."""

    async def start(self, launch: LaunchSpecification) -> JobResult:
        await super().start(launch)
        return await asyncio.Future()


async def test_a_stop_does_not_wait_for_a_start_job_that_hangs(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-hanging.gguf")
    async with make_agent(make_launcher=UnheardLauncher) as agent:
        await agent.ready("srv-hanging")
        outcome = await agent.servers.stop("srv-hanging", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        await agent.until(lambda: not agent.manager.units, "the unit is gone")


async def test_one_that_works_on_is_given_more_time_but_not_for_ever(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-busy.gguf")
    busy = script(tmp_path / "busy", "while :; do :; done")
    async with make_agent(llama_server_path=str(busy), max_startup_time="0.5") as agent:
        began = asyncio.get_running_loop().time()
        with pytest.raises(StartFailed) as failed:
            await agent.servers.start("srv-busy", by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.details["result"] == "start-timeout"
        assert asyncio.get_running_loop().time() - began > 4


async def test_a_port_that_a_stranger_holds_is_not_started_on_and_the_holder_is_named(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, strangers: list[socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    toy_model(models / "srv-held.gguf")
    async with make_agent() as agent:
        model = await agent.preparation.give_port("srv-held")
        assert model.choices.port is not None
        strangers.append(_listen(model.choices.port))
        with pytest.raises(PortInUse, match=rf"is held by \S+ \(process {os.getpid()}"):
            await agent.preparation.launch_for("srv-held")
        with pytest.raises(StartFailed, match="stop that, or give the model another port") as failed:
            await agent.servers.start("srv-held", by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.details["result"] == "port-in-use"
        assert not agent.manager.units
        assert agent.told("srv-held") == ["starting", "cooldown"]

        strangers.pop().close()
        server = await agent.ready("srv-held")
        assert server.port == model.choices.port
        agent.check_transitions()


class CountingLauncher(DirectLauncher):
    """Counts what it is asked to start."""

    starts = 0

    async def start(self, launch: LaunchSpecification) -> JobResult:
        type(self).starts += 1
        return await super().start(launch)


async def test_a_start_called_off_while_it_waits_for_its_port_is_not_made_and_no_failure(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, strangers: list[socket.socket]
) -> None:
    for model_id in ("srv-off-held", "srv-off-freed"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(make_launcher=CountingLauncher) as agent:
        for model_id in ("srv-off-held", "srv-off-freed"):
            model = await agent.preparation.give_port(model_id)
            strangers.append(_listen(model.choices.port or 0))
            await agent.servers.start(model_id, by="test")
        stops = [
            asyncio.create_task(agent.servers.stop(model_id, by="test", wait=PATIENCE_OF_TESTS))
            for model_id in ("srv-off-held", "srv-off-freed")
        ]
        await agent.until(lambda: agent.told("srv-off-freed")[-1:] == ["stopping"], "the stop is under way")
        strangers.pop().close()
        for stop in stops:
            outcome = await stop
            assert outcome.settled
            assert outcome.server.failure is None
            assert outcome.server.retry_in is None
        assert CountingLauncher.starts == 0
        agent.check_transitions()


async def test_a_port_of_a_stranger_is_not_given_out(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, strangers: list[socket.socket]
) -> None:
    for name in ("srv-ports-one", "srv-ports-two"):
        toy_model(models / f"{name}.gguf")
    agent = make_agent()
    low, high = agent.settings.port_range
    strangers += [_listen(port) for port in range(low, high + 1) if port != low + 2]
    async with agent:
        assert (await agent.preparation.give_port("srv-ports-one")).choices.port == low + 2
        assert (await agent.preparation.give_port("srv-ports-one")).choices.port == low + 2
        with pytest.raises(NoFreePort) as refused:
            await agent.servers.start("srv-ports-two", by="test")
        assert refused.value.details["heldByOthers"] == [port for port in range(low, high + 1) if port != low + 2]
        assert agent.desired["srv-ports-two"] is None


class Thief(DirectLauncher):
    """Takes the port in the moment between its check and the server's start."""

    sockets: list[socket.socket]

    async def start(self, launch: LaunchSpecification) -> JobResult:
        self.sockets.append(_listen(launch.port))
        return await super().start(launch)


async def test_a_stranger_who_took_the_port_and_answers_is_never_taken_for_the_server(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, strangers: list[socket.socket], quick_retries: None
) -> None:
    toy_model(models / "srv-robbed.gguf")

    class ThisThief(Thief):
        sockets = strangers

    async with make_agent(make_launcher=ThisThief) as agent:
        start = asyncio.create_task(agent.servers.start("srv-robbed", by="test", wait=PATIENCE_OF_TESTS))
        await agent.until(lambda: bool(strangers), "the port is taken")
        async with _healthy_on(strangers[0]):
            with pytest.raises(StartFailed) as failed:
                await start
        assert failed.value.details["result"] in ("exit-code", "port-in-use")
        assert _lines(failed.value) != []
        assert "ready" not in agent.told("srv-robbed")
        agent.check_transitions()


async def test_a_stranger_who_answers_while_the_server_does_not_listen_is_named_as_the_cause(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    tmp_path: Path,
    strangers: list[socket.socket],
) -> None:
    toy_model(models / "srv-upstaged.gguf")
    sleeps = script(tmp_path / "sleeps", "exec sleep 600")

    class ThisThief(Thief):
        sockets = strangers

    async with make_agent(make_launcher=ThisThief, llama_server_path=str(sleeps)) as agent:
        start = asyncio.create_task(agent.servers.start("srv-upstaged", by="test", wait=PATIENCE_OF_TESTS))
        await agent.until(lambda: bool(strangers), "the port is taken")
        async with _healthy_on(strangers[0]):
            with pytest.raises(
                StartFailed, match=rf"is held by \S+ \(process {os.getpid()}.*\), which answers in its place"
            ) as failed:
                await start
        assert failed.value.details["result"] == "port-in-use"
        assert str(failed.value.details["advice"]).startswith("end that program")
        await agent.until(lambda: not agent.manager.units, "the unit is gone")
        assert agent.told("srv-upstaged") == ["starting", "loading", "stopping", "cooldown"]


async def test_a_server_that_ignores_sigterm_is_killed_in_bounded_time(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-deaf.gguf")
    deaf = stand_in(tmp_path / "deaf", stop="pass")
    async with make_agent(llama_server_path=str(deaf), stop_timeout="0.5") as agent:
        server = await agent.ready("srv-deaf")
        group = agent.unit("srv-deaf").control_group
        outcome = await agent.servers.restart("srv-deaf", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        assert outcome.server.pid != server.pid
        outcome = await agent.servers.stop("srv-deaf", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        assert outcome.server.failure is None
        assert processes_of(group) == []
        assert is_free(server.port or 0)
        await agent.until(lambda: not agent.manager.units, "its name is free")
        assert agent.told("srv-deaf") == [
            "starting", "loading", "ready", "stopping", "starting", "loading", "ready", "stopping", "stopped"
        ]  # fmt: skip
        agent.check_transitions()


async def test_a_server_killed_too_often_cools_down_and_the_signal_is_told(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, quick_retries: None
) -> None:
    toy_model(models / "srv-hunted.gguf")
    program = stand_in(tmp_path / "program")
    async with make_agent(llama_server_path=str(program)) as agent:
        await agent.ready("srv-hunted")
        for kills in range(4):
            await agent.until(partial(_is_ready_after, agent, "srv-hunted", kills), "it is ready again")
            os.kill(agent.unit("srv-hunted").main_pid or 0, signal.SIGKILL)
        server = await agent.until_state("srv-hunted", ServerState.COOLDOWN)
        assert server.failure is not None
        assert server.failure.message == "it was ended by SIGKILL"
        assert (server.failure.result, server.failure.signal) == ("signal", "SIGKILL")
        assert server.restarts == 4
        agent.check_transitions()


async def test_a_new_agent_learns_of_a_failure_it_has_not_seen(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, quick_retries: None
) -> None:
    toy_model(models / "srv-past.gguf")
    exits = script(tmp_path / "exits", "echo gone wrong", "exit 9")
    async with make_agent(llama_server_path=str(exits)) as agent:
        with pytest.raises(StartFailed):
            await agent.servers.start("srv-past", by="test", wait=PATIENCE_OF_TESTS)
    async with make_agent() as agent:
        server = await agent.until_state("srv-past", ServerState.COOLDOWN)
        assert server.failure is not None
        assert server.failure.exit_status == 9
        assert server.failure.log_lines[-1] == "gone wrong"
        assert agent.told("srv-past") == ["cooldown"]
        # What comes over the bus again does not count again.
        await agent.reconciler.look_after_absence()
        await systemctl("daemon-reload")
        await agent.manager.refresh("magi-llama-srv-past.service")
        assert (agent.reconciler.retry_in("srv-past") or 0) <= 10
        await agent.ready("srv-past")
        agent.check_transitions()


@pytest.mark.parametrize("name", [b"srv-bytes-\xff\xfe.gguf", b"srv-line\nbreak.gguf"])
async def test_a_path_that_systemd_cannot_carry_is_said_so_and_not_tried_in_a_loop(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, name: bytes
) -> None:
    path = Path(os.fsdecode(bytes(models) + b"/" + name))
    toy_model(path)
    async with make_agent() as agent:
        [model_id] = agent.registry.models
        with pytest.raises(StartFailed) as failed:
            await agent.servers.start(model_id, by="test", wait=PATIENCE_OF_TESTS)
        assert failed.value.details["result"] == "not-usable"
        assert "systemd cannot run" in failed.value.message
        failed.value.message.encode()
        with pytest.raises(ModelNotUsable):
            await agent.launcher.start(agent.preparation.launch_of(agent.registry.model(model_id), 1))
        assert agent.told(model_id) == ["starting", "cooldown"]
        assert not agent.manager.units


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("with space", "srv-odd one.gguf"),
        ("$HOME ${HOME} %h", "srv-odd-$1;rm.gguf"),
        ("it's \"quoted\" \\ 'twice'", "srv-odd 'q' \"Q\".gguf"),
        ("模型 ünïcode", "srv-odd-тест.gguf"),
    ],
)
async def test_odd_paths_are_loaded_and_survive_a_reload_of_systemd(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, folder: str, name: str
) -> None:
    toy_model(models / folder / name)
    async with make_agent() as agent:
        [model_id] = agent.registry.models
        server = await agent.ready(model_id)
        assert server.restart_reasons == ()
        await systemctl("daemon-reload")
        os.kill(server.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.told(model_id)[3:] == ["starting", "loading", "ready"], "it is ready again")
        again = await agent.servers.server(model_id)
        assert again.restart_reasons == ()
        assert len(await complete(again.url or "")) == 4


async def test_a_name_that_is_no_line_of_text_does_not_keep_a_model_from_running(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-name.gguf", name="two\nlines\t\x1b[31m" + "long" * 200)
    async with make_agent() as agent:
        await agent.ready("srv-name")
        assert agent.unit("srv-name").description.isprintable()


async def test_a_stop_by_hand_that_cannot_be_saved_is_respected_until_somebody_says_start(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-unsaved.gguf")
    async with make_agent() as agent:
        await agent.ready("srv-unsaved")
        agent.state.rename(agent.state.with_name("elsewhere"))
        agent.state.touch()
        await systemctl("stop", "magi-llama-srv-unsaved.service")
        await agent.until_state("srv-unsaved", ServerState.STOPPED)
        await agent.until(lambda: not agent.manager.units, "the unit is gone")
        assert agent.reconciler.plan().steps == ()
        assert agent.desired.wants("srv-unsaved")
        assert not agent.reconciler.wants("srv-unsaved")
        agent.state.unlink()
        agent.state.with_name("elsewhere").rename(agent.state)
        await agent.ready("srv-unsaved")
        agent.check_transitions()


async def test_while_the_host_goes_down_nothing_is_started(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-dusk.gguf")
    async with make_agent() as agent:
        server = await agent.ready("srv-dusk")
        agent.reconciler.halt()
        # What ends now was not stopped by a person.
        await systemctl("stop", server.unit)
        await agent.until_state("srv-dusk", ServerState.STOPPED)
        assert agent.desired.wants("srv-dusk")
        assert not agent.manager.units or agent.unit("srv-dusk").active_state == "inactive"


class Defective(DirectLauncher):
    """Has a defect in whatever it does."""

    calls = 0

    async def start(self, launch: LaunchSpecification) -> JobResult:  # noqa: ARG002
        type(self).calls += 1
        raise RuntimeError("a defect, made for this test")


async def test_a_defect_in_a_start_is_reported_and_does_not_run_hot(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model(models / "srv-defect.gguf")
    async with make_agent(make_launcher=Defective) as agent:
        with pytest.raises(StartFailed, match="a defect of the agent"):
            await agent.servers.start("srv-defect", by="test", wait=PATIENCE_OF_TESTS)
        agent.reconciler.wake()
        await asyncio.sleep(0)
        assert Defective.calls == 1
        assert agent.reconciler.state("srv-defect") is ServerState.COOLDOWN
        assert "start of srv-defect ended with a defect" in caplog.text
        caplog.clear()
        outcome = await agent.servers.stop("srv-defect", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled


def _is_ready_after(agent: ServingAgent, model_id: str, restarts: int) -> bool:
    return agent.reconciler.state(model_id) is ServerState.READY and agent.unit(model_id).n_restarts == restarts


def _lines(failed: StartFailed) -> list[object]:
    lines = failed.details["logLines"]
    assert isinstance(lines, list)
    return lines


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


@asynccontextmanager
async def _healthy_on(listener: socket.socket) -> AsyncIterator[None]:
    """Answer every request on a socket as a llama-server does that is ready."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"status":"ok"}')
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, sock=listener):
        yield


async def test_what_cannot_be_stopped_is_tried_again_and_said_once(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy_model(models / "srv-kept.gguf")
    monkeypatch.setattr("magi_agent.servers.reconciler._STEP_PAUSE", 0.05)
    async with make_agent() as agent:
        await agent.ready("srv-kept")
        asked = 0

        async def away(model_id: str, stop_timeout: float) -> JobResult:
            nonlocal asked
            asked += 1
            raise Unreachable(f"there is no launcher for {model_id}")

        with monkeypatch.context() as gone:
            gone.setattr(agent.launcher, "stop", away)
            await agent.servers.stop("srv-kept", by="test", wait=0)
            await agent.until(lambda: asked > 5, "it is tried again")
        await agent.until_state("srv-kept", ServerState.STOPPED)

    said = [record.getMessage() for record in caplog.records if "there is no launcher" in record.getMessage()]
    assert said == ["server of srv-kept: it cannot be stopped, which is tried again: there is no launcher for srv-kept"]
