"""What a transient service shall be, as typed values.

A pure description: nothing here talks to systemd. ``properties.properties_of`` turns it into D-Bus properties.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Final

_UNIT_NAME: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+\.service")
_SLICE_NAME: Final = re.compile(r"[A-Za-z0-9:_.\\-]+\.slice")
_ENVIRONMENT_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIAL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,255}")
_DIRECTORY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_NOT_CREDENTIAL_PATH: Final = re.compile(r"[\s:'\"\\$%]")
"""What systemd up to 253 would not read in a credential's path as it wrote it."""
_LOG_FIELD_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_MAX_NAME: Final = 255
_LINE_BREAKERS: Final = re.compile(r"[\x00-\x1f\x7f]")


class Sandbox(StrEnum):
    """How tightly a unit is shut in. What each one means depends on the scope: see ``sandbox``."""

    NONE = "none"
    """Nothing but the user it runs as. For tests and for finding out what a sandbox breaks."""
    CPU = "cpu"
    """No devices, no code made at run time."""
    GPU = "gpu"
    """GPU devices by class; code may be made at run time, which CUDA, ROCm and Vulkan do."""


class Restart(StrEnum):
    """When systemd starts the program again."""

    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class KillMode(StrEnum):
    """Which processes of the unit a stop reaches, and how."""

    CONTROL_GROUP = "control-group"
    MIXED = "mixed"
    """SIGTERM to the main process, SIGKILL to all that is left."""


class NumaPolicy(StrEnum):
    """How memory is spread over NUMA nodes (systemd.exec(5), ``NUMAPolicy=``), in the order of their numbers."""

    DEFAULT = "default"
    PREFERRED = "preferred"
    BIND = "bind"
    INTERLEAVE = "interleave"
    LOCAL = "local"


class OomPolicy(StrEnum):
    """What becomes of the unit when the kernel kills one of its processes for memory."""

    CONTINUE = "continue"
    STOP = "stop"
    KILL = "kill"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransientService:
    """A service unit to be created and started at once.

    Times are seconds, sizes bytes; ``None`` leaves a thing to systemd's default. Everything that can hold odd
    characters (paths, names, JSON) belongs into ``environment``: systemd 252 writes a transient unit down and reads it
    again at a daemon-reload, and ``$`` and ``;`` in a command line do not come back as they were.
    """

    name: str
    description: str
    argv: tuple[str, ...]
    """The program's absolute path, then its arguments."""
    environment: Mapping[str, str] = field(default_factory=dict)
    environment_files: tuple[PurePosixPath, ...] = ()
    """Files of ``KEY=value`` lines, read by systemd at each start; for secrets, as ``environment`` is public."""
    load_credentials: Mapping[str, PurePosixPath] = field(default_factory=dict)
    """Files, by the credential's name, that systemd reads at each start and hands to the unit's user alone."""
    slice: str | None = None
    syslog_identifier: str | None = None
    log_extra_fields: Mapping[str, str] = field(default_factory=dict)
    """Journal fields added to each line the unit writes."""
    log_rate_limit_interval_sec: float | None = None
    """Seconds in which journald takes as many lines of the unit as the next says; of a system's unit only."""
    log_rate_limit_burst: int | None = None
    """0 for no limit."""
    oneshot: bool = False
    """Whether the start is done only when the program has ended; for what runs for a moment."""
    collect: bool = False
    """Whether the unit is forgotten when it ends, however that is."""
    standard_output: PurePosixPath | None = None
    """File that what the program prints is written to, instead of the journal."""

    restart: Restart = Restart.NO
    restart_sec: float = 1.0
    start_limit_interval_sec: float = 300.0
    start_limit_burst: int = 4
    timeout_start_sec: float = 30.0
    """Until the program has been executed; not until a model is loaded."""
    timeout_stop_sec: float = 20.0
    kill_mode: KillMode = KillMode.MIXED
    oom_policy: OomPolicy = OomPolicy.STOP

    user: str | None = None
    supplementary_groups: tuple[str, ...] = ()
    dynamic_user: bool = False
    working_directory: PurePosixPath | None = None
    runtime_directory: str | None = None
    """Folder below the manager's own (/run, ``XDG_RUNTIME_DIR``), for the unit's user while the unit runs."""
    runtime_directory_mode: int = 0o755
    cache_directories: tuple[str, ...] = ()
    """Folders below the manager's own (/var/cache, ``XDG_CACHE_HOME``), for the unit's user alone. They outlive the
    unit, and a sandbox hides none of them from it."""
    umask: int = 0o077
    """Of a unit in a sandbox."""
    requires_mounts_for: tuple[PurePosixPath, ...] = ()
    wants: tuple[str, ...] = ()
    """Units that are started before this one; one that is not there, or fails, does not matter."""
    log_level_max: int | None = None
    """Of what the unit and systemd itself say of it, only this much is logged: syslog(3)'s levels, 0 the gravest."""
    read_only_paths: tuple[PurePosixPath, ...] = ()
    """Folders the unit must see although its sandbox hides or replaces what is above them."""
    hidden_folders: tuple[PurePosixPath, ...] = ()
    """Folders that the unit finds empty, but for what ``read_only_paths`` shows of them."""
    sandbox: Sandbox = Sandbox.GPU

    memory_high: int | None = None
    memory_max: int | None = None
    memory_swap_max: int | None = None
    cpu_quota: float | None = None
    """CPUs' worth of time: 2.5 is two and a half CPUs."""
    cpu_weight: int | None = None
    cpu_affinity: tuple[int, ...] = ()
    """Numbers of the CPUs that may be used; all where empty."""
    io_weight: int | None = None
    io_read_bandwidth_max: tuple[PurePosixPath, int] | None = None
    """A path, and the bytes a second that may be read from the disk it lies on."""
    numa_policy: NumaPolicy | None = None
    numa_nodes: tuple[int, ...] = ()
    tasks_max: int | None = None
    nice: int | None = None
    oom_score_adjust: int | None = None

    def __post_init__(self) -> None:
        for unit in (self.name, *self.wants):
            _check_unit_name(unit)
        if self.slice is not None and not _SLICE_NAME.fullmatch(self.slice):
            raise ValueError(f"{self.slice!r} is no name for a slice")
        _check_argv(self.argv)
        for key, value in self.environment.items():
            if not _ENVIRONMENT_NAME.fullmatch(key):
                raise ValueError(f"{key!r} is no name for an environment variable")
            _check_line(f"the environment variable {key}", value.replace("\t", " "))
        for key, value in self.log_extra_fields.items():
            if not _LOG_FIELD_NAME.fullmatch(key):
                raise ValueError(f"{key!r} is no name for a journal field")
            _check_line(f"the journal field {key}", value)
        for key, path in self.load_credentials.items():
            _check_credential(key, path)
        if self.runtime_directory is not None:
            _check_directory("runtime", self.runtime_directory)
        for name in self.cache_directories:
            _check_directory("cache", name)
        _check_line("the description", self.description)
        _check_line("the syslog identifier", self.syslog_identifier or "")
        folders = (
            self.working_directory,
            self.standard_output,
            self.io_read_bandwidth_max[0] if self.io_read_bandwidth_max else None,
            *self.requires_mounts_for,
            *self.read_only_paths,
            *self.hidden_folders,
            *self.environment_files,
            *self.load_credentials.values(),
        )
        for folder in folders:
            if folder is not None:
                _check_folder(folder)


def _check_unit_name(name: str) -> None:
    if not _UNIT_NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise ValueError(f"{name!r} is no name for a service unit")


def _check_argv(argv: tuple[str, ...]) -> None:
    if not argv or not argv[0].startswith("/"):
        raise ValueError("argv begins with the program's absolute path")
    for argument in argv:
        _check_line("an argument", argument)
        if "$" in argument or ";" in argument:
            raise ValueError(f"{argument!r}: systemd may change '$' and ';' in arguments; use the environment")


def _check_directory(kind: str, name: str) -> None:
    if not _DIRECTORY.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a {kind} directory")


def _check_credential(name: str, path: PurePosixPath) -> None:
    if not _CREDENTIAL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a credential")
    if _NOT_CREDENTIAL_PATH.search(str(path)):
        raise ValueError(f"systemd cannot read a credential from {str(path)!r}, for the characters in it")


def _check_line(what: str, text: str) -> None:
    if _LINE_BREAKERS.search(text):
        raise ValueError(f"{what} holds a control character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid UTF-8") from error


def _check_folder(folder: PurePosixPath) -> None:
    _check_line("a path", str(folder))
    if not folder.is_absolute() or ".." in folder.parts:
        raise ValueError(f"{str(folder)!r} is no absolute path without '..'")
