"""The active profile: the one whose settings hold, and whose models are the enabled ones since it was activated.

Which one is active is a choice, kept in the registry's file. ``ACTIVE_PROFILE`` is applied at the first start and when
its value has changed since it was applied last, so that a restart undoes nobody's later choice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.events import EventStream, ProfileActivated
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.serial_changes import SerialChanges
from magi_agent.servers.desired import Desired
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.vocabulary import StartPolicy

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What activating a profile changes: ids of models."""

    slug: str
    enable: tuple[str, ...]
    disable: tuple[str, ...]
    runs: Mapping[str, bool]
    """The models that are wanted or not wanted by it, and were not so before."""
    later: Mapping[str, bool]
    """The same of models that are not there now: it holds when they come back."""
    keep: tuple[str, ...]
    """Wanted before and after; they are not touched."""
    settings: Mapping[str, RuntimeSettings]
    """The profile's settings, by model id."""
    places: Mapping[str, int]
    """Where each model stands among the profile's enabled ones, from 0."""
    absent: tuple[str, ...]
    """Named in the profile, and not there now; they are enabled nevertheless, and in use when they come back."""
    unknown: tuple[str, ...]
    """Named in the profile, and by no model's id."""
    unusable: Mapping[str, str]
    """The models whose files are not whole, and why."""


class ActiveProfile:
    """Activates profiles, and knows the settings of the active one."""

    def __init__(
        self,
        profiles: Profiles,
        registry: Registry,
        desired: Desired,
        effective: EffectiveSettings,
        events: EventStream,
    ) -> None:
        self._profiles = profiles
        self._registry = registry
        self._desired = desired
        self._events = events
        self._effective = effective
        self._changes = SerialChanges("activation")
        self._places: Mapping[str, int] = {}
        self._held: Profile | None = None
        self.problem: str | None = None
        """Why the profile that should be active does not hold."""

    @property
    def slug(self) -> str | None:
        """The active profile's slug."""
        return self._registry.active_profile

    @property
    def held(self) -> Profile | None:
        """The profile as it was read last, and holds; ``None`` where none is active."""
        return self._held

    def place(self, model_id: str) -> int | None:
        """Where a model stands among the active profile's enabled ones, from 0; ``None`` where it does not."""
        return self._places.get(model_id)

    async def resolve(self, configured: str) -> None:
        """Apply the profile that ``ACTIVE_PROFILE`` names, if it is new; else take up the active one's settings.

        A profile that is not there or cannot be read, and a save that fails, are told in ``problem`` and the journal.
        """
        applied = self._registry.applied_profile_setting
        try:
            if configured == applied or not configured:
                await self.reload()
            elif applied is None and any(model.choices.enabled for model in self._registry.remembered.values()):
                # Choices that are older than any profile of ours: an earlier MAGI's. They are not to be undone.
                profile = await self._profiles.profile(configured)
                await self._registry.choose_for_all(
                    lambda model: model.choices, active_profile=configured, applied_profile_setting=configured
                )
                self._hold(profile)
            else:
                await self._changes.make(partial(self._activate, configured, by="ACTIVE_PROFILE", applied=configured))
        except MagiError as error:
            self.problem = f"the active profile does not hold: {error.message}"
            _LOG.warning("%s", self.problem)

    async def reload(self) -> None:
        """Read the active profile's settings again. Raises ``ProfileNotFound``, ``ProfileInvalid``."""
        if self.slug is None:
            self._effective.hold_profile({})
            self._places = {}
            self._held = None
            self.problem = None
            return
        self._hold(await self._profiles.profile(self.slug))

    async def profile(self) -> Profile | None:
        """The active profile; ``None`` where there is none. Raises ``ProfileNotFound``, ``ProfileInvalid``."""
        return None if self.slug is None else await self._profiles.profile(self.slug)

    async def plan(self, slug: str) -> Plan:
        """What ``activate`` would change now; nothing is changed. Raises ``ProfileNotFound``, ``ProfileInvalid``."""
        return self._planned(slug, await self._profiles.profile(slug))

    async def activate(self, slug: str, *, by: str) -> Plan:
        """Make exactly the profile's models enabled, and wanted; what runs already and is wanted still is not touched.

        That goes for models too that are not there now, as those of a disk that is away.

        Returns what was changed. Raises ``ProfileNotFound``, ``ProfileInvalid``, ``RegistrySaveFailed``.
        """
        return await self._changes.make(partial(self._activate, slug, by=by, applied=None))

    async def _activate(self, slug: str, *, by: str, applied: str | None) -> Plan:
        profile = await self._profiles.profile(slug)
        plan = self._planned(slug, profile)
        chosen, _ = self._chosen(profile)
        before = {model_id: model.choices for model_id, model in self._registry.remembered.items()}
        slug_before = self.slug
        await self._registry.choose_for_all(
            lambda model: replace(model.choices, enabled=model.model_id in chosen),
            active_profile=slug,
            applied_profile_setting=applied,
        )
        self._hold(profile)
        # Once more: somebody may have spoken meanwhile.
        now = self._planned(slug, profile)
        plan = replace(plan, runs=now.runs, later=now.later)
        if wishes := {**plan.later, **plan.runs}:
            try:
                await self._desired.wish_each(wishes, by=f"profile {slug}" if by == "ACTIVE_PROFILE" else by)
            except MagiError:
                # All of it or nothing: what was chosen before holds again.
                await self._registry.choose_for_all(
                    lambda model: (
                        replace(model.choices, enabled=before[model.model_id].enabled)
                        if model.model_id in before
                        else model.choices
                    ),
                    active_profile=slug_before or "",
                )
                await self.reload()
                raise
        for name in plan.unknown:
            _LOG.warning("profile %s names %s, and no model has this id", slug, name)
        if plan.absent:
            _LOG.info("profile %s names models that are not there now: %s", slug, ", ".join(plan.absent))
        self._events.publish(ProfileActivated(name=slug, by=by))
        _LOG.info("profile %s is active (%s): %d models enabled", slug, by, len(chosen))
        return plan

    def _planned(self, slug: str, profile: Profile) -> Plan:
        chosen, unknown = self._chosen(profile)
        settings = self._settings_of(profile)
        effective = self._effective.with_profile(settings)
        listed, remembered = self._registry.models, self._registry.remembered
        before = {model_id for model_id, model in remembered.items() if model.choices.enabled}
        runs = {model_id: False for model_id, wish in self._desired.wishes.items() if wish.run}
        for model_id in chosen:
            if effective.start_policy(remembered[model_id]) is not StartPolicy.ALWAYS_ON:
                # Up or not, that is for requests or for a person to say.
                runs.pop(model_id, None)
            elif model_id in listed or self._desired[model_id] is not None:
                runs[model_id] = True
            # Else it is wanted when it comes back, as every enabled model of which nobody spoke in this boot.
        changed = {model_id: run for model_id, run in sorted(runs.items()) if run != self._desired.wants(model_id)}
        return Plan(
            slug,
            enable=tuple(sorted(chosen - before)),
            disable=tuple(sorted(before - chosen)),
            runs={model_id: run for model_id, run in changed.items() if model_id in listed},
            later={model_id: run for model_id, run in changed.items() if model_id not in listed},
            keep=tuple(sorted(model_id for model_id in runs.keys() & listed if model_id not in changed)),
            settings=settings,
            places=self._places_in(profile),
            absent=tuple(sorted(chosen - listed.keys())),
            unknown=unknown,
            unusable={
                model_id: listed[model_id].facts.problem or str(listed[model_id].facts.status)
                for model_id in sorted(chosen & listed.keys())
                if not listed[model_id].is_usable
            },
        )

    def _chosen(self, profile: Profile) -> tuple[set[str], tuple[str, ...]]:
        """The profile's models, there or not, and the names that are nobody's."""
        models = self._models_by_name()
        chosen = {models[name].model_id for name in profile.enabled_models if name in models}
        return chosen, tuple(dict.fromkeys(name for name in profile.enabled_models if name not in models))

    def _places_in(self, profile: Profile) -> dict[str, int]:
        models = self._models_by_name()
        named = (models[name].model_id for name in profile.enabled_models if name in models)
        return {model_id: place for place, model_id in enumerate(dict.fromkeys(named))}

    def _settings_of(self, profile: Profile) -> dict[str, RuntimeSettings]:
        models = self._models_by_name()
        return {
            models[name].model_id if name in models else name: runtime
            for name, runtime in profile.runtime_settings.items()
        }

    def _models_by_name(self) -> dict[str, Model]:
        """Every model there is or was, by its id, and by its former one where that is no other's."""
        models = self._registry.remembered
        former = {model.former_id: model for model in models.values() if model.former_id}
        return {**former, **models}

    def _hold(self, profile: Profile) -> None:
        self._effective.hold_profile(self._settings_of(profile))
        self._places = self._places_in(profile)
        self._held = profile
        self.problem = None
