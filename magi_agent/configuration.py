"""The configuration while the agent runs: the settings that hold, and reading them again.

A configuration that is bad changes nothing; what was read before holds on, and ``problems`` says why. Of a good one
everything holds from then on but what only a start can carry out, which waits for one.
"""

import asyncio
import pwd
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from magi_agent.errors import ConfigurationError
from magi_agent.settings.loading import DEFAULT_CONFIG, load_settings
from magi_agent.settings.settings import Settings
from magi_agent.settings.table import SETTINGS
from magi_agent.tokens import Tokens, read_tokens

NEEDS_RESTART: Final = ("registry_path", "tcp", "socket", "systemd_scope", "launcher_socket", "journal_directory")
"""Settings that hold from a start of the agent to its end."""
_LISTENERS: Final = {"tcp": "magi-agent-tcp.socket", "socket": "magi-agent.socket"}
"""Settings that decide nothing where systemd hands over sockets, and the package's unit that does."""
_DEFAULTS: Final = {setting.name: setting.parse(setting.default) for setting in SETTINGS if setting.name in _LISTENERS}
_KEYS: Final = {setting.name: f"{setting.section}.{setting.name}" for setting in SETTINGS}


@dataclass(slots=True)
class ConfigurationSources:
    """What the agent was started with: enough to read its configuration, and to read it again."""

    options: Mapping[str, str]
    """The command line's, by setting name."""
    environment: Mapping[str, str]
    config: Path | None = None
    """The file named on the command line."""

    @property
    def file(self) -> Path:
        """The configuration file, whether it is there or not."""
        return (self.config or Path(self.environment.get("MAGI_CONFIG") or DEFAULT_CONFIG)).absolute()

    @property
    def variables(self) -> Mapping[str, str]:
        """Of the environment, what sets something."""
        names = ("MAGI_CONFIG", *(setting.variable for setting in SETTINGS))
        return {name: self.environment[name] for name in names if name in self.environment}

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

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings] | None = None,
        sources: ConfigurationSources | None = None,
    ) -> None:
        """``read`` reads all sources again, raising ``ConfigurationError``; without it nothing ever changes.

        ``sources`` are these, where they are known.
        """
        self._read = read or (lambda: settings)
        self.sources = sources
        self.settings = settings
        self.revision = 0
        """Grows with every change of ``settings``."""
        self.tokens = Tokens()
        self.user_ids: Mapping[str, int] = {}
        """The ids of those users that ``api.proxy_access`` names and this host knows."""
        self._reached_from_elsewhere: tuple[str, ...] = ()
        self._of_systemd: tuple[str, ...] | None = None
        self.problems: tuple[str, ...] = ()
        """What the last reload, or the start, could not do, in sentences."""

    async def read_access(self) -> None:
        """Read, for a start, what decides who may what beside the settings. Raises ``ConfigurationError``."""
        found = await asyncio.to_thread(_read_access, self.settings)
        if found.bad is not None:
            raise found.bad
        self.problems = self._take(found)

    def note_listeners(
        self, addresses: Sequence[str], *, reached_from_elsewhere: Sequence[str], are_systemds: bool
    ) -> None:
        """Take note of where the API answers, as URLs or ``unix:PATH``, and of what of it other hosts reach.

        ``are_systemds`` says that socket units decided this, and so the settings for it do not.
        """
        self._reached_from_elsewhere = tuple(reached_from_elsewhere)
        self._of_systemd = tuple(addresses) if are_systemds else None
        self.problems = (*self._unheeded(self.settings), *self.problems)

    async def reload(self) -> Reload:
        """Read everything again. Raises ``ConfigurationError``; then the settings are as before.

        Tokens that can be read hold even so: one that was taken back must not go on because of another mistake.
        """
        try:
            found = await asyncio.to_thread(self._read)
        except ConfigurationError as error:
            access = await asyncio.to_thread(_read_access, self.settings)
            self.problems = (f"the configuration was not reloaded: {error}", *self._take(access))
            raise
        before = self.settings
        awaiting = [name for name in NEEDS_RESTART if getattr(found, name) != getattr(before, name)]
        after = replace(found, **{name: getattr(before, name) for name in awaiting})
        access = await asyncio.to_thread(_read_access, after)
        changed = [each.name for each in fields(after) if getattr(after, each.name) != getattr(before, each.name)]
        if changed:
            self.settings = after
            self.revision += 1
        held = self.tokens
        problems = (*self._unheeded(found), *self._take(access))
        if self._of_systemd is not None:
            awaiting = [name for name in awaiting if name not in _LISTENERS]
        reload = Reload((*_keys(changed), *_news_of_tokens(held, self.tokens)), _keys(awaiting))
        if awaiting:
            waits = f"{', '.join(reload.awaiting_restart)}: changed, and takes effect when the agent is restarted"
            problems = (waits, *problems)
            if "tcp" in awaiting and found.tcp and not found.tcp.is_loopback and not self.tokens:
                problems = (
                    f"no restart would succeed as things are: {needs_token(str(found.tcp), after.tokens_path)}",
                    *problems,
                )
        self.problems = problems
        return reload

    def _unheeded(self, settings: Settings) -> Iterator[str]:
        """What somebody set of the listeners, and systemd has made otherwise, in sentences."""
        if self._of_systemd is None:
            return
        for name, unit in _LISTENERS.items():
            value = getattr(settings, name)
            scheme = "unix:" if name == "socket" else "http://"
            made = [address for address in self._of_systemd if address.startswith(scheme)]
            is_so = f"{scheme}{value}" in made if value else not made
            if not (is_so or value == _DEFAULTS[name]):
                yield (
                    f"api.{name} is {value or 'off'}, and systemd has made {', '.join(made) or 'no such socket'}: "
                    f"the socket unit decides; systemctl edit, or disable --now, {unit}, and restart the agent"
                )

    def _take(self, found: "_Access") -> tuple[str, ...]:
        """Have what was found decide from now on; what is wrong with it, in sentences."""
        self.user_ids = found.user_ids
        if found.bad is not None:
            return (f"the tokens were not reloaded: {found.bad}", *found.problems)
        path, elsewhere = found.path, ", ".join(self._reached_from_elsewhere)
        if self.tokens and elsewhere and not found.is_there:
            gone = (
                f"the tokens were not reloaded: {path} (api.tokens_path) is gone, and other hosts reach {elsewhere}; "
                "those that held go on to hold; to end them all, let the file be there and hold none"
            )
            return (gone, *found.problems)
        self.tokens = found.tokens
        if elsewhere and not self.tokens:
            return (f"no start would succeed as things are: {needs_token(elsewhere, path)}", *found.problems)
        return found.problems


def needs_token(address: str, path: Path) -> str:
    """What is wrong, and what to do, where the API is to listen on ``address`` and there is no token."""
    return (
        f"{address} can be reached from other hosts, which needs a token, and {path} (api.tokens_path) holds none; "
        "make one with 'magictl token add NAME --scope read', or listen on a loopback address, such as 127.0.0.1:8000"
    )


def _news_of_tokens(before: Tokens, after: Tokens) -> tuple[str, ...]:
    """Which tokens came and went, in a word or two; empty where none did."""
    if before == after:
        return ()
    held, hold = set(before), set(after)
    news = [f"{token.name} added" for token in after if token not in held]
    news += [f"{token.name} taken back" for token in before if token not in hold]
    return (f"the tokens ({', '.join(news)})" if news else "the tokens",)


@dataclass(frozen=True, slots=True)
class _Access:
    """What decides, beside the settings, who may what."""

    path: Path
    """Where the tokens are kept."""
    tokens: Tokens
    is_there: bool
    """Whether there is such a file."""
    user_ids: Mapping[str, int]
    problems: tuple[str, ...]
    bad: ConfigurationError | None = None
    """Why the tokens could not be read."""


def _read_access(settings: Settings) -> _Access:
    """Blocks: call it from a thread."""
    user_ids: dict[str, int] = {}
    problems: list[str] = []
    for right in settings.proxy_access:
        if right.user is None:
            continue
        try:
            user_ids[right.user] = pwd.getpwnam(right.user).pw_uid
        except KeyError:
            # What grants nothing is there for whatever proxy may come.
            if right.scope is not None:
                problems.append(f"api.proxy_access names the user {right.user}, whom this host does not know")
    path = settings.tokens_path
    try:
        found = read_tokens(path)
    except ConfigurationError as error:
        return _Access(path, Tokens(), True, user_ids, tuple(problems), error)
    return _Access(path, found.tokens, found.is_there, user_ids, (*found.problems, *found.not_understood, *problems))


def _keys(names: list[str]) -> tuple[str, ...]:
    return tuple(_KEYS.get(name, name) for name in names)
