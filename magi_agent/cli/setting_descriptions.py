"""What ``magictl settings --list`` says of each runtime setting, from the schema that the agent publishes too.

Making the schema needs pydantic, which costs more than all the rest of a short command: only this command pays for it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from magi_agent.cli.grid import Cell
from magi_agent.cli.phrasing import number
from magi_agent.cli.setting_words import BYTES, TOKENS, values_of
from magi_agent.cli.sheet import Fact
from magi_agent.runtime_settings.reading import ADAPTER
from magi_agent.runtime_settings.settings import setting_names, wire_name

_KINDS: Mapping[str, str] = {"integer": "whole number", "number": "number", "string": "text"}


def schema() -> dict[str, Any]:
    """Return the JSON schema of the runtime settings."""
    return ADAPTER.json_schema()


def describe() -> Iterator[Fact]:
    """Yield what each setting is for, and what it may be."""
    properties = schema()["properties"]
    for name in setting_names():
        about = properties[wire_name(name)]
        yield Fact(name, Cell(about.get("description", "")), _form(name, about))


def _form(name: str, about: Mapping[str, Any]) -> str:
    words = values_of(name)
    [kind] = [one for one in about["anyOf"] if one.get("type") != "null"]
    if words and kind.get("type") != "integer":
        return " | ".join(words)
    if kind.get("type") == "array":
        return f"{_KINDS.get(kind['items'].get('type', ''), 'path:scale')},…"
    return _KINDS.get(kind.get("type", ""), "") + _bounds(kind) + _short_form(name, words)


def _bounds(kind: Mapping[str, Any]) -> str:
    low, high = number(kind.get("minimum")), number(kind.get("maximum"))
    if low is None:
        return ""
    return f" from {low:g}" if high is None or high > 1e9 else f" from {low:g} to {high:,.0f}".replace(",", "")


def _short_form(name: str, words: tuple[str, ...]) -> str:
    if words:
        return f", or {', '.join(words)}"
    return ", as 24G" if name in BYTES else ", as 32k" if name in TOKENS else ""
