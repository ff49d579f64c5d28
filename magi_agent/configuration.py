"""The configuration while the agent runs: the settings that hold, and reading them again.

A configuration that is bad changes nothing; what was read before holds on, and ``problems`` says why. Of a good one
everything holds from then on but what only a start can carry out, which waits for one.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from magi_agent.errors import ConfigurationError
from magi_agent.settings import DEFAULT_CONFIG, SETTINGS, Settings, load_settings

NEEDS_RESTART: Final = ("registry_path", "tcp", "socket", "systemd_scope", "journal_directory")
"""Settings that hold from a start of the agent to its end."""
_KEYS: Final = {setting.name: f"{setting.section}.{setting.name}" for setting in SETTINGS}


@dataclass(slots=True)
class ConfigurationSources:
    """What the agent was started with: enough to read its configuration, and to read it again."""

    options: Mapping[str, str]
    """The command line's, by setting name."""
    environment: Mapping[str, str]
    config: Path | None = None
    """The file named on the command line."""

    def read(self) -> Settings:
        """Read file, environment and command line. Raises ``ConfigurationError``."""
        settings = load_settings(self.options, self.environment, self.config)
        if self.config is None and not self.environment.get("MAGI_CONFIG") and DEFAULT_CONFIG.exists():
            # Once it was there, its absence is a mistake, not the operator's wish for every default.
            self.config = DEFAULT_CONFIG
        return settings


@dataclass(frozen=True, slots=True)
class Reload:
    """What reading the configuration again came to: keys, as the file has them."""

    changed: tuple[str, ...]
    """They hold from now on."""
    awaiting_restart: tuple[str, ...]
    """They are other than what holds, and will hold once the agent is started anew."""


class Configuration:
    """The settings that hold: one object at a time, and another one after a reload that changed anything."""

    def __init__(self, settings: Settings, read: Callable[[], Settings] | None = None) -> None:
        """``read`` reads all sources again, raising ``ConfigurationError``; without it nothing ever changes."""
        self._read = read or (lambda: settings)
        self.settings = settings
        self.revision = 0
        """Grows with every change of ``settings``."""
        self.problems: tuple[str, ...] = ()
        """What the last reload could not do, in sentences."""

    async def reload(self) -> Reload:
        """Read everything again. Raises ``ConfigurationError``; then all is as before, but for ``problems``."""
        try:
            found = await asyncio.to_thread(self._read)
        except ConfigurationError as error:
            self.problems = (f"the configuration was not reloaded: {error}",)
            raise
        before = self.settings
        awaiting = [name for name in NEEDS_RESTART if getattr(found, name) != getattr(before, name)]
        after = replace(found, **{name: getattr(before, name) for name in awaiting})
        changed = [each.name for each in fields(after) if getattr(after, each.name) != getattr(before, each.name)]
        if changed:
            self.settings = after
            self.revision += 1
        reload = Reload(_keys(changed), _keys(awaiting))
        self.problems = (
            (f"{', '.join(reload.awaiting_restart)}: changed, and takes effect when the agent is restarted",)
            if awaiting
            else ()
        )
        return reload


def _keys(names: list[str]) -> tuple[str, ...]:
    return tuple(_KEYS.get(name, name) for name in names)
