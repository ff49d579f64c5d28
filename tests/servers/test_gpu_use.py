"""What a server has of GPUs, on made-up hosts: which figures count, and when nobody can tell."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from magi_agent.host.gpu_devices import Vendor
from magi_agent.host.gpus import Gpu
from magi_agent.host.unified_hierarchy import processes_in
from magi_agent.host_facts import HostFacts
from magi_agent.servers import gpu_use
from magi_agent.servers.gpu_use import GpuUse
from magi_agent.systemd.status import UnitStatus, unit_status
from tests.servers.test_pins import Host, gpu

FIRST, SECOND = "0000:01:00.0", "0000:c1:00.0"
PID = 4711


def cuda(device: str | None = "CUDA0", address: str = FIRST, **processes: int | None) -> Gpu:
    """A GPU with what our process has of it, and another one."""
    told = {PID: processes["ours"]} if "ours" in processes else {}
    return gpu(device, address, processes={**told, 5: 1000})


INTELS = gpu("Vulkan0", "0000:00:02.0", vendor=Vendor.INTEL, backend="Vulkan", is_integrated=True)


def unit(*options: str) -> UnitStatus:
    running = unit_status("magi-llama-toy.service", {"LoadState": "loaded", "ActiveState": "active"}, {})
    return replace(running, main_pid=PID, argv=("/bin/llama-server", *options))


async def used(host: Host, *options: str) -> int | None:
    found = await GpuUse(cast(HostFacts, host)).of(unit(*options))
    assert (found.total is None) == bool(found.unavailable)
    return found.total


@pytest.mark.parametrize(
    ("gpus", "bytes_used"),
    [
        ((), 0),
        ((cuda(),), 0),
        ((cuda(ours=7),), 7),
        ((cuda(ours=7), cuda("CUDA1", SECOND, ours=8)), 15),
        # Two back ends list one GPU.
        ((cuda(ours=7), gpu("Vulkan0", FIRST, backend="Vulkan", processes={PID: 7})), 7),
        ((cuda(ours=None),), None),
        ((cuda(ours=7), cuda("CUDA1", SECOND, ours=None)), None),
        ((cuda(ours=7), gpu("CUDA1", SECOND)), None),
        # Not its own: integrated beside others, or not listed.
        ((cuda(ours=7), INTELS), 7),
        ((cuda(ours=7), gpu(None, SECOND)), 7),
        ((INTELS,), None),
    ],
)
async def test_the_sum_is_told_where_all_of_it_is(gpus: tuple[Gpu, ...], bytes_used: int | None) -> None:
    assert await used(Host(gpus)) == bytes_used


async def test_all_processes_of_its_control_group_count() -> None:
    mine = own_control_group()
    if os.getpid() not in processes_in(mine):
        pytest.skip("this host's control groups of version 2 are not seen")
    host = Host((cuda(ours=7), gpu("CUDA1", SECOND, processes={os.getpid(): 8})))
    running = GpuUse(cast(HostFacts, host))
    assert (await running.of(replace(unit(), control_group=mine))).total == 15
    assert (await running.of(unit())).total == 7


def own_control_group() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")


@pytest.mark.parametrize(
    ("options", "bytes_used"),
    [((), None), (("--device", "CUDA0"), 7), (("--device", "CUDA0,CUDA1"), None), (("--device", "none"), 7)],
)
async def test_a_gpu_that_it_was_not_given_need_not_tell(options: tuple[str, ...], bytes_used: int | None) -> None:
    assert await used(Host((cuda(ours=7), gpu("CUDA1", SECOND))), *options) == bytes_used


async def test_where_nobody_says_which_gpus_it_may_use_all_of_them_count() -> None:
    assert await used(Host((cuda(None, ours=7),), "it fails")) == 7
    assert await used(Host((cuda(None, ours=7), gpu(None, SECOND)), "it fails")) is None


@pytest.mark.parametrize(
    ("backend", "processes", "bytes_used"),
    [("ROCm", {PID: 9}, 9), ("ROCm", {}, 0), ("Vulkan", {}, None), ("Vulkan", {5: 1}, None)],
)
async def test_amds_driver_knows_of_rocm_alone(
    backend: str, processes: dict[int, int | None], bytes_used: int | None
) -> None:
    amds: dict[str, Any] = {"vendor": Vendor.AMD, "backend": backend, "processes": processes}
    assert await used(Host((gpu(f"{backend}0", "0000:0b:00.0", **amds),))) == bytes_used


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (cuda(ours=None), "CUDA0: its driver does not say how much process 4711 has of it"),
        (gpu("CUDA0", FIRST, unavailable={"processes": "Not Supported"}), "CUDA0: Not Supported"),
        (gpu("Vulkan0", FIRST, vendor=Vendor.AMD, backend="Vulkan", processes={}),
         "Vulkan0: AMD's driver tells only of processes that compute by ROCm"),
    ],
)  # fmt: skip
async def test_why_nobody_can_tell_is_said(given: Gpu, why: str) -> None:
    assert (await GpuUse(cast(HostFacts, Host((given,)))).of(unit())).unavailable == why


async def test_the_list_is_never_asked_for_anew() -> None:
    host = Host((cuda(ours=7),))
    await asyncio.gather(*(used(host) for _ in range(5)))
    assert host.asked == [None] * 5


async def test_a_driver_that_hangs_keeps_nobody_waiting_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_use, "_PATIENCE", 0.05)
    async with asyncio.timeout(5):
        assert await used(Host((cuda(ours=7),), hangs=True)) is None
