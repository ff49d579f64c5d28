"""What an import found: for each model its settings, what became of each thing that stood there, and what did not."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from magi_agent.runtime_settings.settings import RuntimeSettings

MAX_IMPORT_BYTES: Final = 1 << 20
"""Longest text that is read; YAML takes a second for each megabyte."""
MAX_IMPORTED_MODELS: Final = 2000
HIDDEN: Final = "(hidden)"
_MAX_SHOWN: Final = 160
_URL_CREDENTIALS: Final = re.compile(r"(?<=://)[^/\s]*@")
_URL_QUERY: Final = re.compile(r"(://[^\s?#]*+[?#]?)(\S*)")
_ASSIGNMENT: Final = re.compile(r"(?<![\w.-])([A-Za-z_]\w*)=(?:'[^']*'|\"[^\"]*\"|\S)+")
_SECRET: Final = re.compile(
    r"passw|passphrase|secret|apikey|credential|(?:^|[-_])(?:auth|key|token|pat|pwd)(?:$|[-_])", re.IGNORECASE
)


class Origin(StrEnum):
    """What a text was written for."""

    COMMAND_LINE = "llama-server command line"
    LLAMA_SWAP = "llama-swap configuration"
    ROUTER_PRESET = "llama-server router preset"
    EXPORT = "export of this agent"


class InvalidImport(ValueError):
    """A text that cannot be read as what it seems to be; ``line`` counts from 1 where it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.reason = reason
        self.line = line


@dataclass(frozen=True, slots=True)
class Carried:
    """Something that was understood."""

    source: str
    """What stood there, secrets hidden."""
    became: str
    """What it became, such as "ctx_size = 8192", or why nothing needs to be done."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that was not carried over."""

    source: str
    """What stood there, secrets hidden."""
    reason: str
    """Why, and what a person can do."""


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """One model's part of an import."""

    name: str
    """What the other program calls it; the name of its file where it has no name of its own."""
    model_path: str | None
    """The model file as it stood there; only its name where its folder is not known here."""
    hf_repo: str | None = None
    """Where on Hugging Face it comes from, as ``user/repository``, ``…:quantization`` or ``…/file``."""
    settings: RuntimeSettings = field(default_factory=RuntimeSettings)
    suggested_flags: tuple[str, ...] = ()
    """Extra flags that stood there and that nobody has allowed yet; each is in ``left_out`` too."""
    carried: tuple[Carried, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def reference(self) -> str:
        """What tells which model of a registry is meant, for ``matching.match``."""
        return self.model_path or self.hf_repo or self.name


@dataclass(frozen=True, slots=True)
class Imported:
    """All that one text says."""

    origin: Origin
    models: tuple[ImportedModel, ...]
    left_out: tuple[LeftOut, ...] = ()
    """What belongs to no model."""


def is_secret(name: str) -> bool:
    """Whether an option or a variable that nobody knows is called like something that nobody may see."""
    return _SECRET.search(name) is not None


def shown(text: str) -> str:
    """``text`` as a report shows it: one line, not endless, without secrets of variables and behind URLs."""
    text = _URL_QUERY.sub(lambda url: f"{url[1]}…" if url[2] else url[1], _URL_CREDENTIALS.sub("", text))
    text = _ASSIGNMENT.sub(lambda said: f"{said[1]}={HIDDEN}" if is_secret(said[1]) else said[0], text)
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 1]}…"
