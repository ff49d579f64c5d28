"""What each model's server needs of memory: estimated before the start, and kept up with what is seen after it.

Of a server that is ready, what it says of its buffers is read from its log and what it uses is measured; a while after,
once more.
"""

import asyncio
import heapq
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal

import psutil

from magi_agent.events import EventStream, ServerChanged
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.host.unit_memory import UnitMemory, unit_memory
from magi_agent.memory.build import build_of, repacked_types
from magi_agent.memory.estimate import Device, ModelFiles, Surroundings, estimate
from magi_agent.memory.measured import MeasuredStore, Measurement, with_measured
from magi_agent.memory.need import MemoryNeed, NeedUnknown
from magi_agent.memory.reported import read_report
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.settings import NO_PROJECTOR, RuntimeSettings
from magi_agent.servers.file_facts import FileFacts
from magi_agent.servers.gpu_use import GpuUse
from magi_agent.servers.launch import LaunchSpecification, unit_name
from magi_agent.servers.llama_server import differences, port_of
from magi_agent.servers.preparation import StartPreparation
from magi_agent.systemd.errors import JournalError
from magi_agent.systemd.journal import Journal
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerState

_LOG: Final = logging.getLogger(__name__)
_UP: Final = frozenset({ServerState.READY, ServerState.DEGRADED})
_LATER: Final = 60.0
"""Seconds after which a server that is ready is measured once more."""
_LOG_LINES: Final = 600
"""Lines of a log in which the report of a load is looked for; a load is some 200."""
_DECIDE: Final = (
    *("ctx_size", "batch_size", "ubatch_size", "parallel_slots", "flash_attention", "cache_type_k", "cache_type_v"),
    *("mmap", "split_mode", "tensor_split", "main_gpu", "n_cpu_moe", "n_gpu_layers", "draft_n_gpu_layers", "mode"),
    *("pooling", "extra_flags"),
)
"""The settings that decide how much memory is used, beside the files."""

DeviceList = Callable[[LaunchSpecification], Awaitable[Sequence[Device]]]
"""The GPUs that a launch may use, as its binary lists them."""


@dataclass(frozen=True, slots=True)
class UsedMemory:
    """What a server uses now."""

    anonymous: int
    mapped: int
    """Pages of its model files that are mapped."""
    gpu: int | None
    """Bytes of all GPUs; ``None`` where a driver does not tell."""
    gpu_unavailable: str | None
    """Why there is no such figure."""
    source: Literal["control group", "process"]

    @property
    def host_bytes(self) -> int:
        """Anonymous memory plus mapped weights."""
        return self.anonymous + self.mapped


class MemoryNeeds:
    """Answers what models need, and learns from those that run."""

    def __init__(
        self,
        registry: Registry,
        preparation: StartPreparation,
        manager: SystemdManager,
        journal: Journal,
        events: EventStream,
        kept_in: Path,
        gpu_use: GpuUse,
        devices: DeviceList | None = None,
    ) -> None:
        """``kept_in`` is the file of measurements, which outlives the agent."""
        self._registry = registry
        self._preparation = preparation
        self._manager = manager
        self._journal = journal
        self._events = events
        self._store = MeasuredStore(kept_in)
        self._store_turn = asyncio.Lock()
        self._devices = devices
        self._gpu_use = gpu_use
        self._facts = FileFacts()
        self._repacked: frozenset[int] | None = None
        self._since = time.time()

    async def load(self) -> None:
        """Take up what an agent before this one measured."""
        async with self._store_turn:
            await asyncio.to_thread(self._store.load)

    async def need(self, model_id: str) -> MemoryNeed:
        """What a model's server would need, started as things stand. Raises ``ModelNotFound``, ``NeedUnknown``."""
        model = self._registry.model(model_id)
        await self._preparation.look_at_binaries()
        return await self.need_of(self._preparation.launch_of(model, model.choices.port or 0))

    async def need_of(self, launch: LaunchSpecification, devices: Sequence[Device] | None = None) -> MemoryNeed:
        """What a server would need that were launched so, on these GPUs or on those that its binary lists.

        Raises ``NeedUnknown``. To try many settings or GPUs for one launch, ask for ``files_of`` and
        ``surroundings_of`` once and give them to ``estimate``, which is pure.
        """
        files, where = await self.files_of(launch), await self.surroundings_of(launch, devices)
        key = _key(files, launch, len(where.devices))
        async with self._store_turn:
            measurement = await asyncio.to_thread(self._store.get, key)
        return with_measured(estimate(files, launch.runtime_settings, where), measurement)

    async def estimated(self, model_id: str) -> MemoryNeed:
        """As ``need``, and from facts and settings alone."""
        model = self._registry.model(model_id)
        await self._preparation.look_at_binaries()
        launch = self._preparation.launch_of(model, model.choices.port or 0)
        return estimate(await self.files_of(launch), launch.runtime_settings, await self.surroundings_of(launch))

    async def used(self, model_id: str) -> UsedMemory | None:
        """What a model's server uses now; ``None`` where it does not run, or nobody can tell."""
        unit = self._manager.units.get(unit_name(model_id))
        if unit is None or not unit.main_pid:
            return None
        seen = await asyncio.to_thread(unit_memory, unit.control_group, unit.main_pid)
        return None if seen is None else await self._of_weights(model_id, unit, seen)

    async def close(self) -> None:
        """Let go of what is being read."""
        await self._facts.close()

    async def run(self) -> None:
        """Measure each server when it is ready, and a while after, until cancelled."""
        loop = asyncio.get_running_loop()
        due: list[tuple[float, str]] = []
        with self._events.subscribe() as changes:
            while True:
                wait = due[0][0] - loop.time() if due else None
                try:
                    async with asyncio.timeout(wait if wait is None else max(0.0, wait)):
                        event = await changes.next()
                except TimeoutError:
                    _, model_id = heapq.heappop(due)
                    await self._measure(model_id, is_later=True)
                    continue
                match event:
                    case ServerChanged(model_id=model_id, before=before, after=after):
                        due = [entry for entry in due if entry[1] != model_id]
                        heapq.heapify(due)
                        if after in _UP and before not in _UP:
                            await self._measure(model_id, is_later=False)
                            heapq.heappush(due, (loop.time() + _LATER, model_id))
                    case _:
                        pass

    async def _measure(self, model_id: str, *, is_later: bool) -> None:
        """Keep what a server uses, if it runs as it would be started now: else nobody knows by what it was made."""
        model = self._registry.models.get(model_id)
        unit = self._manager.units.get(unit_name(model_id))
        if model is None or unit is None or not unit.main_pid:
            return
        launch = self._preparation.launch_of(model, model.choices.port or port_of(unit.argv) or 0)
        if differences(launch, unit.argv, unit.environment) or self._preparation.binary_news(launch, unit):
            return
        seen = await asyncio.to_thread(unit_memory, unit.control_group, unit.main_pid)
        if seen is None:
            return
        # One that an agent before this one started may have served for days: that is not how it was when it was ready.
        is_later = is_later or (unit.exec_main_start_timestamp or 0.0) < self._since
        try:
            key = _key(await self.files_of(launch), launch, len((await self.surroundings_of(launch)).devices))
        except NeedUnknown as error:
            _LOG.debug("%s is not measured: %s", model_id, error)
            return
        reported = None if is_later else read_report(await self._log_of(unit))
        async with self._store_turn:
            before = await asyncio.to_thread(self._store.get, key) or Measurement()
            now = (
                replace(before, anonymous_later=seen.anonymous)
                if is_later
                else replace(before, anonymous_at_ready=seen.anonymous, reported=reported or before.reported)
            )
            await asyncio.to_thread(self._store.put, key, now)

    async def _log_of(self, unit: UnitStatus) -> list[str]:
        name = unit.name.removesuffix(".service")
        try:
            entries = await self._journal.read_last(name, lines=_LOG_LINES, invocation_id=unit.invocation_id or None)
        except JournalError as error:
            _LOG.debug("%s: %s", name, error)
            return []
        return [entry.message for entry in entries]

    async def _of_weights(self, model_id: str, unit: UnitStatus, seen: UnitMemory) -> UsedMemory:
        """What is used, without programs and libraries: of what is mapped, at most what the weights would be."""
        model = self._registry.models.get(model_id)
        mapped = seen.mapped
        if model is not None:
            try:
                mapped = min(mapped, (await self.estimated(model_id)).mapped)
            except NeedUnknown as error:
                _LOG.debug("%s: %s", unit.name, error)
        gpu = await self._gpu_use.of(unit)
        return UsedMemory(seen.anonymous, mapped, gpu.total, gpu.unavailable, seen.source)

    async def surroundings_of(
        self, launch: LaunchSpecification, devices: Sequence[Device] | None = None
    ) -> Surroundings:
        """What a launch is made in; ``devices`` in place of those that its binary lists."""
        if devices is None:
            devices = await self._devices(launch) if self._devices else ()
        if self._repacked is None:
            self._repacked = await asyncio.to_thread(_repacked_here)
        return Surroundings(
            build=build_of(launch.known_options, self._repacked),
            devices=tuple(devices),
            host_bytes=psutil.virtual_memory().total,
        )

    async def files_of(self, launch: LaunchSpecification) -> ModelFiles:
        """The facts of all files that a launch loads. Raises ``NeedUnknown`` where one cannot be read."""
        settings = launch.runtime_settings
        projector = launch.projector_path if settings.projector is None else settings.projector
        paths = [
            self._parts_of(launch.model_path, launch.model_id),
            [projector] if projector and projector != NO_PROJECTOR else [],
            self._parts_of(settings.draft_model) if settings.draft_model else [],
            [adapter.path for adapter in settings.lora or ()],
        ]
        parts, projectors, draft, lora = [await self._read(each) for each in paths]
        return ModelFiles(parts, projectors[0] if projectors else None, draft, lora)

    def _parts_of(self, path: str, model_id: str | None = None) -> Sequence[str]:
        """All files of a model, by the path of its first: a split set has more than that."""
        known = self._registry.models.get(model_id) if model_id else None
        if known is not None and known.facts.file_path == path:
            return known.facts.parts or (path,)
        return next((model.facts.parts for model in self._registry.models.values() if _is_at(model, path)), (path,))

    async def _read(self, paths: Collection[str]) -> tuple[HeaderFacts, ...]:
        return tuple([await self._facts.of(path) for path in paths])


def _is_at(model: Model, path: str) -> bool:
    return model.facts.file_path == path


def _repacked_here() -> frozenset[int]:
    try:
        with Path("/proc/cpuinfo").open() as file:
            words = next((line.partition(":")[2].split() for line in file if _names_flags(line)), [])
    except OSError:
        words = []
    return repacked_types(words)


def _names_flags(line: str) -> bool:
    return line.startswith(("flags", "Features"))


def _key(files: ModelFiles, launch: LaunchSpecification, gpus: int) -> str:
    """What decides how much memory is used, as one word; ``gpus`` is how many of these are used."""
    settings = launch.runtime_settings
    decisive = {
        "parts": [part.fingerprint for part in files.parts],
        "projector": files.projector.fingerprint if files.projector else None,
        "draft": [part.fingerprint for part in files.draft],
        "lora": [part.fingerprint for part in files.lora],
        "binary": [str(launch.binary), launch.binary_identity],
        "settings": dict(_said(settings, _DECIDE)),
        **({"gpus": gpus} if gpus else {}),
    }
    return blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=16).hexdigest()


def _said(settings: RuntimeSettings, names: Iterable[str]) -> Iterable[tuple[str, object]]:
    return ((name, value) for name in names if (value := getattr(settings, name)) is not None)
