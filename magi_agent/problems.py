"""Everything that is known to be wrong: what ``/health/ready`` says in sentences, and the metrics count."""

import asyncio
from collections.abc import Callable
from typing import Final

from magi_agent.configuration import Configuration
from magi_agent.errors import ServiceUnavailable
from magi_agent.host_facts import HostFacts
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.inventory import Inventory
from magi_agent.registry.registry import Registry
from magi_agent.servers.servers import Servers
from magi_agent.systemd.manager import SystemdManager

_PATIENCE: Final = 2.0
"""Seconds that the profiles' folders have to answer."""


class Problems:
    """Asks each part of the agent."""

    def __init__(
        self,
        configuration: Configuration,
        registry: Registry,
        inventory: Inventory,
        profiles: Profiles,
        active_profile: ActiveProfile,
        servers: Servers,
        manager: SystemdManager,
        host: HostFacts,
        is_settled: Callable[[], bool],
    ) -> None:
        """``is_settled`` says whether everything is wanted that should run since the start."""
        self._configuration = configuration
        self._registry = registry
        self._inventory = inventory
        self._profiles = profiles
        self._active_profile = active_profile
        self._servers = servers
        self._manager = manager
        self._host = host
        self._is_settled = is_settled
        self._survey: asyncio.Task[list[str]] | None = None
        self._of_profiles: list[str] = []

    async def known(self) -> list[str]:
        """One sentence for each, the gravest first: a long list is cut at its end."""
        of_profiles = await self._profiles_problems()
        found = []
        try:
            _ = self._registry.models
        except ServiceUnavailable as error:
            found.append(error.message)
        if not self._manager.connected:
            found.append("systemd is not reachable, so nobody knows what runs now")
        if not self._is_settled():
            found.append("the agent is still starting: what should run is not known yet")
        if self._inventory.scanning:
            found.append("the first scan is still under way")
        if driver := await self._host.nvidia_problem():
            found.append(driver)
        found += self._servers.problems
        found += self._configuration.problems
        found += self._registry.problems
        if self._active_profile.problem:
            found.append(self._active_profile.problem)
        found += of_profiles
        found += [f"{problem.path}: {problem.message}" for problem in self._inventory.problems]
        return found

    async def close(self) -> None:
        """Wait for no folder any longer."""
        if self._survey is not None:
            self._survey.cancel()
            await asyncio.gather(self._survey, return_exceptions=True)

    async def _profiles_problems(self) -> list[str]:
        """Those of the profiles; of folders that do not answer that, and what was known of them before."""
        if self._survey is None:
            # One at a time: where a folder hangs, each would hold a thread for ever.
            self._survey = asyncio.create_task(self._surveyed(), name="problems of profiles")
        survey = self._survey
        try:
            async with asyncio.timeout(_PATIENCE):
                self._of_profiles = await asyncio.shield(survey)
        except TimeoutError:
            return [f"the profiles' folders have not answered for {_PATIENCE:g} s", *self._of_profiles]
        finally:
            if survey.done() and self._survey is survey:
                self._survey = None
        return self._of_profiles

    async def _surveyed(self) -> list[str]:
        _, unreadable = await self._profiles.survey()
        return [f"profile {problem.name}: {problem.path}: {problem.message}" for problem in unreadable]
