"""Starting and stopping one server again and again leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from tests.agent_process import AgentProcess, ended, units
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS
from tests.servers.system import is_free

CYCLES = int(os.environ.get("MAGI_TEST_CYCLES", "50"))
WARM_UP = 10
FILLING = 110
"""Cycles until the agent keeps as many events as it ever does; memory grows until then."""
"""Cycles in which buffers grow to what they need."""
MEGABYTE = 1 << 20
SECONDS = 60 + 6 * (FILLING + CYCLES)


@pytest.mark.timeout(SECONDS)
def test_an_agent_that_starts_and_stops_a_server_many_times_leaks_nothing(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> None:
    toy_model(tmp_path / "models" / "cycle-one.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server)
    path = "/api/models/servers/cycle-one"

    def held() -> tuple[int, int, int]:
        assert agent.process is not None
        process = psutil.Process(agent.process.pid)
        return process.num_fds(), process.num_threads(), process.memory_info().rss

    with ended(agent, "magi-llama-cycle-*.service"):
        agent.start()
        agent.wait_settled()
        for cycle in range(FILLING + CYCLES):
            if cycle == FILLING:
                before = held()
            port = agent.must("POST", f"{path}/start?wait=60")["server"]["port"]
            assert agent.must("POST", f"{path}/stop?wait=60")["server"]["state"] == "stopped"
        after = held()

        assert units("magi-llama-cycle-*.service") == {}
        assert is_free(port)
        assert after[0] <= before[0] + 1, "file descriptors: one of a request may be open still"
        assert after[1] <= before[1] + 1, "threads: the pool may have grown once more"
        assert after[2] - before[2] < MEGABYTE, f"{(after[2] - before[2]) / CYCLES:.0f} bytes of memory in each cycle"


@pytest.mark.timeout(SECONDS)
async def test_no_task_stays_behind(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "srv-cycle.gguf")
    async with make_agent() as agent:

        async def tasks() -> int:
            await agent.until(lambda: not agent.manager.units, "the unit is gone")
            await asyncio.sleep(0.5)
            return len(asyncio.all_tasks())

        before = await tasks()
        for _ in range(WARM_UP):
            await agent.servers.start("srv-cycle", by="test", wait=PATIENCE_OF_TESTS)
            await agent.servers.stop("srv-cycle", by="test", wait=PATIENCE_OF_TESTS)
        assert await tasks() == before
        agent.check_transitions()
