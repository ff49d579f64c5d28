"""All choices of a host in one piece: to keep them somewhere else, or to carry them to another host.

What travels is what people decided, never what was found: each model's choices, with what tells the model where its id
is another, the profiles that the API may write, which one is active, and the range of ports.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field, replace

from magi_agent.configuration import Configuration
from magi_agent.errors import MagiError, ProfileNotFound
from magi_agent.host.listeners import listeners
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.profiles import Profiles, kept_slug
from magi_agent.registry.model import Choices, Model
from magi_agent.registry.registry import Registry
from magi_agent.settings.settings import within


@dataclass(frozen=True, slots=True)
class ModelChoices:
    """One model's choices, and by what else than its id it can be told."""

    filename: str
    size_bytes: int
    fingerprint: str | None
    choices: Choices


@dataclass(frozen=True, slots=True)
class Export:
    """All choices of a host."""

    models: Mapping[str, ModelChoices]
    profiles: Mapping[str, Profile]
    active_profile: str | None
    port_range: tuple[int, int] | None
    """The range that a person chose; ``None`` for the configured one."""
    has_port_range: bool = True
    """Whether it says anything of the range."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import changed, or would change."""

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    unknown: tuple[str, ...]
    profiles: tuple[str, ...]
    port_range: tuple[int, int] | None
    """The range that ports are given from now on, where it is another."""
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Taken:
    """What an export comes to for the models that there are."""

    chosen: dict[str, Choices] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)


class Transfer:
    """Gives all choices out, and takes others' in."""

    def __init__(
        self,
        configuration: Configuration,
        registry: Registry,
        profiles: Profiles,
        active_profile: ActiveProfile,
    ) -> None:
        self._configuration = configuration
        self._registry = registry
        self._profiles = profiles
        self._active_profile = active_profile

    async def export(self) -> Export:
        """All choices as they are now. Raises ``ServiceUnavailable`` before the registry is loaded."""
        _ = self._registry.models
        return Export(
            {
                model_id: ModelChoices(
                    model.facts.filename, model.facts.size_bytes, model.facts.fingerprint, model.choices
                )
                for model_id, model in sorted(self._registry.remembered.items())
                if model.choices != Choices()
            },
            await self._profiles.own(),
            self._registry.active_profile,
            self._registry.port_range,
        )

    async def take_in(self, export: Export, *, dry_run: bool) -> ImportReport:
        """Make the choices of ``export`` this host's; those of models it does not name stay as they are.

        With ``dry_run`` nothing is changed. What runs is not touched either way. Raises ``RegistrySaveFailed``,
        ``ServiceUnavailable``; what cannot be taken over for another reason is named in the report.
        """
        _ = self._registry.models
        problems: list[str] = []
        there = set(await self._profiles.names())
        profiles = [slug async for slug in self._take_profiles(export, there, dry_run, problems)]
        limits = self._configuration.settings.port_limits
        wide = export.has_port_range and export.port_range != self._registry.port_range
        if wide and export.port_range and not within(export.port_range, limits):
            wide = False
            problems.append(f"the range of ports must lie within servers.port_limits, {limits[0]} to {limits[1]}")
        ports = (export.port_range if wide else self._registry.port_range) or self._configuration.settings.port_range
        if wide and not dry_run:
            await self._registry.choose_port_range(export.port_range)
        taken = _Taken()

        def change(models: Mapping[str, Model]) -> Mapping[str, Choices]:
            nonlocal taken
            taken = self._taken(export, models, ports)
            return taken.chosen

        if dry_run:
            await asyncio.to_thread(change, self._registry.remembered)
        else:
            await self._registry.choose_each(change)
        problems += taken.problems
        if not dry_run:
            await self._take_active(export, problems)
        elif export.active_profile and export.active_profile not in {*profiles, *there}:
            problems.append(f"the active profile {export.active_profile!r} is not there")
        return ImportReport(
            taken.changed,
            tuple(sorted(taken.chosen.keys() - set(taken.changed))),
            taken.unknown,
            tuple(profiles),
            ports if wide else None,
            tuple(problems),
        )

    def _taken(self, export: Export, models: Mapping[str, Model], ports: tuple[int, int]) -> _Taken:
        """What the choices come to where ``models`` are the models as they are, and ``ports`` the range."""
        taken = _Taken()
        by_content = {(each.facts.fingerprint, each.facts.size_bytes): each for each in [*models.values()][::-1]}
        unknown = []
        for sent_id, sent in export.models.items():
            same = models.get(sent_id)
            if sent.fingerprint is not None and (same is None or same.facts.fingerprint != sent.fingerprint):
                same = by_content.get((sent.fingerprint, sent.size_bytes), same)
            if same is None:
                unknown.append(sent_id)
            else:
                taken.chosen.setdefault(same.model_id, sent.choices)
        taken.unknown = tuple(sorted(unknown))
        self._settle_ports(taken, models, ports)
        _settle_aliases(taken, models)
        taken.changed = tuple(
            sorted(model_id for model_id, choices in taken.chosen.items() if choices != models[model_id].choices)
        )
        return taken

    def _settle_ports(self, taken: _Taken, models: Mapping[str, Model], ports: tuple[int, int]) -> None:
        """Leave out the ports that cannot be given; each has one owner, and whoever keeps its own goes first."""
        had = {model_id: model.choices.port for model_id, model in models.items() if model.choices.port}
        owners: dict[int, str] = {}
        moving = []
        for model_id in models:
            choices = taken.chosen.get(model_id)
            if choices is not None and choices.port not in (None, had.get(model_id)):
                moving.append(model_id)
            elif (choices is None or choices.port) and (port := had.get(model_id)):
                owners.setdefault(port, model_id)
        ours = set(had.values())
        for model_id in moving:
            wanted = taken.chosen[model_id].port or 0
            why = self._unfit(wanted, ports, ours)
            if why is None and (owner := owners.setdefault(wanted, model_id)) != model_id:
                why = f"is given to {owner} here"
            if why is None:
                continue
            port = had.get(model_id)
            if port and owners.setdefault(port, model_id) != model_id:
                port = None
            kept = "keeps what it has" if port == had.get(model_id) else "has none"
            taken.problems.append(f"{model_id}: port {wanted} {why}, so it {kept}")
            taken.chosen[model_id] = replace(taken.chosen[model_id], port=port)

    def _unfit(self, port: int, ports: tuple[int, int], ours: Collection[int]) -> str | None:
        """Why no model can be given a port; one that listens on a port of ``ours`` may be a model's server."""
        low, high = ports
        tcp = self._configuration.settings.tcp
        if not low <= port <= high:
            return f"is outside the range of ports, {low} to {high}"
        if tcp is not None and port == tcp.port:
            return "is the agent's own"
        return "is in use" if port not in ours and listeners(port) else None

    async def _take_profiles(
        self, export: Export, there: Collection[str], dry_run: bool, problems: list[str]
    ) -> AsyncIterator[str]:
        own = await self._profiles.own()
        for sent, profile in sorted(export.profiles.items()):
            try:
                slug = kept_slug(sent)
                named = replace(profile, name=profile.name or slug)
                if slug in own:
                    if own[slug] == named:
                        continue
                    if not dry_run:
                        await self._profiles.replace(slug, named)
                elif slug in there:
                    problems.append(f"profile {slug}: it belongs to the operator here, and is left as it is")
                    continue
                elif not dry_run:
                    await self._profiles.create(named, slug)
                yield slug
            except MagiError as error:
                problems.append(f"profile {sent}: {error.message}")

    async def _take_active(self, export: Export, problems: list[str]) -> None:
        """Make the profile the active one, whose models the choices name already."""
        slug = export.active_profile
        if slug is None or slug == self._registry.active_profile:
            return
        try:
            if slug not in await self._profiles.names():
                raise ProfileNotFound(slug, await self._profiles.names())
            await self._registry.choose_for_all(lambda model: model.choices, active_profile=slug)
            await self._active_profile.reload()
        except MagiError as error:
            problems.append(f"the active profile {slug!r} is left out: {error.message}")


def _settle_aliases(taken: _Taken, models: Mapping[str, Model]) -> None:
    """Leave out the aliases that name another model; whoever keeps its own goes first."""
    owners = {model_id: model_id for model_id, model in models.items() if model.present}
    new: dict[str, list[str]] = {}
    for model_id in [*owners]:
        had = models[model_id].choices.runtime_settings.aliases or ()
        aliases = had if model_id not in taken.chosen else taken.chosen[model_id].runtime_settings.aliases or ()
        for alias in aliases:
            if alias in had:
                owners.setdefault(alias, model_id)
            else:
                new.setdefault(model_id, []).append(alias)
    for model_id, wanted in new.items():
        others = {alias: owner for alias in wanted if (owner := owners.setdefault(alias, model_id)) != model_id}
        if not others:
            continue
        taken.problems += (f"{model_id}: the alias {alias!r} names {owner} here" for alias, owner in others.items())
        settings = taken.chosen[model_id].runtime_settings
        left = tuple(alias for alias in settings.aliases or () if alias not in others)
        taken.chosen[model_id] = replace(taken.chosen[model_id], runtime_settings=replace(settings, aliases=left))
