"""A unit as systemd describes it, in our own types.

The values are those of the interfaces ``org.freedesktop.systemd1.Unit`` and ``.Service`` (see
org.freedesktop.systemd1(5)). What systemd may add to its lists of states stays text; nothing here fails on a word
it does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NOT_SET: Final = 2**64 - 1
"""systemd's way to say "no value" in an unsigned 64-bit property."""

UNIT_PROPERTIES: Final = frozenset(
    {
        "ActiveEnterTimestamp",
        "ActiveState",
        "Description",
        "FragmentPath",
        "InactiveEnterTimestamp",
        "InvocationID",
        "Job",
        "LoadState",
        "NeedDaemonReload",
        "StateChangeTimestamp",
        "SubState",
    }
)
SERVICE_PROPERTIES: Final = frozenset(
    {
        "ControlGroup",
        "Environment",
        "ExecMainCode",
        "ExecMainExitTimestamp",
        "ExecMainStartTimestamp",
        "ExecMainStatus",
        "ExecStart",
        "MainPID",
        "NRestarts",
        "Result",
        "Slice",
    }
)

Properties = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class UnitStatus:
    """What systemd knows of one service unit.

    Timestamps are seconds since the epoch (UTC); ``None`` where the thing has not happened yet.
    """

    name: str
    description: str
    load_state: str
    active_state: str
    """``active``, ``reloading``, ``inactive``, ``failed``, ``activating``, ``deactivating`` or ``maintenance``."""
    sub_state: str
    result: str
    """``success``, or why the last run ended: ``exit-code``, ``signal``, ``oom-kill``, ``timeout``, …"""
    main_pid: int | None
    exec_main_code: int
    """How the main process ended, as in siginfo's ``si_code``: 0 not at all, 1 exited, 2 killed, 3 dumped."""
    exec_main_status: int | None
    """Exit status or signal number, after ``exec_main_code``; ``None`` while it has not ended."""
    n_restarts: int
    invocation_id: str
    """32 hexadecimal digits, new with every start; empty before the first."""
    control_group: str
    """Path of the unit's cgroup below the hierarchy's root; empty while it has none."""
    fragment_path: str
    slice: str
    active_enter_timestamp: float | None
    inactive_enter_timestamp: float | None
    exec_main_start_timestamp: float | None
    exec_main_exit_timestamp: float | None
    state_change_timestamp: float | None
    argv: tuple[str, ...]
    environment: tuple[str, ...]
    job_id: int | None
    """The job that is queued for the unit now."""
    need_daemon_reload: bool


@dataclass(frozen=True, slots=True)
class UnitChange:
    """One unit before and after; ``before`` is ``None`` for a new one, ``after`` for one that systemd unloaded."""

    name: str
    before: UnitStatus | None
    after: UnitStatus | None


@dataclass(frozen=True, slots=True)
class Accounting:
    """What a unit's processes use now; ``None`` where systemd has no figure (no such controller, no such version)."""

    memory_current: int | None
    """Bytes, page cache of mapped weights included."""
    memory_peak: int | None
    cpu_usage_nsec: int | None
    tasks_current: int | None


def unit_status(name: str, unit: Properties, service: Properties) -> UnitStatus:
    """Return the status that the properties of both interfaces describe. Missing ones read as "not set"."""
    code = _number(service, "ExecMainCode")
    return UnitStatus(
        name=name,
        description=_text(unit, "Description"),
        load_state=_text(unit, "LoadState"),
        active_state=_text(unit, "ActiveState"),
        sub_state=_text(unit, "SubState"),
        result=_text(service, "Result"),
        main_pid=_number(service, "MainPID") or None,
        exec_main_code=code,
        exec_main_status=_number(service, "ExecMainStatus") if code else None,
        n_restarts=_number(service, "NRestarts"),
        invocation_id=_hex(unit.get("InvocationID")),
        control_group=_text(service, "ControlGroup"),
        fragment_path=_text(unit, "FragmentPath"),
        slice=_text(service, "Slice"),
        active_enter_timestamp=_seconds(unit, "ActiveEnterTimestamp"),
        inactive_enter_timestamp=_seconds(unit, "InactiveEnterTimestamp"),
        exec_main_start_timestamp=_seconds(service, "ExecMainStartTimestamp"),
        exec_main_exit_timestamp=_seconds(service, "ExecMainExitTimestamp"),
        state_change_timestamp=_seconds(unit, "StateChangeTimestamp"),
        argv=_argv(service.get("ExecStart")),
        environment=_texts(service.get("Environment")),
        job_id=_job(unit.get("Job")),
        need_daemon_reload=unit.get("NeedDaemonReload") is True,
    )


def figure(value: object) -> int | None:
    """Return an accounting figure, ``None`` for systemd's "not set"."""
    if not isinstance(value, int) or isinstance(value, bool) or value >= NOT_SET:
        return None
    return value


def unit_path(name: str) -> str:
    """Return the D-Bus object path of a unit (systemd escapes every byte outside [A-Za-z0-9] as ``_xx``)."""
    escaped = "".join(
        chr(byte) if chr(byte).isalnum() and byte < 128 and not (index == 0 and chr(byte).isdigit()) else f"_{byte:02x}"
        for index, byte in enumerate(name.encode())
    )
    return f"/org/freedesktop/systemd1/unit/{escaped}"


def _text(properties: Properties, key: str) -> str:
    value = properties.get(key)
    return value if isinstance(value, str) else ""


def _number(properties: Properties, key: str) -> int:
    value = properties.get(key)
    return value if isinstance(value, int) else 0


def _seconds(properties: Properties, key: str) -> float | None:
    microseconds = _number(properties, key)
    return microseconds / 1_000_000 if 0 < microseconds < NOT_SET else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _hex(value: object) -> str:
    return value.hex() if isinstance(value, bytes) and any(value) else ""


def _argv(value: object) -> tuple[str, ...]:
    # a(sasbttttuii): path, argv, ignore failure, times, pid, code, status
    if not isinstance(value, list) or not value or not isinstance(value[0], list) or len(value[0]) < 2:
        return ()
    return _texts(value[0][1])


def _job(value: object) -> int | None:
    if isinstance(value, list) and value and isinstance(value[0], int):
        return value[0] or None
    return None
