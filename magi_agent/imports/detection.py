"""What a pasted text is, and reading it as that."""

import json
import re
from collections.abc import Collection
from typing import Final

from magi_agent.imports.command_line import read_command_line
from magi_agent.imports.imported import MAX_IMPORT_BYTES, Imported, InvalidImport, Origin
from magi_agent.imports.llama_swap import read_llama_swap
from magi_agent.imports.router_preset import read_router_preset

_OBJECT: Final = re.compile(r"\s*\{\s*(?:[\"}]|\Z)")
_UNIT: Final = re.compile(r"^[^\S\n]*\[(?:Unit|Service|Container)\][^\S\n]*$", re.MULTILINE)
_COMPOSE: Final = re.compile(r"^services\s*:", re.MULTILINE)
_SWAP: Final = re.compile(r"^[\"']?models[\"']?\s*:", re.MULTILINE)
_PRESET: Final = re.compile(
    r"^[^\S\n]*(?:\[[^\[\]\n]+\]|version[^\S\n]*=[^\S\n]*\S+)[^\S\n]*(?:[;#].*)?$", re.MULTILINE
)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def import_text(data: bytes | str) -> str:
    """``data`` as a text that can be imported. Raises ``InvalidImport`` for what is too long or no text."""
    if len(data) > MAX_IMPORT_BYTES:
        raise InvalidImport(f"it is longer than {MAX_IMPORT_BYTES} bytes")
    try:
        text = (data if isinstance(data, bytes) else data.encode()).decode("utf-8-sig")
    except UnicodeError:
        raise InvalidImport("it is not UTF-8 text") from None
    if control := _CONTROL.search(text):
        raise InvalidImport("it has control characters, and so is no text", text.count("\n", 0, control.start()) + 1)
    if not text.strip():
        raise InvalidImport("it is empty")
    return text


def origin_of(text: str) -> Origin:
    """What a text was written for; a command line where nothing else shows. Raises ``InvalidImport``."""
    begins_as_json = _OBJECT.match(text)
    if begins_as_json and (document := _json(text)) is not None:
        if "models" not in document:
            raise InvalidImport("it is JSON, and neither an export of this agent nor a llama-swap configuration")
        return Origin.EXPORT if "version" in document else Origin.LLAMA_SWAP
    if unit := _UNIT.search(text):
        raise InvalidImport(
            "it is a unit file: paste the command that stands behind ExecStart=", text.count("\n", 0, unit.end()) + 1
        )
    if _SWAP.search(text):
        return Origin.LLAMA_SWAP
    if _COMPOSE.search(text):
        raise InvalidImport("it is a compose file: paste the llama-server command of its service")
    if begins_as_json:
        raise InvalidImport("it begins as JSON, as an export does, and is none: is it whole?")
    return Origin.ROUTER_PRESET if _PRESET.search(text) else Origin.COMMAND_LINE


def read_import(data: bytes | str, allowed_flags: Collection[str] = ()) -> Imported:
    """What another program's configuration says, whichever program it is. Raises ``InvalidImport``.

    ``allowed_flags`` are those that may be extra flags; others are left out, and suggested.
    """
    text = import_text(data)
    match origin_of(text):
        case Origin.LLAMA_SWAP:
            return read_llama_swap(text, allowed_flags)
        case Origin.ROUTER_PRESET:
            return read_router_preset(text, allowed_flags)
        case Origin.COMMAND_LINE:
            return read_command_line(text, allowed_flags)
        case Origin.EXPORT:
            raise InvalidImport("it is an export of this agent, and is imported whole")


def _json(text: str) -> dict[str, object] | None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
