"""A launch: all that decides how one model's server is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.runtime_settings.known_options import KnownOptions
from magi_agent.runtime_settings.settings import RuntimeSettings

SLICE: Final = "magi-llama.slice"
UNIT_PATTERN: Final = "magi-llama-*.service"
_PREFIX: Final = "magi-llama-"
_SUFFIX: Final = ".service"


@dataclass(frozen=True, slots=True)
class LaunchSpecification:
    """Typed and checked: a launcher turns it into a unit without asking anybody anything."""

    model_id: str
    display_name: str
    binary: Path
    model_path: str
    projector_path: str | None
    host: str
    port: int
    runtime_settings: RuntimeSettings
    readable_folders: tuple[Path, ...]
    """What the server's mount namespace shows it: the model folders."""
    user: str | None
    """Whom it runs as, in the system scope; ``None`` for a dynamic user."""
    stop_timeout: float
    """Seconds between SIGTERM and SIGKILL."""
    known_options: KnownOptions | None = None
    """What the binary knows; ``None`` where it was not asked."""
    binary_identity: str | None = None
    """Which file the binary is, so that a later one of the same path can be told from it."""


def unit_name(model_id: str) -> str:
    """The unit of a model's server."""
    return f"{_PREFIX}{model_id}{_SUFFIX}"


def model_id_of(unit: str) -> str:
    """The model whose server a unit is."""
    return unit.removeprefix(_PREFIX).removesuffix(_SUFFIX)
