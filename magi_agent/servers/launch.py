"""A launch: all that decides how one model's server is started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.runtime_settings.known_options import KnownOptions
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.memory_limits import MemoryLimits
from magi_agent.servers.reach import runtime_root
from magi_agent.settings.settings import Settings
from magi_agent.vocabulary import ServerAccess

SLICE: Final = "magi-llama.slice"
UNIT_PATTERN: Final = "magi-llama-*.service"
_PREFIX: Final = "magi-llama-"
_SUFFIX: Final = ".service"
NO_DEVICE: Final = ("none",)
"""In place of devices: no GPU at all, which is llama-server's word for it too."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of a server; all else that decides how it is started is the operator's configuration."""

    model_id: str
    display_name: str
    model_path: str
    projector_path: str | None
    """The one found with the model."""
    port: int
    runtime_settings: RuntimeSettings
    devices: tuple[str, ...] = ()
    """The GPUs that were chosen for it, by llama-server's names for them; see ``LaunchSpecification``."""
    is_fitted: bool = False
    """Whether nothing is left that llama-server could fit into memory by itself; see ``LaunchSpecification``."""


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
    log_rate_limit_interval: float = 30.0
    """Seconds in which journald takes as many lines of it as the next says."""
    log_rate_limit_burst: int = 1000
    """0 for no limit."""
    access: ServerAccess = ServerAccess.PORT
    runtime_root: Path = Path("/run")
    """Where the manager makes its units' folders; the server's socket, or its key, is below."""
    devices: tuple[str, ...] = ()
    """The GPUs that were chosen for it, by llama-server's names for them; empty leaves them to llama-server."""
    is_fitted: bool = False
    """Whether nothing is left that llama-server could make smaller to have it fit into memory (its ``--fit``).

    It would load the model's header and vocabulary once more to find that out, which takes as long as the start of a
    small model.
    """
    memory_limits: MemoryLimits | None = None
    """Those that hold, set ones among them; ``None`` for the set ones alone, with swap as systemd has it."""


def specification_of(
    wanted: Wanted, settings: Settings, known_options: KnownOptions | None, binary_identity: str | None
) -> LaunchSpecification:
    """How a server is started where ``settings`` is the configuration."""
    return LaunchSpecification(
        model_id=wanted.model_id,
        display_name=wanted.display_name,
        binary=settings.binary(wanted.runtime_settings.binary) or settings.llama_server_path,
        model_path=wanted.model_path,
        projector_path=wanted.projector_path,
        host=settings.llama_server_host,
        port=wanted.port,
        runtime_settings=wanted.runtime_settings,
        readable_folders=settings.model_scan_path,
        user=settings.llama_server_user or None,
        stop_timeout=settings.stop_timeout,
        known_options=known_options,
        binary_identity=binary_identity,
        log_rate_limit_interval=settings.log_rate_limit_interval,
        log_rate_limit_burst=settings.log_rate_limit_burst,
        access=settings.server_access,
        runtime_root=runtime_root(settings.systemd_scope),
        devices=wanted.devices,
        is_fitted=wanted.is_fitted,
    )


def unit_name(model_id: str) -> str:
    """The unit of a model's server."""
    return f"{_PREFIX}{model_id}{_SUFFIX}"


def model_id_of(unit: str) -> str:
    """The model whose server a unit is."""
    return unit.removeprefix(_PREFIX).removesuffix(_SUFFIX)
