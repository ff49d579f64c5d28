"""Configuration files of llama-swap (https://github.com/mostlygeek/llama-swap, ``config.example.yaml``).

Macros are filled in, but for ``${PORT}``, which nobody needs, and ``${env.NAME}``: this host's environment is not that
in which llama-swap runs.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from magi_agent.imports.command_line import read_command, simple_commands
from magi_agent.imports.gathering import Gathering
from magi_agent.imports.imported import (
    MAX_IMPORTED_MODELS,
    Imported,
    ImportedModel,
    InvalidImport,
    LeftOut,
    Origin,
    shown,
)
from magi_agent.imports.shell_words import Command, Word, words
from magi_agent.imports.yaml_document import read_yaml
from magi_agent.vocabulary import StartPolicy

_MACRO: Final = re.compile(r"\$\{([A-Za-z0-9_-]+)\}")
_MAX_EXPANDED: Final = 1 << 16
_MOST_NESTED: Final = 16
_DESCRIBED: Final = "models are described by what their files say"
_AS_THEY_COME: Final = "requests are passed on as they come"
_SIDE_BY_SIDE: Final = "what runs side by side is what fits into memory: see the setting pinned"
_OWN: Final = "it is llama-swap's own"
_MODEL_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cmdStop": "systemd stops the server: see servers.stop_timeout",
        "checkEndpoint": "the agent asks /health, and whether the answer comes from the server's own processes",
        "proxy": "the agent knows where its servers listen",
        "name": _DESCRIBED,
        "description": _DESCRIBED,
        "metadata": _DESCRIBED,
        "capabilities": _DESCRIBED,
        "unlisted": "every model is listed",
        "useModelName": _AS_THEY_COME,
        "filters": _AS_THEY_COME,
        "concurrencyLimit": "how many requests a server answers at a time is the setting parallel_slots",
        "sendLoadingState": "nothing is written into answers while a model is loading",
        "timeouts": "no request is cut short",
    }
)
_USUAL: Final[Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        "checkEndpoint": re.compile(r"/health"),
        "proxy": re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\S*)?"),
    }
)
"""Values by which a key asks for what the agent does anyway."""
_READ: Final = frozenset({"cmd", "env", "aliases", "ttl", "macros"})
_TOP_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "healthCheckTimeout": "see servers.max_startup_time in agent.toml, which counts from the last sign of progress",
        "startPort": "see servers.port_range in agent.toml",
        "apiKeys": "who may call is the agent's to say: see api.tcp_access in agent.toml",
        "matrix": _SIDE_BY_SIDE,
        "profiles": "make profiles with POST /api/models/profiles",
        "peers": "servers on other hosts are not the agent's",
        "logLevel": "see agent.log_level in agent.toml",
    }
)
_TOP_READ: Final = frozenset({"models", "macros", "globalTTL", "hooks", "groups"})


@dataclass(frozen=True, slots=True)
class _Around:
    """What a file says beside its models."""

    macros: Mapping[str, str]
    ttl: object
    preload: Collection[str]
    persistent: Mapping[str, str]
    """The persistent group of a model."""
    allowed_flags: Collection[str]


def read_llama_swap(text: str, allowed_flags: Collection[str] = ()) -> Imported:
    """The models of a llama-swap configuration. Raises ``InvalidImport``.

    ``allowed_flags`` are those that may be extra flags; others are left out, and suggested.
    """
    document = read_yaml(text)
    entries = document.get("models") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(entries, dict) or not entries:
        raise InvalidImport("a llama-swap configuration has models: a mapping of names to commands")
    if len(entries) > MAX_IMPORTED_MODELS:
        raise InvalidImport(f"it has more than {MAX_IMPORTED_MODELS} models")
    left_out: list[LeftOut] = []
    around = _Around(
        _macros(document.get("macros")),
        document.get("globalTTL"),
        _preloaded(document.get("hooks"), left_out),
        _persistent(document.get("groups"), left_out),
        allowed_flags,
    )
    left_out += [
        LeftOut(shown(str(key)), _TOP_KEYS.get(str(key), _OWN))
        for key, value in document.items()
        if key not in _TOP_READ and value not in (None, "", [], {})
    ]
    models: list[ImportedModel] = []
    names: set[str] = set()
    for key, entry in entries.items():
        name = str(key)
        read = _model(name, entry, around)
        if isinstance(read, LeftOut):
            left_out.append(read)
        else:
            models.append(read)
        names |= {name, *_alias_names(entry.get("aliases") if isinstance(entry, dict) else None)}
    left_out += [
        LeftOut(f"hooks.on_startup.preload: {shown(name)}", "no model of the file has this name")
        for name in around.preload
        if name not in names
    ]
    return Imported(Origin.LLAMA_SWAP, tuple(models), tuple(left_out))


def _model(name: str, entry: object, around: _Around) -> ImportedModel | LeftOut:
    place = f"models.{name}"
    command = entry.get("cmd") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(command, str):
        return LeftOut(shown(place), "it has no cmd: a llama-swap model is a command")
    macros = {**around.macros, **_macros(entry.get("macros")), "MODEL_ID": name, "PORT": "${PORT}"}
    gathering = Gathering(around.allowed_flags)
    try:
        said = Command(words(_filled_in(command, macros)))
        variables = _environment(entry, macros)
        if not any(read_command(one.words, variables, gathering) for one in simple_commands(said)):
            return LeftOut(shown(f"{place}.cmd"), "it starts no llama-server, and the agent runs nothing else")
    except InvalidImport as error:
        return LeftOut(shown(f"{place}.cmd"), error.reason)
    gathering.add_aliases((name,), place)
    for alias in _alias_names(entry.get("aliases")):
        gathering.add_aliases((_filled_in(alias, macros),), f"aliases: {alias}")
    _read_start(name, entry, around, gathering)
    if name in around.persistent:
        gathering.set("pinned", True, around.persistent[name])
    for key, value in entry.items():
        if key in _READ or value in (None, False, 0, "", [], {}):
            continue
        usual = _USUAL.get(str(key))
        if usual is not None and isinstance(value, str) and usual.fullmatch(value):
            gathering.carry(f"{key}: {value}", f"nothing: {_MODEL_KEYS[str(key)]}")
        else:
            gathering.leave_out(str(key), _MODEL_KEYS.get(str(key), _OWN))
    return gathering.finished(name)


def _read_start(name: str, entry: Mapping[str, object], around: _Around, gathering: Gathering) -> None:
    """When a model is started, and when it is stopped."""
    ttl, source = entry.get("ttl"), "ttl"
    if ttl in (None, -1):
        ttl, source = around.ttl, "globalTTL"
    aliases = _alias_names(entry.get("aliases"))
    preload = next((wanted for wanted in around.preload if wanted in (name, *aliases)), None)
    if ttl:
        gathering.set("idle_timeout_seconds", ttl, f"{source}: {ttl}")
    if preload is not None and not ttl:
        gathering.set("start_policy", StartPolicy.ALWAYS_ON.value, f"hooks.on_startup.preload: {preload}")
        return
    if preload is not None:
        gathering.leave_out(
            f"hooks.on_startup.preload: {preload}",
            "what is stopped when idle is started by its first request; with start_policy alwaysOn it would always run",
        )
    gathering.set("start_policy", StartPolicy.ON_DEMAND.value, "llama-swap starts a model when it is asked for")


def _environment(entry: Mapping[str, object], macros: Mapping[str, str]) -> list[tuple[str, Word]]:
    entries = entry.get("env")
    variables = []
    for text in entries if isinstance(entries, list) else ():
        name, has_value, value = str(text).partition("=")
        if has_value:
            filled_in = _filled_in(value, macros)
            waiting = _MACRO.search(filled_in) or re.search(r"\$\{env\.[^{}]*\}", filled_in)
            variables.append((name, Word(filled_in, 0, waiting.group() if waiting else None)))
    return variables


def _macros(document: object) -> dict[str, str]:
    if not isinstance(document, dict):
        return {}
    return {
        str(name): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in document.items()
        if isinstance(value, bool | int | float | str)
    }


def _filled_in(text: str, macros: Mapping[str, str]) -> str:
    """``text`` with macros in place, and macros in those."""
    for _ in range(_MOST_NESTED):
        found = [name for name in _MACRO.findall(text) if macros.get(name, f"${{{name}}}") != f"${{{name}}}"]
        if not found:
            return text
        if len(text) + sum(len(macros[name]) for name in found) > _MAX_EXPANDED:
            raise InvalidImport(f"with its macros filled in it has more than {_MAX_EXPANDED} characters")
        text = _MACRO.sub(lambda macro: macros.get(macro[1], macro[0]), text)
    raise InvalidImport(f"its macros are nested deeper than {_MOST_NESTED} times, or stand for each other")


def _alias_names(aliases: object) -> list[str]:
    """Aliases are names, or mappings with an ``id``."""
    return [
        str(alias.get("id", "")) if isinstance(alias, dict) else str(alias)
        for alias in (aliases if isinstance(aliases, list) else ())
    ]


def _preloaded(hooks: object, left_out: list[LeftOut]) -> tuple[str, ...]:
    names: list[str] = []
    for path, value in _flat(hooks, "hooks"):
        if path == "hooks.on_startup.preload":
            names += [str(name).strip() for name in (value if isinstance(value, list) else ())]
        else:
            left_out.append(LeftOut(shown(path), "the agent runs no commands of others"))
    return tuple(filter(None, names))


def _flat(document: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _flat(value, f"{path}.{key}")
    elif document is not None:
        yield path, document


def _persistent(groups: object, left_out: list[LeftOut]) -> dict[str, str]:
    """The models that no other may push out."""
    persistent: dict[str, str] = {}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        members = group.get("members") if isinstance(group, dict) else None
        if isinstance(group, dict) and group.get("persistent") is True and isinstance(members, list):
            persistent |= {str(member): f"groups.{name}.persistent" for member in members}
        else:
            left_out.append(LeftOut(shown(f"groups.{name}"), _SIDE_BY_SIDE))
    return persistent
