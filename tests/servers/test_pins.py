"""How a launch is placed where GPUs have addresses: on made-up hosts, as such GPUs are not here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from magi_agent.errors import SettingsNotUsable
from magi_agent.host.gpu_devices import Vendor, is_any_driver_up
from magi_agent.host.gpus import Gpu
from magi_agent.host_facts import GpuPicture, HostFacts
from magi_agent.memory.build import Build
from magi_agent.memory.estimate import Device, ModelFiles, Surroundings, estimate
from magi_agent.memory.need import MemoryNeed, NeedUnknown, Split
from magi_agent.memory.reported import Reported, refined
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers import placements
from magi_agent.servers.launch import LaunchSpecification, unit_name
from magi_agent.servers.llama_server import argv_of
from magi_agent.servers.memory_needs import MemoryNeeds
from magi_agent.servers.placements import Placements
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import unit_status
from tests.memory.test_estimate import facts
from tests.servers.test_llama_server import KNOWS_DEVICES, LAUNCH

GIB = 1 << 30


def gpu(device: str | None, address: str | None, free: float = 20, **other: Any) -> Gpu:
    told: dict[str, Any] = {
        "device": device, "backend": "CUDA", "vendor": Vendor.NVIDIA, "name": "a GPU", "uuid": None,
        "pci_address": address, "memory_total": 24 * GIB, "memory_free": int(free * GIB), "temperature": None,
        "utilization": None, "processes": None, "is_live": True,
    }  # fmt: skip
    return Gpu(**{**told, **other})


FIRST = gpu("CUDA0", "0000:01:00.0", uuid="GPU-11111111-aaaa")
SECOND = gpu("CUDA1", "0000:c1:00.0", uuid="GPU-22222222-bbbb", free=8)
BY_VULKAN = gpu("Vulkan0", "0000:01:00.0")
UNLISTED = gpu(None, "0000:02:00.0")


@dataclass
class Host:
    """What ``HostFacts`` says, and how it was asked."""

    gpus_there: tuple[Gpu, ...]
    problem: str | None = None
    listed_at: datetime | None = None
    """Just now where it is not said: tests are made long before they run."""
    asked: list[float | None] = field(default_factory=list)
    hangs: bool = False

    async def gpus(self, _: Path, *, max_age: float | None = None) -> GpuPicture:
        self.asked.append(max_age)
        if self.hangs:
            await asyncio.Event().wait()
        return GpuPicture(self.gpus_there, {}, self.problem, None, self.listed_at or datetime.now(UTC))


class Needs:
    """What ``MemoryNeeds`` says of a model of 4 GiB."""

    unknown: str | None = None
    reported: Reported | None = None

    async def files_of(self, _: LaunchSpecification) -> ModelFiles:
        if self.unknown:
            raise NeedUnknown(self.unknown)
        return ModelFiles((facts(),))

    async def surroundings_of(self, _: LaunchSpecification, devices: Any) -> Surroundings:
        return Surroundings(Build(), tuple(devices), 64 * GIB)

    async def need_of(self, launch: LaunchSpecification, devices: Any) -> MemoryNeed:
        files, where = await self.files_of(launch), await self.surroundings_of(launch, devices)
        need = estimate(files, launch.runtime_settings, where)
        return refined(need, self.reported) if self.reported else need


def placing(host: Host, needs: Needs | None = None, units: dict[str, Any] | None = None) -> Placements:
    manager = SimpleNamespace(units=units or {})
    return Placements(cast(HostFacts, host), cast(MemoryNeeds, needs or Needs()), cast(SystemdManager, manager))


def launch(*gpus: str, **said: Any) -> LaunchSpecification:
    settings = RuntimeSettings(ctx_size=4096, gpus=gpus or None, **said)
    return replace(LAUNCH, runtime_settings=settings, known_options=KNOWS_DEVICES)


@pytest.mark.parametrize(
    ("pins", "devices"),
    [
        (("0000:c1:00.0",), ("CUDA1",)),
        (("0000:C1:00.0",), ("CUDA1",)),
        (("GPU-22222222-BBBB",), ("CUDA1",)),
        (("GPU-22222222-bbbb", "0000:01:00.0"), ("CUDA1", "CUDA0")),
    ],
)
async def test_a_pin_is_an_address_whatever_its_number_is(pins: tuple[str, ...], devices: tuple[str, ...]) -> None:
    found = await placing(Host((FIRST, SECOND, BY_VULKAN, UNLISTED))).place(launch(*pins), {})
    assert found.launch.devices == devices
    assert argv_of(found.launch)[-2:] == ("--device", ",".join(devices))
    assert set(found.gpu_bytes) == set(devices)
    assert found.need is not None
    assert sum(found.gpu_bytes.values()) == found.need.gpu_bytes > 0


@pytest.mark.parametrize(
    ("pins", "host", "message"),
    [
        (
            ("0000:03:00.0",),
            Host((FIRST, SECOND, UNLISTED)),
            "there is no GPU 0000:03:00.0 now; there are: 0000:01:00.0 = GPU-11111111-aaaa (CUDA0), 0000:c1:00.0 = ",
        ),
        (("GPU-33333333",), Host(()), "there is no GPU GPU-33333333 now; there are: none with an address"),
        (("0000:02:00.0",), Host((FIRST, UNLISTED)), "does not list the GPU 0000:02:00.0; magictl host shows why"),
        (("0000:01:00.0", "GPU-11111111-aaaa"), Host((FIRST,)), "name one GPU twice"),
        (("0000:01:00.0",), Host((), "it fails"), "nobody can say whether there is a GPU 0000:01:00.0: it fails"),
    ],
)
async def test_a_pin_that_is_not_there_is_told_and_nothing_taken_instead(
    pins: tuple[str, ...], host: Host, message: str
) -> None:
    with pytest.raises(SettingsNotUsable) as refused:
        await placing(host).place(launch(*pins), {})
    assert message in str(refused.value)
    assert refused.value.details["errors"][0]["field"] == "gpus"  # type: ignore[index]
    with pytest.raises(NeedUnknown, match="gpus: "):
        await placing(host).devices(launch(*pins))


async def test_a_pin_needs_a_llama_server_that_takes_it() -> None:
    with pytest.raises(SettingsNotUsable, match="is not known to take --device"):
        await placing(Host((FIRST,))).place(replace(launch("0000:01:00.0"), known_options=None), {})


async def test_a_pin_holds_where_nobody_knows_what_is_needed() -> None:
    needs = Needs()
    needs.unknown = "there is no such file"
    found = await placing(Host((FIRST, SECOND)), needs).place(launch("0000:c1:00.0"), {})
    assert found.launch.devices == ("CUDA1",)
    assert (found.need, found.unknown, found.gpu_bytes) == (None, "there is no such file", {})
    found = await placing(Host((FIRST, SECOND)), needs).place(launch(), {})
    assert found.launch.devices == ()


async def test_a_pinned_gpu_that_tells_no_memory_is_taken_all_the_same() -> None:
    mute = replace(SECOND, memory_total=None, memory_free=None)
    found = await placing(Host((FIRST, mute))).place(launch("0000:c1:00.0"), {})
    assert found.launch.devices == ("CUDA1",)


async def test_an_integrated_gpu_that_is_named_by_hand_is_reckoned_with() -> None:
    part = replace(BY_VULKAN, is_integrated=True, pci_address="0000:00:02.0")
    found = await placing(Host((FIRST, part))).place(launch(extra_flags=("--device=Vulkan0",)), {})
    assert found.launch.devices == ()
    assert found.shared_bytes == found.gpu_bytes["Vulkan0"] > 0


async def test_a_llama_server_that_takes_no_devices_is_only_reckoned_with() -> None:
    full = replace(FIRST, memory_free=0)
    found = await placing(Host((full, SECOND))).place(replace(launch(), known_options=None), {})
    assert found.launch.devices == ()
    assert found.gpu_bytes.keys() == {"CUDA0", "CUDA1"}


async def test_what_was_promised_is_another_ones() -> None:
    host = Host((FIRST, SECOND))
    assert (await placing(host).place(launch(), {})).launch.devices == ("CUDA1",)
    assert (await placing(host).place(launch(), {"CUDA1": 6 * GIB})).launch.devices == ("CUDA0",)
    found = await placing(host).place(launch(n_gpu_layers=99), {"CUDA0": 20 * GIB, "CUDA1": 8 * GIB})
    assert found.launch.devices == ()
    assert found.gpu_shortage is not None
    assert found.gpu_shortage.promised == found.gpu_shortage.free == 28 * GIB


async def test_what_was_reported_is_what_it_takes() -> None:
    needs = Needs()
    needs.reported = Reported(weights=Split(gpu=6 * GIB), compute=Split(gpu=GIB))
    found = await placing(Host((FIRST,)), needs).place(launch(), {})
    assert found.need is not None
    assert found.gpu_bytes == {"CUDA0": found.need.gpu_bytes}
    assert found.need.gpu_bytes == 7 * GIB + found.need.other.gpu


async def test_gpus_without_memory_of_their_own_count_against_the_hosts() -> None:
    part = replace(FIRST, is_integrated=True)
    found = await placing(Host((part,))).place(launch(), {})
    assert found.shared_bytes == found.gpu_bytes["CUDA0"] > 4 * GIB
    assert (await placing(Host((FIRST,))).place(launch(), {})).shared_bytes == 0


@pytest.mark.parametrize("host", [Host(()), Host((), "it fails"), Host((UNLISTED,))])
async def test_without_gpus_a_launch_stays_as_it_is_and_nothing_is_asked_anew(host: Host) -> None:
    given = launch()
    found = await placing(host).place(given, {})
    # But for what is known now: there is nothing to fit.
    assert found.launch == replace(given, is_fitted=not (host.gpus_there or host.problem or is_any_driver_up()))
    assert found.need is not None
    assert found.need.gpu_bytes == 0
    assert host.asked == [None]


async def test_a_driver_that_hangs_holds_no_start_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "_PATIENCE", 0.05)
    found = await placing(Host((FIRST,), hangs=True)).place(launch(), {})
    assert found.launch.devices == ()
    with pytest.raises(SettingsNotUsable, match="does not say in time which GPUs it has"):
        await placing(Host((FIRST,), hangs=True)).place(launch("0000:01:00.0"), {})


async def test_an_old_list_is_asked_for_anew_where_it_matters() -> None:
    old = datetime.now(UTC) - timedelta(hours=1)
    host = Host((FIRST,), listed_at=old)
    mine = placing(host)
    await mine.place(launch(), {})
    assert host.asked == [None]
    # Again so soon: what it was given then may be no more.
    await mine.place(launch(), {})
    assert host.asked == [None, None, 5.0]
    # The list alone says what is free.
    host = Host((replace(FIRST, is_live=False),), listed_at=old)
    await placing(host).place(launch(), {})
    assert host.asked == [None, 5.0]
    # One is there that is not listed.
    host = Host((UNLISTED,), listed_at=old)
    await placing(host).place(launch(), {})
    assert host.asked == [None, 60.0]


async def test_one_that_runs_is_where_it_was_started() -> None:
    unit = unit_status(unit_name(LAUNCH.model_id), {"LoadState": "loaded", "ActiveState": "active"}, {})
    full = replace(FIRST, memory_free=0)
    for argv, devices in (
        (("x", "--device", "CUDA0"), [Device("CUDA0", 24 * GIB)]),
        (("x", "--device", "none"), []),
        (("x",), [Device("CUDA0", 24 * GIB), Device("CUDA1", 24 * GIB)]),
    ):
        units = {unit.name: replace(unit, main_pid=7, argv=argv)}
        assert await placing(Host((full, SECOND)), units=units).devices(launch()) == devices
    assert [each.name for each in await placing(Host((full, SECOND))).devices(launch())] == ["CUDA1"]
