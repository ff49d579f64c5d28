"""Preset files of llama-server's own router (``--models-preset``; llama.cpp, ``common/preset.cpp``).

They look like INI files and are read as llama-server reads them, which ``configparser`` does not: an indented line
continues nothing, a ``;`` or ``#`` ends a value wherever it stands, and a section that comes again replaces the first.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.imports.gathering import NO, YES, Gathering
from magi_agent.imports.imported import (
    MAX_IMPORTED_MODELS,
    Imported,
    ImportedModel,
    InvalidImport,
    LeftOut,
    Origin,
    shown,
)
from magi_agent.imports.server_options import Named, option_named
from magi_agent.vocabulary import StartPolicy

_SECTION: Final = re.compile(r"\[([^\]]*)\]\s*(?:[;#].*)?")
_ENTRY: Final = re.compile(r"-{0,2}([A-Za-z_][A-Za-z0-9_.-]*)\s*=(.*)")
_COMMENT: Final = re.compile("[;#]")
_ALL_MODELS: Final = "*"
_VERSION: Final = "version"
_KNOWN_VERSION: Final = "1"
_LOAD_ON_STARTUP: Final = "load-on-startup"
_STOP_TIMEOUT: Final = "stop-timeout"
_PRESET_KEYS: Final = {"__PRESET_LOAD_ON_STARTUP": _LOAD_ON_STARTUP, "__PRESET_STOP_TIMEOUT": _STOP_TIMEOUT}
"""The names of the router's own keys as variables, which are keys too."""


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    value: str

    @property
    def source(self) -> str:
        return f"{self.key} = {self.value}"

    @property
    def named(self) -> Named | None:
        """The option that is meant: by a long name, a short one or a variable."""
        for name in (f"--{self.key}", f"-{self.key}", self.key):
            if named := option_named(name):
                return named
        return None

    @property
    def identity(self) -> str:
        """What tells that two entries are about the same."""
        named = self.named
        return named.option.name if named else _PRESET_KEYS.get(self.key, self.key)


def read_router_preset(text: str, allowed_flags: Collection[str] = ()) -> Imported:
    """The models of a preset file. Raises ``InvalidImport``.

    ``allowed_flags`` are those that may be extra flags; others are left out, and suggested.
    """
    left_out: list[LeftOut] = []
    sections = _sections(text, left_out)
    common = sections.pop(_ALL_MODELS, [])
    if not sections:
        raise InvalidImport(
            "no section names a model: those of [*] hold for all, and belong into [defaults] of agent.toml"
        )
    if len(sections) > MAX_IMPORTED_MODELS:
        raise InvalidImport(f"it has more than {MAX_IMPORTED_MODELS} models")
    models = tuple(
        _model(name, {**_by_identity(common), **_by_identity(own)}, allowed_flags) for name, own in sections.items()
    )
    return Imported(Origin.ROUTER_PRESET, models, tuple(left_out))


def _sections(text: str, left_out: list[LeftOut]) -> dict[str, list[_Entry]]:
    sections: dict[str, list[_Entry]] = {}
    current: list[_Entry] | None = None
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in ";#":
            continue
        if section := _SECTION.fullmatch(line):
            name = section[1].strip()
            if not name:
                raise InvalidImport("a section has no name", number)
            if name in sections:
                left_out.append(LeftOut(shown(f"[{name}]"), "it stands there again later, which replaces it"))
            current = sections[name] = []
        elif found := _ENTRY.fullmatch(line):
            entry = _Entry(found[1], _COMMENT.split(found[2], 1)[0].strip())
            if entry.key == _VERSION:
                if entry.value != _KNOWN_VERSION:
                    left_out.append(LeftOut(shown(entry.source), "only version 1 is known, and what it says was read"))
            elif current is None:
                left_out.append(LeftOut(shown(entry.key), "it stands before any section, and so belongs to no model"))
            else:
                current.append(entry)
        else:
            raise InvalidImport("here stands neither [section] nor key = value", number)
    return sections


def _by_identity(entries: list[_Entry]) -> Mapping[str, _Entry]:
    """The entries that count: of two about the same, the later."""
    return {entry.identity: entry for entry in entries}


def _model(name: str, entries: Mapping[str, _Entry], allowed_flags: Collection[str]) -> ImportedModel:
    gathering = Gathering(allowed_flags)
    gathering.add_aliases((name,), f"[{name}]")
    policy, source = StartPolicy.ON_DEMAND, "the router starts a model when it is asked for"
    for identity, entry in entries.items():
        if identity == _LOAD_ON_STARTUP:
            if entry.value.lower() in YES:
                policy, source = StartPolicy.ALWAYS_ON, entry.source
            elif entry.value.lower() not in NO:
                gathering.leave_out(entry.source, "it is either on or off")
        elif identity == _STOP_TIMEOUT:
            gathering.leave_out(entry.source, "see servers.stop_timeout in agent.toml")
        elif named := entry.named:
            gathering.give(named, entry.key, entry.value, entry.source)
        else:
            gathering.give_unknown(f"--{entry.key}", entry.value, entry.source)
    gathering.set("start_policy", policy.value, source)
    return gathering.finished(name)
