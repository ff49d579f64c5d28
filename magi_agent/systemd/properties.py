"""From a description of a service to the properties that ``StartTransientUnit`` takes.

Names and signatures are those of systemd's D-Bus interface (org.freedesktop.systemd1(5)), which are not always the
names in unit files: times end in ``USec`` and are microseconds.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from magi_agent.systemd.sandbox import sandbox_entries
from magi_agent.systemd.transient import NumaPolicy, Sandbox, TransientService
from magi_agent.vocabulary import Scope

_RECURSIVE: Final = 0x4000
"""``MS_REC`` of mount(2): a bind mount takes the mounts below it along."""

_PRIVATE: Final = 0o700

_OF_EVERYBODY: Final = ("/tmp", "/var/tmp")  # noqa: S108  # nothing is put there
HIDDEN: Final[Mapping[Scope, frozenset[PurePosixPath]]] = {
    Scope.SYSTEM: frozenset(map(PurePosixPath, (*_OF_EVERYBODY, "/home", "/root", "/run/user"))),
    Scope.USER: frozenset(map(PurePosixPath, _OF_EVERYBODY)),
}
"""What a sandbox replaces by an empty folder (``PrivateTmp``, ``ProtectHome=tmpfs``)."""

NOT_BINDABLE: Final = re.compile(r"[\s:'\"\\]")
"""What a path that systemd up to 253 is to mount must not have in it, as it writes paths down without quotes."""

SIGNATURES: Final[Mapping[str, str]] = {
    "After": "as",
    "AmbientCapabilities": "t",
    "BindReadOnlyPaths": "a(ssbt)",
    "CPUAccounting": "b",
    "CPUAffinity": "ay",
    "CPUQuotaPerSecUSec": "t",
    "CPUWeight": "t",
    "CacheDirectory": "as",
    "CacheDirectoryMode": "u",
    "CapabilityBoundingSet": "t",
    "CollectMode": "s",
    "Description": "s",
    "DeviceAllow": "a(ss)",
    "DevicePolicy": "s",
    "DynamicUser": "b",
    "Environment": "as",
    "EnvironmentFiles": "a(sb)",
    "ExecStart": "a(sasb)",
    "IOReadBandwidthMax": "a(st)",
    "IOWeight": "t",
    "KeyringMode": "s",
    "KillMode": "s",
    "LoadCredential": "a(ss)",
    "LockPersonality": "b",
    "LogExtraFields": "aay",
    "LogLevelMax": "i",
    "LogRateLimitBurst": "u",
    "LogRateLimitIntervalUSec": "t",
    "MemoryAccounting": "b",
    "MemoryDenyWriteExecute": "b",
    "MemoryHigh": "t",
    "MemoryMax": "t",
    "MemorySwapMax": "t",
    "NUMAMask": "ay",
    "NUMAPolicy": "i",
    "Nice": "i",
    "NoNewPrivileges": "b",
    "OOMPolicy": "s",
    "OOMScoreAdjust": "i",
    "PrivateDevices": "b",
    "PrivateTmp": "b",
    "PrivateUsers": "b",
    "ProtectClock": "b",
    "ProtectControlGroups": "b",
    "ProtectHome": "s",
    "ProtectHostname": "b",
    "ProtectKernelLogs": "b",
    "ProtectKernelModules": "b",
    "ProtectKernelTunables": "b",
    "ProtectProc": "s",
    "ProtectSystem": "s",
    "RemoveIPC": "b",
    "RequiresMountsFor": "as",
    "Restart": "s",
    "RestartUSec": "t",
    "RestrictAddressFamilies": "(bas)",
    "RestrictNamespaces": "t",
    "RestrictRealtime": "b",
    "RestrictSUIDSGID": "b",
    "RuntimeDirectory": "as",
    "RuntimeDirectoryMode": "u",
    "Slice": "s",
    "StandardOutputFileToTruncate": "s",
    "StartLimitBurst": "u",
    "StartLimitIntervalUSec": "t",
    "SupplementaryGroups": "as",
    "SyslogIdentifier": "s",
    "SystemCallArchitectures": "as",
    "SystemCallErrorNumber": "i",
    "SystemCallFilter": "(bas)",
    "TasksAccounting": "b",
    "TasksMax": "t",
    "TemporaryFileSystem": "a(ss)",
    "TimeoutStartUSec": "t",
    "TimeoutStopUSec": "t",
    "Type": "s",
    "UMask": "u",
    "User": "s",
    "Wants": "as",
    "WorkingDirectory": "s",
}


@dataclass(frozen=True, slots=True)
class Property:
    """One property for ``StartTransientUnit``, with its D-Bus signature."""

    name: str
    signature: str
    value: object


def properties_of(unit: TransientService, *, scope: Scope, systemd_version: int) -> tuple[Property, ...]:
    """Return the properties that make ``unit`` on a manager of this scope and version.

    Raises ``ValueError`` for what such a manager cannot do: another user than its own in the user scope.
    """
    if scope is Scope.USER and (unit.user or unit.dynamic_user or unit.supplementary_groups):
        raise ValueError("a user's systemd manager runs services as that user only")
    pairs = [*_program(unit), *_belonging(unit), *_lifetime(unit), *_limits(unit)]
    pairs += [(entry.name, entry.value) for entry in sandbox_entries(unit.sandbox, scope, systemd_version)]
    if unit.sandbox is not Sandbox.NONE:
        # Not in the tables: what the servers' drop-in says wins over what is said here, and this depends on the unit.
        pairs.append(("UMask", unit.umask))
        hidden = HIDDEN[scope].union(unit.hidden_folders)
        if unit.hidden_folders:
            pairs.append(("TemporaryFileSystem", [(str(folder), "ro") for folder in unit.hidden_folders]))
        shown = sorted({_shown_by(folder, hidden) for folder in unit.read_only_paths if _is_hidden(folder, hidden)})
        if shown:
            # One that is not there, as the folder of a disk that is not mounted, is passed over: the unit is to start.
            pairs.append(("BindReadOnlyPaths", [(str(folder), str(folder), True, _RECURSIVE) for folder in shown]))
    return tuple(Property(name, SIGNATURES[name], value) for name, value in pairs)


def _program(unit: TransientService) -> Iterator[tuple[str, object]]:
    yield "Description", unit.description
    # The job then fails when the program cannot be executed; with "simple" it would succeed.
    yield "Type", "oneshot" if unit.oneshot else "exec"
    # Not ExecStartEx: up to systemd 253 a daemon-reload loses it.
    yield "ExecStart", [(unit.argv[0], list(unit.argv), False)]
    if unit.environment:
        yield "Environment", [f"{key}={value}" for key, value in unit.environment.items()]
    if unit.environment_files:
        yield "EnvironmentFiles", [(str(file), False) for file in unit.environment_files]
    if unit.load_credentials:
        yield "LoadCredential", [(name, str(file)) for name, file in unit.load_credentials.items()]
    if unit.runtime_directory is not None:
        yield "RuntimeDirectory", [unit.runtime_directory]
        yield "RuntimeDirectoryMode", unit.runtime_directory_mode
    if unit.cache_directories:
        yield "CacheDirectory", list(unit.cache_directories)
        yield "CacheDirectoryMode", _PRIVATE
    if unit.working_directory is not None:
        yield "WorkingDirectory", str(unit.working_directory)
    if unit.wants:
        yield "Wants", list(unit.wants)
        yield "After", list(unit.wants)
    if unit.requires_mounts_for:
        yield "RequiresMountsFor", [str(folder) for folder in unit.requires_mounts_for]


def _belonging(unit: TransientService) -> Iterator[tuple[str, object]]:
    if unit.slice is not None:
        yield "Slice", unit.slice
    if unit.collect:
        yield "CollectMode", "inactive-or-failed"
    if unit.standard_output is not None:
        yield "StandardOutputFileToTruncate", str(unit.standard_output)
    if unit.syslog_identifier is not None:
        yield "SyslogIdentifier", unit.syslog_identifier
    if unit.log_level_max is not None:
        yield "LogLevelMax", unit.log_level_max
    if unit.log_extra_fields:
        yield "LogExtraFields", [f"{key}={value}".encode() for key, value in unit.log_extra_fields.items()]
    if unit.log_rate_limit_interval_sec is not None:
        yield "LogRateLimitIntervalUSec", _microseconds(unit.log_rate_limit_interval_sec)
    if unit.log_rate_limit_burst is not None:
        yield "LogRateLimitBurst", unit.log_rate_limit_burst
    if unit.user is not None:
        yield "User", unit.user
    if unit.dynamic_user:
        yield "DynamicUser", True
    if unit.supplementary_groups:
        yield "SupplementaryGroups", list(unit.supplementary_groups)


def _lifetime(unit: TransientService) -> Iterator[tuple[str, object]]:
    yield "Restart", unit.restart.value
    yield "RestartUSec", _microseconds(unit.restart_sec)
    yield "StartLimitIntervalUSec", _microseconds(unit.start_limit_interval_sec)
    yield "StartLimitBurst", unit.start_limit_burst
    yield "TimeoutStartUSec", _microseconds(unit.timeout_start_sec)
    yield "TimeoutStopUSec", _microseconds(unit.timeout_stop_sec)
    yield "KillMode", unit.kill_mode.value
    yield "OOMPolicy", unit.oom_policy.value


def _limits(unit: TransientService) -> Iterator[tuple[str, object]]:
    yield "CPUAccounting", True
    yield "MemoryAccounting", True
    yield "TasksAccounting", True
    limits = {
        "MemoryHigh": unit.memory_high,
        "MemoryMax": unit.memory_max,
        "MemorySwapMax": unit.memory_swap_max,
        "CPUQuotaPerSecUSec": None if unit.cpu_quota is None else _microseconds(unit.cpu_quota),
        "CPUWeight": unit.cpu_weight,
        "IOWeight": unit.io_weight,
        "TasksMax": unit.tasks_max,
        "Nice": unit.nice,
        "OOMScoreAdjust": unit.oom_score_adjust,
    }
    for name, value in limits.items():
        if value is not None:
            yield name, value
    if unit.cpu_affinity:
        yield "CPUAffinity", _bit_mask(unit.cpu_affinity)
    if unit.io_read_bandwidth_max:
        path, rate = unit.io_read_bandwidth_max
        yield "IOReadBandwidthMax", [(str(path), rate)]
    if unit.numa_policy is not None:
        yield "NUMAPolicy", list(NumaPolicy).index(unit.numa_policy)
        if unit.numa_nodes:
            yield "NUMAMask", _bit_mask(unit.numa_nodes)


def _is_hidden(folder: PurePosixPath, hidden: Collection[PurePosixPath]) -> bool:
    return any(folder.is_relative_to(top) for top in hidden)


def _shown_by(folder: PurePosixPath, hidden: Collection[PurePosixPath]) -> PurePosixPath:
    """Return the folder to bind so that ``folder`` can be seen: itself, or the first one above it that can be bound.

    systemd 252 writes bind mounts down without quotes, so with some characters in the path the unit fails, or runs
    without its model, at the first automatic restart after a daemon-reload.
    """
    top = folder
    for candidate in (folder, *folder.parents):
        if candidate in hidden or candidate.parent == PurePosixPath("/"):
            top = candidate
            break
        if not NOT_BINDABLE.search(str(candidate)):
            return candidate
    raise ValueError(
        f"systemd cannot show {str(folder)!r} to a sandboxed unit: a folder right below {top} "
        "has a space, a colon, a quote or a backslash in its name; rename it, or use another place"
    )


def _bit_mask(numbers: Iterable[int]) -> bytes:
    """Numbers as systemd passes sets of them: bit ``n`` of a little-endian string of bytes."""
    mask = sum(1 << number for number in set(numbers))
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
