"""Defaults, then ``agent.toml``, then the environment, then the command line, joined into one object."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from magi_agent.errors import ConfigurationError
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.settings.file import parse_config, place_of, read_config, short
from magi_agent.settings.settings import Settings, within
from magi_agent.settings.table import SETTINGS, Setting
from magi_agent.vocabulary import Scope, ServerAccess

DEFAULT_CONFIG: Final = Path("/etc/magi-agent/agent.toml")


def load_settings(options: Mapping[str, str], environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """Join all sources into one object.

    ``options`` are the command line's, by setting name. ``config`` is the file named on the command line; without it
    ``MAGI_CONFIG`` names it, and without that the default file is read if it is there.

    Raises ``ConfigurationError`` with one line that names the key, where it stands and what is allowed.
    """
    named = config or (Path(environment["MAGI_CONFIG"]) if environment.get("MAGI_CONFIG") else None)
    path = named or DEFAULT_CONFIG
    text = read_config(path, required=named is not None)
    in_file, defaults = parse_config(path, text)
    values: dict[str, object] = {}
    places: dict[str, str] = {}

    def take(setting: Setting, place: str, raw: object) -> None:
        try:
            values[setting.name] = setting.parse(raw)
        except ValueError as error:
            raise ConfigurationError(f"{place}: {error}, not {short(raw)}") from None
        places[setting.name] = place

    for setting in SETTINGS:
        if setting.name in options:
            take(setting, setting.option, options[setting.name])
        elif setting.variable in environment:
            take(setting, f"environment variable {setting.variable}", environment[setting.variable])
        elif setting.name in in_file:
            place = f"{place_of(path, text, setting.section, setting.name)}: {setting.section}.{setting.name}"
            take(setting, place, in_file[setting.name])
    for setting in SETTINGS:
        if setting.name not in values:
            place = f"default of {setting.section}.{setting.name}"
            take(setting, place, _default(setting, values.get("systemd_scope"), environment))
    settings = Settings(**values, defaults=defaults)  # type: ignore[arg-type]  # each parse function returns its type
    _check_together(settings, places)
    return settings


def _default(setting: Setting, scope: object, environment: Mapping[str, str]) -> str:
    runtime = environment.get("XDG_RUNTIME_DIR")
    if setting.name == "socket" and runtime and scope is Scope.USER:
        # /run belongs to root; a user's agent has a run-time folder of its own.
        return f"{runtime}/magi-agent/api.sock"
    if setting.name == "tokens_path" and scope is Scope.USER:
        home = environment.get("HOME")
        folder = environment.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else None)
        return f"{folder}/magi-agent/tokens" if folder else setting.default
    return setting.default


def _tiers(settings: Settings) -> Iterator[tuple[str, RuntimeSettings]]:
    for tier, runtime in settings.defaults.tiers.items():
        yield f"defaults.{tier}", runtime


def _check_together(settings: Settings, places: Mapping[str, str]) -> None:
    if settings.tcp is None and settings.socket is None:
        raise ConfigurationError(
            f"{places['tcp']}: 'off', and so is api.socket ({places['socket']}): nobody could reach the agent; "
            "give one of them an address"
        )
    if not within(settings.port_range, settings.port_limits):
        low, high = settings.port_limits
        raise ConfigurationError(
            f"{places['port_range']}: must lie within servers.port_limits ({low}-{high}, {places['port_limits']})"
        )
    if (
        settings.server_access is ServerAccess.SOCKET
        and settings.systemd_scope is Scope.SYSTEM
        and not settings.llama_server_user
        and os.geteuid() != 0
    ):
        raise ConfigurationError(
            f"{places['server_access']}: must not be 'socket' while servers.llama_server_user is empty: the agent, "
            "which is not root, cannot enter a dynamic user's folder; name a user whose group the agent belongs to"
        )
    for where, runtime in (("defaults", settings.defaults.host), *_tiers(settings)):
        for flag in runtime.extra_flags or ():
            if (name := flag.partition("=")[0]) not in settings.allowed_flags:
                raise ConfigurationError(
                    f"{where}.extra_flags: {name} must be among servers.allowed_flags ({places['allowed_flags']})"
                )
    if settings.fast_max > settings.powerful_min:
        raise ConfigurationError(
            f"{places['fast_max']}: must be at most discovery.powerful_min ({settings.powerful_min:g}, "
            f"{places['powerful_min']}), not {settings.fast_max:g}"
        )
