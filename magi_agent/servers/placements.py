"""Places launches on this host's GPUs: asks what there is and what is needed, has it chosen, and says it in the launch.

The list of GPUs is the one that the llama-server gave last, which is kept as long as it is the same file; it is asked
for again where it alone tells what is free, and for a model that was placed a short while ago, since what it was given
then may be no more.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from magi_agent.errors import MagiError, SettingsNotUsable
from magi_agent.host.gpu_devices import is_any_driver_up
from magi_agent.host.gpus import Gpu
from magi_agent.host_facts import GpuPicture, HostFacts
from magi_agent.memory.estimate import Device, estimate
from magi_agent.memory.need import MemoryNeed, NeedUnknown
from magi_agent.runtime_settings.settings import Fault
from magi_agent.servers.launch import NO_DEVICE, LaunchSpecification, unit_name
from magi_agent.servers.llama_server import devices_of, takes_devices
from magi_agent.servers.memory_needs import MemoryNeeds
from magi_agent.servers.placed import Placed
from magi_agent.servers.placement import (
    Choice,
    UsableGpu,
    choose,
    leaves_nothing_to_fit,
    names_devices,
    reckoned,
    used_by_default,
)
from magi_agent.servers.settings_faults import settings_not_usable
from magi_agent.systemd.manager import SystemdManager

_PATIENCE: Final = 15.0
"""Seconds that a start waits to be told of GPUs, which drivers may take seconds to wake; then llama-server decides."""
_FRESH: Final = 5.0
"""Seconds that a list holds which alone tells what is free."""
_MAY_COME: Final = 60.0
"""Seconds that a list holds in which a GPU is missing that the host has: its driver may have come up since."""
_SHORT_WHILE: Final = 600.0
_MOST_REMEMBERED: Final = 1000


@dataclass(frozen=True, slots=True)
class _Seen:
    """The GPUs of the host, and why llama-server does not say which it has."""

    gpus: Sequence[Gpu]
    problem: str | None

    @property
    def may_have_gpus(self) -> bool:
        """Whether llama-server may find some: those that it lists, and any whose driver has come up since it did."""
        return self.problem is not None or bool(self.gpus) or is_any_driver_up()


@dataclass(frozen=True, slots=True)
class _Given:
    """What a launch is placed among."""

    usable: tuple[UsableGpu, ...]
    pinned: tuple[str, ...] | None
    """The names of those that it is pinned to, which are the usable ones then as far as their memory is known."""


class Placements:
    """Chooses GPUs for launches."""

    def __init__(self, host: HostFacts, needs: MemoryNeeds, manager: SystemdManager) -> None:
        self._host = host
        self._needs = needs
        self._manager = manager
        self._placed_at: dict[str, float] = {}
        """When a model was given GPUs last, by the loop's clock."""

    async def place(self, launch: LaunchSpecification, promised: Mapping[str, int]) -> Placed:
        """Choose GPUs for a launch. Raises ``SettingsNotUsable`` where one that it is pinned to is not there."""
        now = asyncio.get_running_loop().time()
        anew = now - self._placed_at.get(launch.model_id, -_SHORT_WHILE) < _SHORT_WHILE
        seen = await self._look(launch, anew=anew)
        placed = await self._placed(launch, self._given(launch, seen, promised), now)
        may_use_gpus = placed.launch.devices != NO_DEVICE and seen.may_have_gpus
        is_fitted = leaves_nothing_to_fit(launch.runtime_settings, has_gpus=may_use_gpus)
        return replace(placed, launch=replace(placed.launch, is_fitted=is_fitted))

    async def _placed(self, launch: LaunchSpecification, given: _Given, now: float) -> Placed:
        launch = replace(launch, devices=given.pinned or ())
        try:
            if not given.usable:
                return Placed(launch, await self._needs.need_of(launch, ()), None, {}, None)
            choice = await self._chosen(launch, given)
            if choice.devices:
                launch = replace(launch, devices=choice.devices)
            need = await self._needs.need_of(launch, [gpu.device for gpu in choice.used])
        except NeedUnknown as error:
            return Placed(launch, None, str(error), {}, None)
        if launch.devices:
            self._remember(launch.model_id, now)
        taken = _reported(choice, need)
        return Placed(
            launch=launch,
            need=need,
            unknown=None,
            gpu_bytes=taken,
            gpu_shortage=choice.shortage,
            shared_bytes=sum(taken[gpu.name] for gpu in choice.used if gpu.is_integrated),
        )

    async def devices(self, launch: LaunchSpecification) -> Sequence[Device]:
        """The GPUs that a launch uses, or would be given now. Raises ``NeedUnknown`` where it could not be placed."""
        unit = self._manager.units.get(unit_name(launch.model_id))
        gpus = await self._known(launch)
        if unit is not None and unit.main_pid:
            named = devices_of(unit.argv)
            used = used_by_default(gpus) if named is None else [gpu for gpu in gpus if gpu.device in named]
            # What was free when it was started nobody knows now.
            return [replace(gpu.device, free_bytes=None) for gpu in _usable(used, {})]
        try:
            given = self._given(launch, _Seen(gpus, None), {})
        except MagiError as error:
            raise NeedUnknown(error.message) from None
        if not given.usable:
            return ()
        return [gpu.device for gpu in (await self._chosen(launch, given)).used]

    async def _chosen(self, launch: LaunchSpecification, given: _Given) -> Choice:
        files = await self._needs.files_of(launch)
        where = await self._needs.surroundings_of(launch, ())
        settings = launch.runtime_settings

        def need_for(devices: Sequence[Device], whole: bool) -> MemoryNeed:
            build = replace(where.build, fits=False) if whole else where.build
            return estimate(files, settings, replace(where, build=build, devices=tuple(devices)))

        if given.pinned is not None:
            return reckoned(given.usable, need_for, settings)
        return choose(given.usable, need_for, settings, where.build, may_say=takes_devices(launch))

    def _given(self, launch: LaunchSpecification, seen: _Seen, promised: Mapping[str, int]) -> _Given:
        settings = launch.runtime_settings
        if settings.gpus is not None:
            pinned = _pinned(launch, settings.gpus, seen)
            return _Given(_usable(pinned, promised), tuple(gpu.device for gpu in pinned if gpu.device))
        some = seen.gpus if names_devices(settings) else used_by_default(seen.gpus)
        return _Given(_usable(some, promised), None)

    async def _look(self, launch: LaunchSpecification, *, anew: bool) -> _Seen:
        """The GPUs, as fresh as a start needs to know them."""
        try:
            async with asyncio.timeout(_PATIENCE):
                picture = await self._host.gpus(launch.binary)
                may_be = _most_age(picture.gpus, anew=anew)
                if may_be is not None and _age(picture) > may_be:
                    picture = await self._host.gpus(launch.binary, max_age=may_be)
        except TimeoutError:
            return _Seen((), f"{launch.binary} does not say in time which GPUs it has")
        return _Seen(picture.gpus, picture.problem)

    async def _known(self, launch: LaunchSpecification) -> Sequence[Gpu]:
        """The GPUs as they were listed last."""
        try:
            async with asyncio.timeout(_PATIENCE):
                return (await self._host.gpus(launch.binary)).gpus
        except TimeoutError:
            return ()

    def _remember(self, model_id: str, now: float) -> None:
        self._placed_at.pop(model_id, None)
        self._placed_at[model_id] = now
        if len(self._placed_at) > _MOST_REMEMBERED:
            del self._placed_at[next(iter(self._placed_at))]


def _most_age(gpus: Sequence[Gpu], *, anew: bool) -> float | None:
    """Seconds that a list of these may be old for a start; ``None`` for any."""
    listed = [gpu for gpu in gpus if gpu.device]
    if listed and (anew or not all(gpu.is_live for gpu in listed)):
        return _FRESH
    return _MAY_COME if len(listed) < len(gpus) else None


def _age(picture: GpuPicture) -> float:
    return (datetime.now(UTC) - picture.listed_at).total_seconds() if picture.listed_at else 0.0


def _usable(gpus: Sequence[Gpu], promised: Mapping[str, int]) -> tuple[UsableGpu, ...]:
    """Those whose memory is known."""
    return tuple(
        UsableGpu(
            name=gpu.device,
            address=gpu.pci_address or gpu.device,
            total=gpu.memory_total,
            free=gpu.memory_free,
            promised=promised.get(gpu.device, 0),
            is_integrated=gpu.is_integrated,
        )
        for gpu in gpus
        if gpu.device and gpu.memory_total is not None and gpu.memory_free is not None
    )


def _pinned(launch: LaunchSpecification, pins: Sequence[str], seen: _Seen) -> list[Gpu]:
    """The GPUs of these addresses, in their order. Raises ``SettingsNotUsable``."""
    if not takes_devices(launch):
        raise _not_usable(launch, f"the llama-server {launch.binary} is not known to take --device, which pins need")
    found = []
    for pin in pins:
        named = [gpu for gpu in seen.gpus if pin.lower() in _addresses(gpu)]
        if not named and seen.problem:
            raise _not_usable(launch, f"nobody can say whether there is a GPU {pin}: {seen.problem}")
        if not named:
            there = ", ".join(address for gpu in seen.gpus if (address := _shown(gpu))) or "none with an address"
            raise _not_usable(launch, f"there is no GPU {pin} now; there are: {there} (magictl host shows them)")
        usable = next((gpu for gpu in named if gpu.device), None)
        if usable is None:
            raise _not_usable(launch, f"{launch.binary} does not list the GPU {pin}; magictl host shows why")
        found.append(usable)
    if len({gpu.device for gpu in found}) < len(found):
        raise _not_usable(launch, f"{', '.join(pins)} name one GPU twice, by its address and by its UUID")
    return found


def _addresses(gpu: Gpu) -> set[str]:
    return {address.lower() for address in (gpu.pci_address, gpu.uuid) if address}


def _shown(gpu: Gpu) -> str | None:
    known = [address for address in (gpu.pci_address, gpu.uuid) if address]
    return f"{' = '.join(known)} ({gpu.device or 'not listed'})" if known else None


def _not_usable(launch: LaunchSpecification, message: str) -> SettingsNotUsable:
    return settings_not_usable(launch.model_id, [Fault("gpus", message)])


def _reported(choice: Choice, need: MemoryNeed) -> dict[str, int]:
    """What is taken of each GPU, where llama-server has reported how much that is of all."""
    estimated = choice.need.gpu_bytes
    if not estimated or need.gpu_bytes == estimated:
        return choice.gpu_bytes
    return {name: taken * need.gpu_bytes // estimated for name, taken in choice.gpu_bytes.items()}
