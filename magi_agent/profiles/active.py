"""The active profile: the one whose settings hold, and whose models are the enabled ones since it was activated.

Which one is active is a choice, kept in the registry's file. ``ACTIVE_PROFILE`` is applied at the first start and when
its value has changed since it was applied last, so that a restart undoes nobody's later choice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.events import EventStream, ProfilesChanged
from magi_agent.profiles.profile import Profile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.model import Model, RuntimeSettings
from magi_agent.registry.registry import Registry
from magi_agent.servers.desired import Desired
from magi_agent.vocabulary import StartPolicy

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Activation:
    """What activating a profile came to: ids of models."""

    enabled: tuple[str, ...]
    disabled: tuple[str, ...]
    unknown: tuple[str, ...]
    """Named in the profile, and by no model's id."""


class ActiveProfile:
    """Activates profiles, and knows the settings of the active one."""

    def __init__(self, profiles: Profiles, registry: Registry, desired: Desired, events: EventStream) -> None:
        self._profiles = profiles
        self._registry = registry
        self._desired = desired
        self._events = events
        self._runtime_settings: Mapping[str, RuntimeSettings] = MappingProxyType({})
        self.problem: str | None = None
        """Why the profile that should be active does not hold."""

    @property
    def slug(self) -> str | None:
        """The active profile's slug."""
        return self._registry.active_profile

    @property
    def runtime_settings(self) -> Mapping[str, RuntimeSettings]:
        """The active profile's settings, by model id."""
        return self._runtime_settings

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
            self._runtime_settings = MappingProxyType({})
            return
        self._hold(await self._profiles.profile(self.slug))

    async def activate(self, slug: str, *, by: str) -> Activation:
        """Make exactly the profile's models enabled, and wanted; what runs already and is wanted still is not touched.

        Raises ``ProfileNotFound``, ``ProfileInvalid``, ``RegistrySaveFailed``.
        """
        return await self._activate(slug, by=by, applied=None)

    async def _activate(self, slug: str, *, by: str, applied: str | None) -> Activation:
        profile = await self._profiles.profile(slug)
        chosen, unknown = self._chosen(profile)
        before = {model_id for model_id, model in self._registry.models.items() if model.choices.enabled}
        await self._registry.choose_for_all(
            lambda model: replace(model.choices, enabled=model.model_id in chosen),
            active_profile=slug,
            applied_profile_setting=applied,
        )
        self._hold(profile)
        await self._want(chosen, by=f"profile {slug}" if by == "ACTIVE_PROFILE" else by)
        for name in unknown:
            _LOG.warning("profile %s names %s, and no model has this id", slug, name)
        self._events.publish(ProfilesChanged(name=slug))
        _LOG.info("profile %s is active (%s): %d models enabled", slug, by, len(chosen))
        return Activation(tuple(sorted(chosen - before)), tuple(sorted(before - chosen)), unknown)

    async def _want(self, chosen: set[str], *, by: str) -> None:
        runs = {model_id: False for model_id, wish in self._desired.wishes.items() if wish.run}
        for model_id in chosen:
            if self._registry.model(model_id).choices.start_policy is StartPolicy.ALWAYS_ON:
                runs[model_id] = True
            else:
                # Up or not, that is for requests or for a person to say.
                runs.pop(model_id, None)
        changed = {model_id: run for model_id, run in runs.items() if run != self._desired.wants(model_id)}
        if changed:
            await self._desired.wish_each(changed, by=by)

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

    def _hold(self, profile: Profile) -> None:
        settings = {}
        for name, runtime in profile.runtime_settings.items():
            model = self._model(name)
            settings[model.model_id if model else name] = runtime
        self._runtime_settings = MappingProxyType(settings)
        self.problem = None
