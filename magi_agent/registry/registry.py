"""The registry: owner of every model's facts and choices, in memory and on disk.

All reading is from an immutable view. A change builds the next content, writes it, and only then makes it the view, so
what anybody was told is on disk, and a save that fails leaves nothing to undo. Changes are made one after another.
"""

import asyncio
import glob
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from magi_agent.atomic_file import remove_leftovers, write_atomically
from magi_agent.discovery.facts import ModelFacts
from magi_agent.errors import ConfigurationError, ModelNotFound, RegistrySaveFailed, ServiceUnavailable
from magi_agent.events import ChoicesChanged, EventStream, ModelsChanged
from magi_agent.registry.merging import Merge, merge
from magi_agent.registry.model import Choices, Model
from magi_agent.registry.stored import DamagedRegistry, NewerRegistry, RegistryContent, RegistryWriter, read_registry
from magi_agent.serial_changes import SerialChanges

_LOG: Final = logging.getLogger(__name__)
_MAX_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading the registry met."""

    existed: bool
    """Whether there was a registry that could be read."""
    carried_over: bool = False
    """Whether it was an earlier MAGI's."""
    problems: tuple[str, ...] = ()


class Registry:
    """Facts and choices of all models, persisted in one file."""

    def __init__(self, path: Path, events: EventStream) -> None:
        self._path = path
        self._events = events
        self._content = RegistryContent()
        self._writer = RegistryWriter()
        self._changes = SerialChanges("registry")
        self._loaded = False
        self._unsaved = False
        self._present: dict[str, Model] = {}
        self._by_former_id: dict[str, str] = {}
        self.revision = 0
        """Grows with every change of what the registry answers."""
        self.problems: tuple[str, ...] = ()
        """What is wrong with the file, for whoever asks after the agent's health."""

    async def load(self) -> LoadReport:
        """Read the file. One that is damaged is kept aside under another name, and said so.

        Raises ``ConfigurationError`` where a newer agent wrote it, or it cannot be read or kept aside.
        """
        report, content = await asyncio.to_thread(self._read)
        for problem in report.problems:
            _LOG.error("registry: %s", problem)
        self.problems = report.problems
        self._show(content)
        self._loaded = True
        return report

    @property
    def models(self) -> Mapping[str, Model]:
        """Every model that is listed, by id. Raises ``ServiceUnavailable`` before the registry is loaded."""
        if not self._loaded:
            raise ServiceUnavailable("registry", "the registry is not loaded yet; try again in a moment")
        return self._present

    @property
    def last_scan(self) -> datetime | None:
        """When the last scan ended."""
        return self._content.last_scan

    @property
    def active_profile(self) -> str | None:
        """The slug of the profile that was activated last."""
        return self._content.active_profile

    @property
    def applied_profile_setting(self) -> str | None:
        """The value of ``ACTIVE_PROFILE`` that was applied last."""
        return self._content.applied_profile_setting

    @property
    def port_range(self) -> tuple[int, int] | None:
        """The ports that models get, where a person chose others than the configuration's."""
        return self._content.port_range

    @property
    def remembered(self) -> Mapping[str, Model]:
        """Every model there is or was, by id: those listed, and those that went and may come back."""
        return self._content.models

    def model(self, model_id: str) -> Model:
        """The model of this id, or of this former id. Raises ``ModelNotFound``."""
        model = self.models.get(model_id)
        if model is None:
            model = self._present.get(self._by_former_id.get(model_id, ""))
        if model is None:
            raise ModelNotFound(model_id)
        return model

    def given_ports(self) -> frozenset[int]:
        """Every port that was given to a model, listed or remembered."""
        return frozenset(model.choices.port for model in self._content.models.values() if model.choices.port)

    async def merge(
        self, found: Iterable[ModelFacts], running: Collection[str], devices: Collection[int] | None = None
    ) -> Merge:
        """Take in what a scan found. ``running`` are the ids of models whose servers run.

        ``devices`` are those that it met; ``None`` says that no disk is away.
        Facts can be found again, so they count even where they cannot be saved. Raises ``RegistrySaveFailed`` then.
        """
        return await self._changes.make(partial(self._merge, tuple(found), running, devices))

    async def _merge(
        self, found: tuple[ModelFacts, ...], running: Collection[str], devices: Collection[int] | None
    ) -> Merge:
        merged = await asyncio.to_thread(merge, self._content.models, found, running, devices)
        content = replace(self._content, models=merged.models, last_scan=datetime.now(UTC))
        self._unsaved |= merged.is_news or merged.has_learned or not await asyncio.to_thread(os.path.exists, self._path)
        try:
            if self._unsaved:
                await self._save(content)
        finally:
            self._show(content)
            if merged.is_news:
                self._events.publish(ModelsChanged(added=merged.added, changed=merged.changed, removed=merged.removed))
        return merged

    async def choose(self, model_id: str, change: Callable[[Choices], Choices], *, remembered: bool = False) -> Model:
        """Make a choice for one model; on disk when this returns. With ``remembered`` it may be one that went.

        ``change`` sees the choices as they are when its turn comes. Raises ``ModelNotFound``, ``RegistrySaveFailed``,
        and what ``change`` raises.
        """
        return await self._changes.make(partial(self._choose, model_id, change, remembered))

    async def _choose(self, model_id: str, change: Callable[[Choices], Choices], remembered: bool) -> Model:
        before = self._content.models.get(model_id) if remembered else None
        before = before or self.model(model_id)
        choices = change(before.choices)
        if choices == before.choices:
            return before
        after = before.choosing(choices)
        content = replace(self._content, models={**self._content.models, before.model_id: after})
        await self._save(content)
        self._show(content)
        self._events.publish(ChoicesChanged(model_id=after.model_id))
        return after

    async def choose_each(self, change: Callable[[Mapping[str, Model]], Mapping[str, Choices]]) -> tuple[str, ...]:
        """Make choices for some models, listed or remembered, in one save.

        ``change`` sees all models as they are when its turn comes, and gives the choices by id; it is called in a
        thread. Returns the ids of models whose choices changed. Raises ``RegistrySaveFailed``; nothing is changed then.
        """
        return await self._changes.make(partial(self._choose_each, change))

    async def _choose_each(self, change: Callable[[Mapping[str, Model]], Mapping[str, Choices]]) -> tuple[str, ...]:
        models = dict(self._content.models)
        changed = []
        choices = await asyncio.to_thread(change, self._content.models)
        for model_id, chosen in choices.items():
            if models[model_id].choices != chosen:
                models[model_id] = models[model_id].choosing(chosen)
                changed.append(model_id)
        if changed:
            content = replace(self._content, models=models)
            await self._save(content)
            self._show(content)
        for model_id in changed:
            self._events.publish(ChoicesChanged(model_id=model_id))
        return tuple(changed)

    async def choose_port_range(self, port_range: tuple[int, int] | None) -> None:
        """Choose the ports that models get; ``None`` for the configuration's. Raises ``RegistrySaveFailed``."""
        await self._changes.make(partial(self._choose_port_range, port_range))

    async def _choose_port_range(self, port_range: tuple[int, int] | None) -> None:
        content = replace(self._content, port_range=port_range)
        if content != self._content:
            await self._save(content)
            self._show(content)

    async def choose_for_all(
        self,
        change: Callable[[Model], Choices],
        *,
        active_profile: str | None = None,
        applied_profile_setting: str | None = None,
    ) -> tuple[str, ...]:
        """Make choices for every model, listed or remembered, in one save, and remember the profile they came from.

        Returns the ids of models whose choices changed. Raises ``RegistrySaveFailed``.
        """
        return await self._changes.make(partial(self._choose_for_all, change, active_profile, applied_profile_setting))

    async def _choose_for_all(
        self, change: Callable[[Model], Choices], active_profile: str | None, applied_profile_setting: str | None
    ) -> tuple[str, ...]:
        models = dict(self._content.models)
        changed = []
        for model in self._content.models.values():
            choices = change(model)
            if choices != model.choices:
                models[model.model_id] = model.choosing(choices)
                changed.append(model.model_id)
        content = replace(
            self._content,
            models=models,
            active_profile=self._content.active_profile if active_profile is None else active_profile or None,
            applied_profile_setting=applied_profile_setting or self._content.applied_profile_setting,
        )
        if content != self._content:
            await self._save(content)
            self._show(content)
        for model_id in changed:
            self._events.publish(ChoicesChanged(model_id=model_id))
        return tuple(changed)

    def _show(self, content: RegistryContent) -> None:
        self._content = content
        self._present = {model_id: model for model_id, model in content.models.items() if model.present}
        self._by_former_id = {model.former_id: model.model_id for model in self._present.values() if model.former_id}
        self.revision += 1

    async def _save(self, content: RegistryContent) -> None:
        await asyncio.to_thread(self._write, content)
        self._unsaved = False

    def _write(self, content: RegistryContent) -> None:
        try:
            write_atomically(self._path, self._writer.written(content))
        except OSError as error:
            raise RegistrySaveFailed(
                f"the registry could not be saved to {self._path}: {error.strerror}; nothing was changed",
                {"path": str(self._path), "reason": error.strerror or str(error)},
            ) from None

    def _read(self) -> tuple[LoadReport, RegistryContent]:
        remove_leftovers(self._path)
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return LoadReport(existed=False), RegistryContent()
        except OSError as error:
            raise ConfigurationError(f"registry.registry_path: {self._path} cannot be read: {error.strerror}") from None
        try:
            if len(data) > _MAX_BYTES:
                raise DamagedRegistry(f"it is larger than {_MAX_BYTES} bytes")
            reading = read_registry(data)
        except NewerRegistry as error:
            raise ConfigurationError(
                f"registry.registry_path: {self._path} was written by a newer agent: {error}; install that one again, "
                "or name another file"
            ) from None
        except DamagedRegistry as error:
            aside = self._keep_aside("damaged")
            problem = f"{self._path} was damaged ({error}) and is kept as {aside}; choices start anew"
            return LoadReport(existed=False, problems=(problem,)), RegistryContent()
        problems = list(reading.problems)
        if reading.problems:
            problems.append(f"the whole file is kept as {self._keep_aside('damaged')}")
        elif reading.version < 2:
            _LOG.info("registry of an earlier MAGI carried over; it is kept as %s", self._keep_aside("v1"))
        return LoadReport(True, reading.version < 2, tuple(problems)), reading.content

    def _keep_aside(self, why: str) -> Path:
        """Keep the file under another name, which no later save touches."""
        stem = f"{self._path.name}.{why}-"
        try:
            for kept in self._path.parent.glob(f"{glob.escape(stem)}*"):
                if kept.samefile(self._path):
                    return kept  # by an earlier start, after which nothing was saved
            stem += time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            aside = self._path.with_name(stem)
            number = 1
            while aside.exists():
                number += 1
                aside = self._path.with_name(f"{stem}~{number}")
            os.link(self._path, aside)
        except OSError as error:
            raise ConfigurationError(
                f"registry.registry_path: {self._path} cannot be kept aside before another takes its place: "
                f"{error.strerror}"
            ) from None
        return aside
