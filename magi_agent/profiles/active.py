"""The active profile: the one whose settings hold, and whose models are the enabled ones since it was activated.

Which one is active is a choice, kept in the registry's file. ``ACTIVE_PROFILE`` is applied at the first start and when
its value has changed since it was applied last, so that a restart undoes nobody's later choice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.events import EventStream, ProfilesChanged
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.settings import RuntimeSettings
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
    keep: tuple[str, ...]
    """Wanted before and after; they are not touched."""
    settings: Mapping[str, RuntimeSettings]
    """The profile's settings, by model id."""
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
        self.problem: str | None = None
        """Why the profile that should be active does not hold."""

    @property
    def slug(self) -> str | None:
        """The active profile's slug."""
        return self._registry.active_profile

    async def resolve(self, configured: str) -> None:
        """Apply the profile that ``ACTIVE_PROFILE`` names, if it is new; else take up the active one's settings.

        A profile that is not there or cannot be read, and a save that fails, are told in ``problem`` and the journal.
        """
        applied = self._registry.applied_profile_setting
        try:
            if configured == applied or not configured:
                await self.reload()
            elif applied is None and any(model.choices.enabled for model in self._registry.models.values()):
                # Choices that are older than any profile of ours: an earlier MAGI's. They are not to be undone.
                profile = await self._profiles.profile(configured)
                await self._registry.choose_for_all(
                    lambda model: model.choices, active_profile=configured, applied_profile_setting=configured
                )
                self._hold(profile)
            else:
                await self._activate(configured, by="ACTIVE_PROFILE", applied=configured)
        except MagiError as error:
            self.problem = f"the active profile does not hold: {error.message}"
            _LOG.warning("%s", self.problem)

    async def reload(self) -> None:
        """Read the active profile's settings again. Raises ``ProfileNotFound``, ``ProfileInvalid``."""
        if self.slug is None:
            self._effective.hold_profile({})
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

        Returns what was changed. Raises ``ProfileNotFound``, ``ProfileInvalid``, ``RegistrySaveFailed``.
        """
        return await self._activate(slug, by=by, applied=None)

    async def _activate(self, slug: str, *, by: str, applied: str | None) -> Plan:
        profile = await self._profiles.profile(slug)
        plan = self._planned(slug, profile)
        chosen, _ = self._chosen(profile)
        await self._registry.choose_for_all(
            lambda model: replace(model.choices, enabled=model.model_id in chosen),
            active_profile=slug,
            applied_profile_setting=applied,
        )
        self._hold(profile)
        # Once more: somebody may have spoken meanwhile.
        plan = replace(plan, runs=self._planned(slug, profile).runs)
        if plan.runs:
            await self._desired.wish_each(plan.runs, by=f"profile {slug}" if by == "ACTIVE_PROFILE" else by)
        for name in plan.unknown:
            _LOG.warning("profile %s names %s, and no model has this id", slug, name)
        self._events.publish(ProfilesChanged(name=slug))
        _LOG.info("profile %s is active (%s): %d models enabled", slug, by, len(chosen))
        return plan

    def _planned(self, slug: str, profile: Profile) -> Plan:
        chosen, unknown = self._chosen(profile)
        settings = self._settings_of(profile)
        effective = self._effective.with_profile(settings)
        models = self._registry.models
        before = {model_id for model_id, model in models.items() if model.choices.enabled}
        runs = {model_id: False for model_id, wish in self._desired.wishes.items() if wish.run}
        for model_id in chosen:
            if effective.start_policy(models[model_id]) is StartPolicy.ALWAYS_ON:
                runs[model_id] = True
            else:
                # Up or not, that is for requests or for a person to say.
                runs.pop(model_id, None)
        changed = {model_id: run for model_id, run in sorted(runs.items()) if run != self._desired.wants(model_id)}
        return Plan(
            slug,
            enable=tuple(sorted(chosen - before)),
            disable=tuple(sorted(before - chosen)),
            runs=changed,
            keep=tuple(sorted(model_id for model_id, run in runs.items() if run and model_id not in changed)),
            settings=settings,
            unknown=unknown,
            unusable={
                model_id: models[model_id].facts.problem or str(models[model_id].facts.status)
                for model_id in sorted(chosen)
                if not models[model_id].is_usable
            },
        )

    def _chosen(self, profile: Profile) -> tuple[set[str], tuple[str, ...]]:
        """The profile's models that there are, and the names that are nobody's."""
        chosen: set[str] = set()
        unknown = []
        for name in profile.enabled_models:
            model = self._model(name)
            if model is None:
                unknown.append(name)
            else:
                chosen.add(model.model_id)
        return chosen, tuple(dict.fromkeys(unknown))

    def _model(self, name: str) -> Model | None:
        try:
            return self._registry.model(name)
        except MagiError:
            return None

    def _settings_of(self, profile: Profile) -> dict[str, RuntimeSettings]:
        settings = {}
        for name, runtime in profile.runtime_settings.items():
            model = self._model(name)
            settings[model.model_id if model else name] = runtime
        return settings

    def _hold(self, profile: Profile) -> None:
        self._effective.hold_profile(self._settings_of(profile))
        self.problem = None
