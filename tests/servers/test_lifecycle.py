"""Start, ready, answer, stop; on a real systemd with a real llama-server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from magi_agent.errors import ModelNotFound, ModelNotUsable, StartFailed
from magi_agent.registry.model import Choices
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.servers.operations import OperationStatus
from magi_agent.servers.plan import Step, Verb
from magi_agent.systemd.jobs import JobResult
from magi_agent.vocabulary import MAX_ID_LENGTH, ServerState
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS
from tests.servers.system import complete, is_free, processes_of, properties, stand_in, systemctl


def _enabled(choices: Choices) -> Choices:
    return replace(choices, enabled=True)


async def test_a_model_is_started_answers_is_stopped_and_nothing_of_it_is_left(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-life.gguf")
    async with make_agent() as agent:
        outcome = await agent.servers.start("srv-life", by="test", wait=PATIENCE_OF_TESTS)
        server = outcome.server
        assert (outcome.changed, outcome.settled, outcome.message) == (True, True, "Model srv-life is ready")
        assert server.state is ServerState.READY
        assert server.is_ready
        assert server.is_running
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.restart_reasons == ()
        assert server.failure is None
        assert server.memory_bytes is not None
        assert server.memory_bytes > 1 << 20
        assert server.cpu_seconds is not None
        assert len(await complete(server.url)) == 4
        group = agent.unit("srv-life").control_group
        assert processes_of(group) == [server.pid]
        assert [listed.model_id for listed in await agent.servers.list()] == ["srv-life"]

        outcome = await agent.servers.stop("srv-life", by="test", wait=PATIENCE_OF_TESTS)

        assert (outcome.changed, outcome.settled, outcome.message) == (True, True, "Model srv-life is stopped")
        assert (outcome.server.state, outcome.server.pid, outcome.server.url) == (ServerState.STOPPED, None, None)
        assert outcome.server.port == server.port
        await agent.until(lambda: not agent.manager.units, "systemd has forgotten the unit")
        assert processes_of(group) == []
        assert is_free(server.port or 0)
        assert await agent.servers.list() == []
        assert agent.told("srv-life") == ["starting", "loading", "ready", "stopping", "stopped"]
        agent.check_transitions()


async def test_a_model_with_the_longest_name_is_started(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / f"srv-{'long' * 60}.gguf")
    async with make_agent() as agent:
        (model_id,) = agent.registry.models
        assert len(model_id) == MAX_ID_LENGTH
        assert (await agent.ready(model_id)).is_ready
        await agent.servers.stop(model_id, by="test", wait=PATIENCE_OF_TESTS)


async def test_the_unit_is_as_specified(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "srv-unit.v1.5-q4.gguf")
    async with make_agent(stop_timeout="7") as agent:
        server = await agent.ready("srv-unit.v1.5-q4")
        assert server.unit == "magi-llama-srv-unit.v1.5-q4.service"
        shown = await properties(
            server.unit, "Slice", "Type", "SyslogIdentifier", "Restart", "RestartUSec", "StartLimitBurst",
            "StartLimitIntervalUSec", "TimeoutStopUSec", "KillMode", "Transient", "CollectMode", "LogExtraFields",
            "NoNewPrivileges", "ProtectSystem", "PrivateTmp", "PrivateUsers", "RestrictAddressFamilies", "UMask",
        )  # fmt: skip
        assert shown == {
            "Slice": "magi-llama.slice",
            "Type": "exec",
            "SyslogIdentifier": "magi-llama-srv-unit.v1.5-q4",
            "Restart": "on-failure",
            "RestartUSec": "1s",
            "StartLimitBurst": "4",
            "StartLimitIntervalUSec": "1min",
            "TimeoutStopUSec": "7s",
            "KillMode": "mixed",
            "Transient": "yes",
            "CollectMode": "inactive",
            "LogExtraFields": "MAGI_MODEL=srv-unit.v1.5-q4",
            "NoNewPrivileges": "yes",
            "ProtectSystem": "strict",
            "PrivateTmp": "yes",
            "PrivateUsers": "yes",
            "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
            "UMask": "0077",
        }

        _check_confinement(server.pid or 0, models, agent.state)


def _check_confinement(pid: int, models: Path, hidden: Path) -> None:
    """What the kernel says: no new privileges, system calls filtered, and of all of /tmp only the models' folder."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    assert {"NoNewPrivs:\t1", "Seccomp:\t2"} <= set(status)
    root = Path(f"/proc/{pid}/root")
    shown = root / str(models).lstrip("/")
    assert [path.name for path in shown.iterdir()] == [path.name for path in models.iterdir()]
    assert not (root / str(hidden).lstrip("/")).exists()
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    assert [mount[3].split(",")[0] for mount in mounts if mount[1] == str(models)] == ["ro"]


async def test_settings_reach_the_server(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "srv-set.gguf")
    async with make_agent() as agent:
        await agent.choose("srv-set", RuntimeSettings(ctx_size=256, n_threads=1))
        server = await agent.ready("srv-set")
        argv = agent.unit("srv-set").argv
        assert argv[argv.index("--ctx-size") + 1] == "256"
        assert argv[argv.index("--threads") + 1] == "1"
        assert server.restart_reasons == ()


async def test_start_of_what_runs_and_stop_of_what_does_not_say_so_and_touch_nothing(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-twice.gguf")
    async with make_agent() as agent:
        outcome = await agent.servers.stop("srv-twice", by="test")
        assert (outcome.changed, outcome.settled) == (False, True)
        assert outcome.message == "Model srv-twice is stopped already"

        first = await agent.ready("srv-twice")
        outcome = await agent.servers.start("srv-twice", by="test", wait=1)

        assert (outcome.changed, outcome.settled) == (False, True)
        assert outcome.message == "Model srv-twice is running already"
        assert outcome.server.pid == first.pid
        assert agent.told("srv-twice") == ["starting", "loading", "ready"]


async def test_without_a_wait_the_answer_comes_at_once_and_the_rest_follows(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-now.gguf")
    async with make_agent() as agent:
        outcome = await agent.servers.start("srv-now", by="test")
        assert (outcome.changed, outcome.settled) == (True, False)
        assert outcome.message == "Model srv-now is starting"
        assert outcome.server.state is ServerState.STARTING
        again = await agent.servers.start("srv-now", by="test")
        assert (again.changed, again.settled) == (False, False)
        await agent.until_state("srv-now", ServerState.READY)

        outcome = await agent.servers.stop("srv-now", by="test")
        assert (outcome.changed, outcome.settled) == (True, False)
        assert outcome.message == "Model srv-now is stopping"
        await agent.until_state("srv-now", ServerState.STOPPED)
        agent.check_transitions()


async def test_restart_replaces_the_process(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "srv-again.gguf")
    async with make_agent() as agent:
        outcome = await agent.servers.restart("srv-again", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.message == "Model srv-again is ready"
        first, invocation = outcome.server, agent.unit("srv-again").invocation_id

        outcome = await agent.servers.restart("srv-again", by="test", wait=PATIENCE_OF_TESTS)

        assert outcome.settled
        assert outcome.message == "Model srv-again is ready again"
        assert outcome.server.pid != first.pid
        assert outcome.server.port == first.port
        assert agent.unit("srv-again").invocation_id != invocation
        assert len(await complete(outcome.server.url or "")) == 4
        assert not agent.reconciler.restart_pending("srv-again")
        assert agent.told("srv-again") == [
            "starting", "loading", "ready", "stopping", "starting", "loading", "ready"
        ]  # fmt: skip
        agent.check_transitions()


async def test_a_restart_asked_for_while_it_loads_replaces_the_process_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-early.gguf")
    async with make_agent() as agent:
        await agent.servers.start("srv-early", by="test")
        await agent.until_state("srv-early", ServerState.LOADING)
        first = agent.unit("srv-early").invocation_id

        outcome = await agent.servers.restart("srv-early", by="test", wait=PATIENCE_OF_TESTS)

        assert outcome.settled
        assert outcome.server.is_ready
        assert agent.unit("srv-early").invocation_id != first
        agent.check_transitions()


async def test_stop_at_any_moment_of_a_start_leaves_nothing(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-brief.gguf")
    async with make_agent() as agent:
        for pause in (None, 0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1):
            await agent.servers.start("srv-brief", by="test")
            if pause is not None:
                await asyncio.sleep(pause)
            outcome = await agent.servers.stop("srv-brief", by="test", wait=PATIENCE_OF_TESTS)
            assert outcome.settled, f"after {pause}: {agent.told()}"
            assert is_free(outcome.server.port or 0)
            await agent.until(lambda: not agent.manager.units, "systemd has forgotten the unit")
        assert agent.reconciler.failure("srv-brief") is None
        agent.check_transitions()


async def test_the_last_of_many_contrary_words_holds(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-fickle.gguf")
    async with make_agent() as agent:
        for _ in range(3):
            words = [
                agent.servers.start("srv-fickle", by="test"),
                agent.servers.stop("srv-fickle", by="test"),
                agent.servers.restart("srv-fickle", by="test"),
                agent.servers.stop("srv-fickle", by="test"),
                agent.servers.start("srv-fickle", by="test"),
            ]
            await asyncio.gather(*words)
        await agent.until_state("srv-fickle", ServerState.READY)
        outcome = await agent.servers.start("srv-fickle", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        await agent.servers.stop("srv-fickle", by="test", wait=PATIENCE_OF_TESTS)
        agent.check_transitions()


async def test_a_start_that_waits_hears_of_a_stop(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-called-off.gguf")
    # One that is never ready: a real one might be, before the stop.
    async with make_agent(llama_server_path=str(stand_in(tmp_path / "loading", health=503))) as agent:
        start = asyncio.create_task(agent.servers.start("srv-called-off", by="one", wait=PATIENCE_OF_TESTS))
        await agent.until_state("srv-called-off", ServerState.LOADING)
        await agent.servers.stop("srv-called-off", by="another", wait=PATIENCE_OF_TESTS)
        with pytest.raises(StartFailed, match="was stopped before it was ready"):
            await start


async def test_a_start_whose_caller_goes_away_is_made_or_not_and_nothing_between(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-gone.gguf")
    async with make_agent() as agent:
        caller = asyncio.create_task(agent.servers.start("srv-gone", by="test", wait=PATIENCE_OF_TESTS))
        await agent.until(lambda: agent.registry.model("srv-gone").choices.port is not None, "it has a port")
        await asyncio.sleep(0)  # on to the save of the wish
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

        async def written() -> bool:
            await agent.desired.wish([], run=True, by="test")  # comes after whatever is being saved
            return '"run": true' in (agent.state / "desired.json").read_text()

        assert await written() == agent.desired.wants("srv-gone")
        if agent.desired.wants("srv-gone"):
            await agent.until_state("srv-gone", ServerState.READY)
        outcome = await agent.servers.stop("srv-gone", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.settled
        agent.check_transitions()


async def test_many_models_at_once_and_all_of_them_stopped(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    ids = [f"srv-many-{number}" for number in range(6)]
    for model_id in ids:
        toy_model(models / f"{model_id}.gguf")
    toy_model(models / "srv-many-not-enabled.gguf")
    async with make_agent() as agent:
        for model_id in ids:
            await agent.registry.choose(model_id, lambda choices: agent.preparation.with_port(_enabled(choices)))
        operation = agent.servers.start_all(by="test")
        assert await agent.servers.operations.finished(operation, PATIENCE_OF_TESTS)
        assert agent.servers.operations.operation(operation.operation_id) is operation
        assert operation.status is OperationStatus.SUCCEEDED, operation.parts
        assert sorted(operation.parts) == ids
        servers = await agent.servers.list()
        assert [server.state for server in servers] == [ServerState.READY] * 6
        assert len({server.port for server in servers}) == 6
        assert len({server.pid for server in servers}) == 6
        texts = await asyncio.gather(*(complete(server.url or "") for server in servers))
        assert all(len(text) == 4 for text in texts)
        assert agent.reconciler.plan().steps == ()
        assert set(agent.reconciler.plan(dict.fromkeys(ids[:2], False)).steps) == {
            Step(Verb.STOP, model_id) for model_id in ids[:2]
        }

        operation = agent.servers.stop_all(by="test")
        assert await agent.servers.operations.finished(operation, PATIENCE_OF_TESTS)
        assert operation.status is OperationStatus.SUCCEEDED, operation.parts
        await agent.until(lambda: not agent.manager.units, "systemd has forgotten the units")
        assert await agent.servers.list() == []
        agent.check_transitions()


async def test_an_operation_tells_what_became_of_each_model(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-good.gguf")
    toy_model(models / "srv-bad.gguf")
    async with make_agent() as agent:
        for model_id in ("srv-good", "srv-bad"):
            await agent.registry.choose(model_id, lambda choices: agent.preparation.with_port(_enabled(choices)))
        (models / "srv-bad.gguf").write_bytes(b"GGUF")
        await agent.scan()
        operation = agent.servers.start_all(by="test")
        assert await agent.servers.operations.finished(operation, PATIENCE_OF_TESTS)
        assert operation.status is OperationStatus.FAILED
        assert operation.parts["srv-good"].status is OperationStatus.SUCCEEDED
        assert operation.parts["srv-bad"].status is OperationStatus.FAILED
        assert "srv-bad cannot be used" in operation.parts["srv-bad"].message


async def test_an_operation_ends_with_the_agent_and_says_so(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-cut.gguf")
    async with make_agent() as agent:
        await agent.registry.choose("srv-cut", lambda choices: agent.preparation.with_port(_enabled(choices)))
        operation = agent.servers.start_all(by="test")
        assert not await agent.servers.operations.finished(operation, 0)
        await agent.servers.close()
        assert await agent.servers.operations.finished(operation, 0)
        assert operation.status is OperationStatus.FAILED


async def test_models_that_are_not_there_or_not_whole_are_refused(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-cut-off.gguf")
    whole = (models / "srv-cut-off.gguf").read_bytes()
    (models / "srv-cut-off.gguf").write_bytes(whole[:-1000])
    async with make_agent() as agent:
        for verb in (agent.servers.start, agent.servers.stop, agent.servers.restart):
            with pytest.raises(ModelNotFound):
                await verb("srv-none", by="test")
        for verb in (agent.servers.start, agent.servers.restart):
            with pytest.raises(ModelNotUsable) as refused:
                await verb("srv-cut-off", by="test")
            assert refused.value.details["status"] == "incomplete"
        assert agent.desired.wishes == {}
        assert agent.registry.model("srv-cut-off").choices.port is None


async def test_what_systemd_does_not_know_is_stopped_and_clear(make_agent: MakeAgent) -> None:
    async with make_agent() as agent:
        launcher = DirectLauncher(agent.manager, agent.state)
        assert await launcher.stop("srv-nothing", 1.0) is JobResult.DONE
        await launcher.clear("srv-nothing")
        assert agent.manager.units == {}


async def test_a_configured_folder_that_is_not_mounted_keeps_no_model_from_starting(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-mounts.gguf")
    async with make_agent(model_scan_path=f"{models}:{tmp_path / 'unmounted'}") as agent:
        server = await agent.ready("srv-mounts")
        await systemctl("daemon-reload")
        os.kill(server.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-mounts").n_restarts == 1, "systemd restarts it")
        await agent.until_state("srv-mounts", ServerState.READY)


async def test_no_connection_of_the_agents_holds_up_a_stop(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_model(models / "srv-held.gguf")
    async with make_agent() as agent:
        await agent.servers.start("srv-held", by="test", wait=PATIENCE_OF_TESTS)
        reach = agent.servers.reach_if_ready("srv-held")
        assert reach is not None
        with await agent.connections.ask(reach, "GET", "/health", silence=10, kept_open=True) as answer:
            assert answer.status == 200
            await answer.read(1000)
        assert agent.connections.waiting(reach) == 1
        at_stop: list[int] = []
        monkeypatch.setattr(DirectLauncher, "stop", _noting(partial(agent.connections.waiting, reach), at_stop))

        await agent.servers.stop("srv-held", by="test", wait=PATIENCE_OF_TESTS)

        # llama-server would wait for it. On a busy machine it may be told to stop twice.
        assert set(at_stop) == {0}


def _noting(look: Callable[[], int], seen: list[int]) -> Callable[[DirectLauncher, str, float], Awaitable[JobResult]]:
    """What stops a model's unit, and notes what there is to see before it does."""
    stop = DirectLauncher.stop

    async def noted(launcher: DirectLauncher, model_id: str, stop_timeout: float) -> JobResult:
        seen.append(look())
        return await stop(launcher, model_id, stop_timeout)

    return noted
