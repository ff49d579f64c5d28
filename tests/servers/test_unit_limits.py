"""The limits of a server's unit: what systemd holds is what was chosen, and stays it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.unit_limits import LIMITS, limits_in, limits_text, unit_limits
from magi_agent.systemd.transient import TransientService
from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel
from tests.runtime_settings.strategies import RUNTIME_SETTINGS
from tests.servers.conftest import MakeAgent
from tests.servers.system import properties, systemctl

ALL = RuntimeSettings(
    memory_high=1 << 30,
    memory_max=2 << 30,
    cpu_quota=1.5,
    cpu_weight=50,
    cpu_affinity="0-1",
    io_weight=60,
    io_read_bandwidth_max=500_000_000,
    numa_policy="bind",
    numa_nodes="0",
)
HELD = {
    "MemoryHigh": str(1 << 30),
    "MemoryMax": str(2 << 30),
    "CPUQuotaPerSecUSec": "1.500000s",
    "CPUWeight": "50",
    "CPUAffinity": "0-1",
    "IOWeight": "60",
    "NUMAPolicy": "bind",
    "NUMAMask": "0",
}


async def test_every_limit_is_held_by_the_unit_also_after_a_reload_and_a_restart(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-limited.gguf")
    held = {**HELD, "IOReadBandwidthMax": f"{models} 500000000"}
    async with make_agent() as agent:
        await agent.choose("srv-limited", ALL)
        server = await agent.ready("srv-limited")
        assert server.restart_reasons == ()
        assert await properties(server.unit, *held) == held
        await systemctl("daemon-reload")
        # systemd writes every property of a transient unit down but this one, and so forgets it here.
        del held["NUMAPolicy"]
        assert await properties(server.unit, *held) == held
        os.kill(server.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-limited").n_restarts == 1, "systemd restarts it")
        again = await agent.until_state("srv-limited", ServerState.READY)
        assert again.restart_reasons == ()
        assert await properties(server.unit, *held) == held
        assert os.sched_getaffinity(again.pid or 0) == {0, 1} & os.sched_getaffinity(0)


@pytest.mark.parametrize("name", ["with space", "a%b", 'a"b', "a'b", "a\\b"])
async def test_the_limit_on_the_disk_is_held_for_a_folder_of_any_name(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, name: str
) -> None:
    folder = models / name / "deep"
    folder.mkdir(parents=True)
    toy_model(folder / "srv-odd-folder.gguf")
    held = {"IOReadBandwidthMax": f"{models} 500000000"}
    async with make_agent() as agent:
        await agent.choose("srv-odd-folder", RuntimeSettings(io_read_bandwidth_max=500_000_000))
        server = await agent.ready("srv-odd-folder")
        assert await properties(server.unit, *held) == held
        await systemctl("daemon-reload")
        assert await properties(server.unit, *held) == held


@pytest.mark.parametrize("path", ["/no such folder/x.gguf", "/proc/1 2/x.gguf"])
def test_a_disk_that_cannot_be_told_is_said(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        unit_limits(RuntimeSettings(io_read_bandwidth_max=1), path)


def test_a_mount_point_that_systemd_would_misread_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A mount takes privileges that tests may not have, so the folder above is told to be another disk's.
    disk = tmp_path / "my disk"
    disk.mkdir()
    stat = Path.stat

    def told(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        status = stat(path, follow_symlinks=follow_symlinks)
        return os.stat_result((*status[:2], status.st_dev + 1, *status[3:10])) if path == tmp_path else status

    monkeypatch.setattr(Path, "stat", told)
    with pytest.raises(ValueError, match="leave io_read_bandwidth_max out"):
        unit_limits(RuntimeSettings(io_read_bandwidth_max=1), str(disk / "x.gguf"))


async def test_without_limits_the_unit_has_none(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / "srv-unlimited.gguf")
    async with make_agent() as agent:
        server = await agent.ready("srv-unlimited")
        assert await properties(server.unit, *HELD, "IOReadBandwidthMax") == {
            "MemoryHigh": "infinity",
            "MemoryMax": "infinity",
            "CPUQuotaPerSecUSec": "infinity",
            "CPUWeight": "[not set]",
            "CPUAffinity": "",
            "IOWeight": "[not set]",
            "NUMAPolicy": "n/a",
            "NUMAMask": "",
        }


async def test_what_an_operator_sets_on_the_unit_is_no_reason_to_restart_it(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-operated.gguf")
    async with make_agent() as agent:
        await agent.choose("srv-operated", RuntimeSettings(memory_max=2 << 30, cpu_weight=50))
        server = await agent.ready("srv-operated")
        await systemctl("set-property", "--runtime", server.unit, "MemoryMax=3G", "CPUWeight=70", "MemoryHigh=1G")
        await agent.manager.refresh(server.unit)
        again = await agent.servers.server("srv-operated")
        assert again.restart_reasons == ()
        assert (await properties(server.unit, "MemoryMax", "CPUWeight")) == {
            "MemoryMax": str(3 << 30),
            "CPUWeight": "70",
        }
        # What is chosen is compared with what was chosen.
        await agent.choose("srv-operated", RuntimeSettings(memory_max=3 << 30, cpu_weight=50))
        changed = await agent.servers.server("srv-operated")
        assert changed.restart_reasons == (f"memory_max: runs with {2 << 30}, should be {3 << 30}",)


@given(RUNTIME_SETTINGS)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_limits_are_read_again_from_the_environment(said: RuntimeSettings) -> None:
    expected = {name: value for name, value in said.said() if name in LIMITS}

    assert limits_in(limits_text(said)) == expected
    assert bool(limits_text(said)) == bool(expected)
    TransientService(
        name="x.service",
        description="x",
        argv=("/bin/true",),
        environment={"MAGI_LIMITS": limits_text(said)},
        **unit_limits(said, "/models/deep/x.gguf"),
    )


@given(st.text() | st.sampled_from(["[]", "5", "null", '"x"', "{", '{"a": 1}', "[" * 10_000]))
def test_what_somebody_else_wrote_there_is_read_or_passed_over(text: str) -> None:
    assert isinstance(limits_in(text), dict)


@pytest.mark.parametrize(
    ("said", "nodes", "affinity"),
    [
        (RuntimeSettings(numa_nodes="0-1"), (), ()),
        (RuntimeSettings(numa_policy="interleave", numa_nodes="0-1,3"), (0, 1, 3), ()),
        (RuntimeSettings(cpu_affinity="4-6,1"), (), (1, 4, 5, 6)),
    ],
)
def test_lists_of_numbers_are_written_out(
    said: RuntimeSettings, nodes: tuple[int, ...], affinity: tuple[int, ...]
) -> None:
    limits = unit_limits(said, "/models/x.gguf")

    assert (limits["numa_nodes"], limits["cpu_affinity"]) == (nodes, affinity)
