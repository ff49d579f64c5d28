"""``agent.toml``: what it sets, and on which line."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from magi_agent.errors import ConfigurationError
from magi_agent.runtime_settings.defaults import RuntimeDefaults
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.settings.settings import DEFAULTS_SECTION
from magi_agent.settings.table import SETTINGS, Setting
from magi_agent.vocabulary import Tier

_MAX_CONFIG_BYTES: Final = 1 << 20


def short(raw: object) -> str:
    """A value as it is shown in a message."""
    text = repr(raw)
    return text if len(text) <= 200 else f"{text[:197]}..."


def read_config(path: Path, *, required: bool) -> str:
    """The text of the file, empty where none is and none ``required``. Raises ``ConfigurationError``."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise ConfigurationError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes, which no configuration is")
        return data.decode()
    except FileNotFoundError:
        if required:
            raise ConfigurationError(f"{path}: no such file; name another with --config or MAGI_CONFIG") from None
        return ""
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not UTF-8 text") from None


def parse_config(path: Path, text: str) -> tuple[dict[str, object], RuntimeDefaults]:
    """The values in the file, by setting name, and the runtime defaults. Raises ``ConfigurationError``."""
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise ConfigurationError(f"{path}: is nested too deeply to be a configuration") from None
    except ValueError as error:
        message = str(error)
        place = re.search(r" \(at line (\d+), column \d+\)$", message)
        where = f"{path}:{place[1]}" if place else str(path)
        raise ConfigurationError(f"{where}: is not TOML: {message[: place.start()] if place else message}") from None
    known: dict[str, dict[str, Setting]] = {}
    for setting in SETTINGS:
        known.setdefault(setting.section, {})[setting.name] = setting
    found: dict[str, object] = {}
    defaults = RuntimeDefaults()
    for section, entries in document.items():
        place_of_section = place_of(path, text, section, None)
        if section not in known and section != DEFAULTS_SECTION:
            raise ConfigurationError(
                f"{place_of_section}: {_name(section)}: unknown section; there are "
                f"{', '.join((*known, DEFAULTS_SECTION))}"
            )
        if not isinstance(entries, dict):
            raise ConfigurationError(f"{place_of_section}: {section}: must be a section, [{section}]")
        if section == DEFAULTS_SECTION:
            defaults = _parse_defaults(path, text, entries)
            continue
        for key, value in entries.items():
            if key not in known[section]:
                raise ConfigurationError(
                    f"{place_of(path, text, section, key)}: {section}.{_name(key)}: unknown key; "
                    f"[{section}] has {', '.join(known[section])}"
                )
            found[key] = value
    return found, defaults


def _parse_defaults(path: Path, text: str, entries: Mapping[str, object]) -> RuntimeDefaults:
    from magi_agent.runtime_settings.reading import InvalidRuntimeSettings, read_settings

    def read(prefix: str, settings: object) -> RuntimeSettings:
        try:
            return read_settings(settings)
        except InvalidRuntimeSettings as error:
            fault = error.faults[0]
            name = f"{prefix}{fault.name}".rstrip(".")
            place = _place_of_default(path, text, prefix, fault.name)
            raise ConfigurationError(f"{place}: {DEFAULTS_SECTION}.{name}: {fault.message}") from None

    tiers = {Tier(key): read(f"{key}.", entry) for key, entry in entries.items() if key in list(Tier)}
    return RuntimeDefaults(read("", {key: entry for key, entry in entries.items() if key not in list(Tier)}), tiers)


def _place_of_default(path: Path, text: str, prefix: str, name: str) -> str:
    """Where a default stands: its own line, else that of the list or table it is in."""
    from magi_agent.runtime_settings.settings import wire_name

    outer = name.partition(".")[0]
    for key in (outer, wire_name(outer), ""):
        place = place_of(path, text, DEFAULTS_SECTION, f"{prefix}{key}".rstrip("."))
        if place != place_of(path, text, DEFAULTS_SECTION, None):
            return place
    return place


def _name(key: str) -> str:
    return key if key.isprintable() and key else short(key)


def place_of(path: Path, text: str, section: str, key: str | None) -> str:
    """Where a key stands, as ``file:line``; tomllib does not tell, so the line is looked for."""
    current = ""
    line_of_section = 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            current = header[1].strip("\"'")
            full = current
        elif assignment := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            name = assignment[1].replace('"', "").replace("'", "")
            full = f"{current}.{name}" if current else name
        else:
            continue
        if key and full == f"{section}.{key}":
            return f"{path}:{number}"
        if full.partition(".")[0] == section and not line_of_section:
            line_of_section = number
    return f"{path}:{line_of_section}" if line_of_section else str(path)
