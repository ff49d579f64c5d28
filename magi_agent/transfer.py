"""All choices of a host in one piece: to keep them somewhere else, or to carry them to another host.

What travels is what people decided, never what was found: each model's choices, with what tells the model where its id
is another, the profiles that the API may write, which one is active, and the range of ports.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

from magi_agent.errors import MagiError, ProfileNotFound
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.profiles import Profiles, slug_of
from magi_agent.registry.model import Choices, Model
from magi_agent.registry.registry import Registry


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


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import changed, or would change."""

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    unknown: tuple[str, ...]
    profiles: tuple[str, ...]
    problems: tuple[str, ...]


class Transfer:
    """Gives all choices out, and takes others' in."""

    def __init__(self, registry: Registry, profiles: Profiles, active_profile: ActiveProfile) -> None:
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
            {name: await self._profiles.profile(name) for name in await self._profiles.own_names()},
            self._registry.active_profile,
            self._registry.port_range,
        )

    async def take_in(self, export: Export, *, dry_run: bool) -> ImportReport:
        """Make the choices of ``export`` this host's; those of models it does not name stay as they are.

        With ``dry_run`` nothing is changed. What runs is not touched either way. Raises ``RegistrySaveFailed``,
        ``ServiceUnavailable``; what cannot be taken over for another reason is named in the report.
        """
        problems: list[str] = []
        profiles = [slug async for slug in self._take_profiles(export, dry_run, problems)]
        found = {model_id: self._model_for(model_id, sent) for model_id, sent in export.models.items()}
        chosen = self._choices_for(export, found, problems)
        before = self._registry.remembered
        changed = {model_id for model_id, choices in chosen.items() if before[model_id].choices != choices}
        if not dry_run:
            await self._registry.choose_each({model_id: chosen[model_id] for model_id in sorted(changed)})
            await self._registry.choose_port_range(export.port_range)
            await self._take_active(export, problems)
        elif export.active_profile and export.active_profile not in {*profiles, *await self._profiles.names()}:
            problems.append(f"the active profile {export.active_profile!r} is not there")
        return ImportReport(
            tuple(sorted(changed)),
            tuple(sorted(chosen.keys() - changed)),
            tuple(sorted(model_id for model_id, model in found.items() if model is None)),
            tuple(profiles),
            tuple(problems),
        )

    def _model_for(self, model_id: str, sent: ModelChoices) -> Model | None:
        """The model here that is meant: of this id and content, else of this content, else of this id."""
        models = self._registry.remembered
        same = models.get(model_id)
        if same is not None and (sent.fingerprint is None or same.facts.fingerprint == sent.fingerprint):
            return same
        if sent.fingerprint is not None:
            for model in models.values():
                if (model.facts.fingerprint, model.facts.size_bytes) == (sent.fingerprint, sent.size_bytes):
                    return model
        return same

    def _choices_for(
        self, export: Export, found: Mapping[str, Model | None], problems: list[str]
    ) -> dict[str, Choices]:
        chosen: dict[str, Choices] = {}
        for sent_id, model in found.items():
            if model is not None:
                chosen.setdefault(model.model_id, export.models[sent_id].choices)
        # A port has one owner: whoever keeps its choices goes before whoever is sent others.
        owners = {
            model.choices.port: model_id
            for model_id, model in self._registry.remembered.items()
            if model.choices.port and model_id not in chosen
        }
        for model_id, choices in chosen.items():
            owner = owners.setdefault(choices.port, model_id) if choices.port else model_id
            if owner != model_id:
                problems.append(f"{model_id}: port {choices.port} is given to {owner} here, so it keeps what it has")
                port = self._registry.remembered[model_id].choices.port
                if port and owners.setdefault(port, model_id) != model_id:
                    port = None
                chosen[model_id] = replace(choices, port=port)
        return chosen

    async def _take_profiles(self, export: Export, dry_run: bool, problems: list[str]) -> AsyncIterator[str]:
        own = set(await self._profiles.own_names())
        for sent, profile in sorted(export.profiles.items()):
            try:
                slug = slug_of(sent)
                if slug in own:
                    if await self._profiles.profile(slug) == profile:
                        continue
                    if not dry_run:
                        await self._profiles.replace(slug, profile)
                elif slug in await self._profiles.names():
                    problems.append(f"profile {slug}: it belongs to the operator here, and is left as it is")
                    continue
                elif not dry_run:
                    await self._profiles.create(replace(profile, name=profile.name or slug))
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
