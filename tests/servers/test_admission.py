"""Starts that do not fit: refused with the arithmetic, in order, at a pace; on a real systemd with real servers.

Where it matters how much there is, the host's figures are those of a smaller host: what it has, less what the servers
here really use. All else is real.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.errors import InsufficientMemory
from magi_agent.host.memory import HostMemory
from magi_agent.host.unit_memory import UnitMemory, unit_memory
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers import admission as admission_module
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.operations import OperationStatus
from magi_agent.servers.placed import Placed
from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel, SampleModels
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import systemctl

MIB = 1 << 20
TOKENS = 100_000
"""Of context, for which a server of a toy model needs some 133 MiB."""


class SmallHost:
    """The figures of a host that has ``size`` bytes for servers, in which memory comes back ``late`` seconds late."""

    def __init__(self, agent: ServingAgent, size: int, late: float = 0.0) -> None:
        self._agent = agent
        self._late = late
        self.size = size
        self._seen: dict[str, tuple[int, float]] = {}
        """What each server used when it was looked at last, and when that was."""

    async def memory(self) -> HostMemory:
        now = time.monotonic()
        for name, unit in self._agent.manager.units.items():
            used = unit_memory(unit.control_group, unit.main_pid)
            if used is not None:
                # What is late does not shrink with a process that is ending, either.
                least = self._seen[name][0] if self._late and name in self._seen else 0
                self._seen[name] = (max(least, used.anonymous + used.mapped), now)
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen[1] <= self._late}
        available = max(0, self.size - sum(used for used, _ in self._seen.values()))
        return HostMemory(self.size, available, 0, 0, None, ())

    async def watch(self) -> None:
        """See what each server uses before it ends."""
        while True:
            await self.memory()
            await asyncio.sleep(0.02)


async def sized(agent: ServingAgent, *model_ids: str, tokens: int = TOKENS, enabled: bool = False) -> int:
    """Have models need as much as their context takes, and return what one of them needs."""
    settings = RuntimeSettings(ctx_size=tokens, parallel_slots=1)
    for model_id in model_ids:
        await agent.registry.choose(
            model_id, lambda choices: replace(choices, runtime_settings=settings, enabled=enabled)
        )
    return (await agent.memory.need(model_ids[0])).host_bytes


def small(agent: ServingAgent, size: float, late: float = 0.0) -> SmallHost:
    host = SmallHost(agent, int(size), late)
    agent.figures = host.memory
    return host


def in_use(agent: ServingAgent, model_id: str) -> int:
    unit = agent.unit(model_id)
    used = unit_memory(unit.control_group, unit.main_pid)
    assert used is not None
    return used.anonymous + used.mapped


async def test_what_no_host_has_is_refused_with_the_arithmetic_and_nothing_is_wished(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-huge.gguf")
    async with make_agent() as agent:
        settings = RuntimeSettings(ctx_size=100_000_000, parallel_slots=1, batch_size=4096, ubatch_size=4096)
        await agent.choose("srv-huge", settings)
        need = (await agent.memory.need("srv-huge")).host_bytes
        assert need > 1 << 39
        with pytest.raises(InsufficientMemory, match=r"model srv-huge does not fit: it needs \d+\.\d GiB") as refused:
            await agent.servers.start("srv-huge", by="test", wait=PATIENCE_OF_TESTS)

        details = refused.value.details
        memory = await agent.host.memory()
        assert details["neededBytes"] == need
        assert details["basis"] == "estimated"
        assert details["promisedBytes"] == 0
        assert details["reserveBytes"] == 512 * MIB
        assert details["availableBytes"] == pytest.approx(memory.room, rel=0.2)
        assert details["shortByBytes"] == need - int(str(details["availableBytes"])) + 512 * MIB
        assert agent.desired.wishes == {}
        assert agent.registry.model("srv-huge").choices.port is None
        assert agent.told() == []


async def test_forced_it_is_started_all_the_same_and_an_agent_after_this_one_knows(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-forced.gguf")
    async with make_agent(memory_reserve="1000T") as agent:
        for verb in (agent.servers.start, agent.servers.restart):
            with pytest.raises(InsufficientMemory, match=r"1024000\.0 GiB are kept in reserve \(memory_reserve\)"):
                await verb("srv-forced", by="test", wait=PATIENCE_OF_TESTS)
        outcome = await agent.servers.start("srv-forced", by="test", wait=PATIENCE_OF_TESTS, forced=True)
        assert outcome.server.is_ready
        # What runs already is not refused, and the word holds for another run of it.
        assert (await agent.servers.start("srv-forced", by="test")).changed is False
        assert (await agent.servers.restart("srv-forced", by="test", wait=PATIENCE_OF_TESTS)).server.is_ready

    async with make_agent(memory_reserve="1000T") as agent:
        await agent.until_state("srv-forced", ServerState.READY)
        unit = agent.unit("srv-forced").name
        await systemctl("stop", unit)
        await agent.until_state("srv-forced", ServerState.STOPPED)
        # The word holds until the server is stopped, by whomever.
        with pytest.raises(InsufficientMemory):
            await agent.servers.start("srv-forced", by="test")
        agent.check_transitions()


async def test_a_forced_word_is_kept_for_a_start_that_another_agent_makes(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-later.gguf")
    async with make_agent(memory_reserve="1000T") as agent:
        await agent.desired.set_drain(True, by="test")
        await agent.desired.wish(["srv-later"], run=True, by="test", forced=True)
    async with make_agent(memory_reserve="1000T") as agent:
        await agent.desired.set_drain(False, by="test")
        await agent.until_state("srv-later", ServerState.READY)
        await agent.servers.stop("srv-later", by="test", wait=PATIENCE_OF_TESTS)


async def test_start_all_starts_the_most_wanted_and_the_rest_when_there_is_room(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    ids = ["srv-a", "srv-b", "srv-c"]
    for model_id in ids:
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, *ids, enabled=True)
        await agent.registry.choose(
            "srv-c", lambda c: replace(c, runtime_settings=replace(c.runtime_settings, pinned=True))
        )
        small(agent, 2.5 * need)
        operation = agent.servers.start_all(by="test")
        assert list(operation.parts) == ["srv-c", "srv-a", "srv-b"]
        assert await agent.servers.operations.finished(operation, PATIENCE_OF_TESTS)

        assert operation.status is OperationStatus.FAILED
        assert {each: part.status for each, part in operation.parts.items()} == {
            "srv-c": OperationStatus.SUCCEEDED,
            "srv-a": OperationStatus.SUCCEEDED,
            "srv-b": OperationStatus.FAILED,
        }
        assert "model srv-b does not fit: it needs" in operation.parts["srv-b"].message
        server = await agent.servers.server("srv-b")
        assert server.state is ServerState.COOLDOWN
        assert server.failure is not None
        assert server.failure.result == "insufficient-memory"
        assert server.failure.advice is not None
        assert "magictl start --force srv-b" in server.failure.advice
        assert server.failure.details["promisedBytes"] > 0  # type: ignore[operator]
        # When the others were ready, it was tried at once; now it waits.
        await agent.until(lambda: (agent.reconciler.retry_in("srv-b") or 0) > 5, "it waits")

        await agent.servers.stop("srv-a", by="test", wait=PATIENCE_OF_TESTS)
        await agent.until_state("srv-b", ServerState.READY, seconds=5)

        assert agent.reconciler.state("srv-c") is ServerState.READY
        said = [record.message for record in caplog.records if "srv-b failed" in record.message]
        assert len(said) == 1
        agent.check_transitions()


async def test_the_smallest_come_first_so_that_most_come_up(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-1-big", "srv-2-small", "srv-3-small"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-2-small", "srv-3-small", enabled=True)
        assert await sized(agent, "srv-1-big", tokens=2 * TOKENS, enabled=True) > 1.5 * need
        small(agent, 2.2 * need)
        operation = agent.servers.start_all(by="test")
        assert await agent.servers.operations.finished(operation, PATIENCE_OF_TESTS)
        assert [each for each, part in operation.parts.items() if part.status is OperationStatus.FAILED] == [
            "srv-1-big"
        ]
        agent.check_transitions()


async def test_two_that_are_started_at_once_are_not_both_given_the_same_memory(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-x", "srv-y"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-x", "srv-y")
        small(agent, 1.5 * need)
        outcomes = await asyncio.gather(
            *(agent.servers.start(each, by="test", wait=PATIENCE_OF_TESTS) for each in ("srv-x", "srv-y")),
            return_exceptions=True,
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert len(failed) == 1
        assert isinstance(failed[0], InsufficientMemory)
        assert int(str(failed[0].details["promisedBytes"])) > 0.5 * need
        states = sorted(str(agent.reconciler.state(each)) for each in ("srv-x", "srv-y"))
        assert states in (["cooldown", "ready"], ["ready", "stopped"])
        agent.check_transitions()


async def test_what_a_ready_server_has_not_touched_yet_stays_promised(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-one", "srv-two"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-one", "srv-two")
        await agent.ready("srv-one")
        used = await agent.memory.used("srv-one")
        assert used is not None
        assert used.anonymous < 0.7 * need, "its buffers are not touched before there is a large batch"
        small(agent, in_use(agent, "srv-one") + 1.1 * need)
        with pytest.raises(InsufficientMemory) as refused:
            await agent.servers.start("srv-two", by="test")
        assert int(str(refused.value.details["promisedBytes"])) == pytest.approx(need - used.anonymous, rel=0.2)


async def test_a_server_that_fills_the_memory_can_be_restarted_and_nobody_takes_it_in_between(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-fills", "srv-waits"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-fills", "srv-waits")
        await agent.choose("srv-waits", RuntimeSettings(ctx_size=TOKENS, parallel_slots=1, pinned=True))
        small(agent, 1.3 * need)
        before = await agent.ready("srv-fills")
        await agent.desired.wish(["srv-waits"], run=True, by="test")
        await agent.until_state("srv-waits", ServerState.COOLDOWN)

        after = (await agent.servers.restart("srv-fills", by="test", wait=PATIENCE_OF_TESTS)).server

        assert after.is_ready
        assert after.pid != before.pid
        assert agent.reconciler.state("srv-waits") is ServerState.COOLDOWN
        await sized(agent, "srv-fills", tokens=3 * TOKENS)
        with pytest.raises(InsufficientMemory):
            await agent.servers.restart("srv-fills", by="test")
        assert (await agent.servers.server("srv-fills")).pid == after.pid
        # One that is forced is not looked at before, and by an agent that has come up since nothing was promised to it.
        await sized(agent, "srv-fills")
        agent.admission._promises.clear()
        forced = await agent.servers.restart("srv-fills", by="test", wait=PATIENCE_OF_TESTS, forced=True)
        assert forced.server.is_ready
        assert "starting" not in agent.told("srv-waits")[1:]
        assert agent.reconciler.state("srv-waits") is ServerState.COOLDOWN
        agent.check_transitions()


async def test_a_restart_is_given_its_weights_back_also_where_nobody_sees_that_it_has_mapped_them(
    make_agent: MakeAgent, models: Path, sample_models: SampleModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(sample_models.smollm2, models / "srv-weights.gguf")
    async with make_agent(memory_reserve="0") as agent:
        await agent.choose("srv-weights", RuntimeSettings(ctx_size=512, parallel_slots=1))
        need = await agent.memory.need("srv-weights")
        assert need.mapped > 0.3 * need.host_bytes
        before = await agent.ready("srv-weights")
        unit = agent.unit("srv-weights")

        async def figures() -> HostMemory:
            used = unit_memory(unit.control_group, unit.main_pid)
            size = int(1.1 * need.host_bytes)
            return HostMemory(size, size - (used.anonymous if used else 0), 0, 0, None, (), need.mapped if used else 0)

        def hidden(control_group: str, main_pid: int | None) -> UnitMemory | None:
            seen = unit_memory(control_group, main_pid)
            return replace(seen, mapped=0) if seen else None

        # As of a control group that has not brought the pages in, and processes of another user.
        monkeypatch.setattr(admission_module, "unit_memory", hidden)
        monkeypatch.setattr(admission_module, "mapped_by", lambda _: 0)
        agent.figures = figures
        after = (await agent.servers.restart("srv-weights", by="test", wait=PATIENCE_OF_TESTS)).server
        assert after.pid != before.pid

        # Where nothing can be seen, nothing is refused.
        monkeypatch.setattr(admission_module, "unit_memory", lambda *_: None)
        unit = agent.unit("srv-weights")
        again = (await agent.servers.restart("srv-weights", by="test", wait=PATIENCE_OF_TESTS)).server
        assert again.pid != after.pid


async def test_a_start_waits_for_memory_of_a_server_that_is_being_stopped(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for model_id in ("srv-goes", "srv-comes", "srv-less-wanted"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-goes", "srv-comes")
        host = small(agent, 1.4 * need, late=1.0)
        await agent.ready("srv-goes")
        watching = asyncio.create_task(host.watch())
        with pytest.raises(InsufficientMemory):
            await agent.servers.start("srv-comes", by="test")
        # As the activation of a profile: both in one word. The third is small, and fits at any time.
        await agent.desired.wish_each({"srv-goes": False, "srv-comes": True}, by="test", named=True)
        await agent.desired.wish(["srv-less-wanted"], run=True, by="test")
        await agent.until_state("srv-comes", ServerState.READY)
        await agent.until_state("srv-less-wanted", ServerState.READY)
        watching.cancel()

        assert "cooldown" not in agent.told("srv-comes")
        assert "the start of srv-comes waits for memory that is coming back" in caplog.messages
        assert agent.reconciler.state("srv-goes") is ServerState.STOPPED
        agent.check_transitions()


async def test_what_would_never_fit_is_not_waited_for(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-goes", "srv-never"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-goes")
        await sized(agent, "srv-never", tokens=4 * TOKENS)
        small(agent, 1.4 * need)
        await agent.ready("srv-goes")
        await agent.desired.wish_each({"srv-goes": False, "srv-never": True}, by="test")
        await agent.until_state("srv-never", ServerState.COOLDOWN)
        with pytest.raises(InsufficientMemory):
            await agent.servers.start("srv-never", by="test")


async def test_a_start_that_waits_for_memory_can_be_called_off(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_HOST_COMES_BACK", 60.0)
    for model_id in ("srv-goes", "srv-comes"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-goes", "srv-comes")
        await agent.ready("srv-goes")
        await agent.servers.stop("srv-goes", by="test", wait=PATIENCE_OF_TESTS)

        async def never() -> HostMemory:
            return HostMemory(2 * need, 0, 0, 0, None, ())

        agent.figures = never
        assert not (await agent.servers.start("srv-comes", by="test")).settled
        await agent.until(lambda: "srv-comes" in agent.admission.waiting, "it waits")
        await agent.until_state("srv-comes", ServerState.STARTING)
        outcome = await agent.servers.stop("srv-comes", by="test", wait=5)
        assert outcome.settled
        assert agent.admission.waiting == ()
        assert [each for each in agent.told("srv-comes") if each != "stopping"] == ["starting", "stopped"]
        agent.check_transitions()


async def test_one_that_cannot_be_prepared_holds_nobody_up_for_long(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model_id in ("srv-hangs", "srv-starts"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent() as agent:
        await agent.choose("srv-hangs", RuntimeSettings(pinned=True))
        prepare = agent.preparation.launch_for

        async def hang(model_id: str) -> LaunchSpecification:
            if model_id == "srv-hangs":
                await asyncio.sleep(3600)
            return await prepare(model_id)

        # As of a file system that does not answer.
        monkeypatch.setattr(agent.preparation, "launch_for", hang)
        await agent.desired.wish(["srv-hangs", "srv-starts"], run=True, by="test")
        await agent.until_state("srv-starts", ServerState.READY, seconds=10)
        assert agent.reconciler.state("srv-hangs") is ServerState.STARTING
        await agent.desired.wish(["srv-hangs"], run=False, by="test")


async def test_what_nobody_can_tell_is_no_reason_to_refuse_and_said_once(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model(models / "srv-unknown.gguf")
    async with make_agent(memory_reserve="1000T") as agent:

        async def silent() -> HostMemory:
            raise TimeoutError

        agent.figures = silent
        await agent.ready("srv-unknown")
        await agent.servers.restart("srv-unknown", by="test", wait=PATIENCE_OF_TESTS)
        said = [message for message in caplog.messages if "without knowing whether it fits" in message]
        assert said == [
            "srv-unknown is started without knowing whether it fits: the host's memory is not known: nobody told"
        ]


class NobodyKnows:
    """Places of which it cannot be told what is needed there: every file that llama-server loads can be read here."""

    async def place(self, launch: LaunchSpecification, promised: Mapping[str, int]) -> Placed:  # noqa: ARG002  # Placing
        return Placed(launch, None, f"the header of {launch.model_id} is in runes", {}, None)


async def test_a_need_that_is_unknown_is_admitted(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model(models / "srv-odd.gguf")
    async with make_agent(memory_reserve="1000T") as agent:
        agent.admission._placing = NobodyKnows()
        await agent.ready("srv-odd")
        await agent.servers.restart("srv-odd", by="test", wait=PATIENCE_OF_TESTS)
        said = [message for message in caplog.messages if "without knowing whether it fits" in message]
        reason = "what it needs of memory is not known: the header of srv-odd is in runes"
        assert said == [f"srv-odd is started without knowing whether it fits: {reason}"]


async def test_what_loads_when_the_agent_comes_up_is_promised_anew(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    for model_id in ("srv-adopted", "srv-next"):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(memory_reserve="0") as agent:
        need = await sized(agent, "srv-adopted", "srv-next")
        await agent.ready("srv-adopted")
    async with make_agent(memory_reserve="0") as agent:
        await agent.until_state("srv-adopted", ServerState.READY)
        small(agent, in_use(agent, "srv-adopted") + 1.1 * need)
        with pytest.raises(InsufficientMemory) as refused:
            await agent.servers.start("srv-next", by="test")
        assert int(str(refused.value.details["promisedBytes"])) > 0.3 * need
        # Of one that runs by other settings than it would be started with, nobody knows what it needs.
        await sized(agent, "srv-adopted", tokens=TOKENS // 2)
        agent.admission._promises.clear()
        await agent.ready("srv-next")
