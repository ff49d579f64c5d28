"""Processes that outlived SIGKILL: what systemd left in a unit's control group when it gave the unit up.

A process that waits in the kernel for something that never comes (a hung network file system, a GPU's driver) dies
only when that wait ends. systemd tries SIGTERM and SIGKILL, each of them twice, says then that the unit has failed, and
leaves the process where it is.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from magi_agent.host.unified_hierarchy import groups_of
from magi_agent.servers.failure import Failure

_MOST_NAMED: Final = 4
_MOST_LOOKED_AT: Final = 64


@dataclass(frozen=True, slots=True)
class Survivor:
    """One process, as far as the kernel tells this user of it: ``/proc`` may hide others' processes."""

    pid: int
    name: str | None = None
    state: str | None = None
    """One letter, as in ``ps``: D is a wait that no signal ends."""
    waits_in: str | None = None
    """The kernel's function that it waits in."""


def survived(control_group: str, proc: Path = Path("/proc")) -> Failure | None:
    """Say that processes are left in a control group that systemd has given up; ``None`` where none are.

    ``control_group`` is what systemd calls it. Reads a few files of the kernel's, and none that such a process could
    hold up.
    """
    pids = _processes_in(control_group)
    return _failure(tuple(_survivor(pid, proc) for pid in pids), len(pids)) if pids else None


def _processes_in(control_group: str) -> list[int]:
    pids: list[int] = []
    for folder in groups_of(control_group) or ():
        with contextlib.suppress(OSError, ValueError):
            pids += [int(line) for line in (folder / "cgroup.procs").read_text().split()]
        if len(pids) >= _MOST_LOOKED_AT:
            break
    return pids


def _survivor(pid: int, proc: Path) -> Survivor:
    name = state = waits_in = None
    # Not cmdline or maps, as ps would: who reads those of a process that waits so may come to wait as well.
    with contextlib.suppress(OSError):
        stat = (proc / str(pid) / "stat").read_text(errors="replace")
        name = stat[stat.find("(") + 1 : stat.rfind(")")]
        state = stat[stat.rfind(")") + 1 :].split()[0]
    with contextlib.suppress(OSError):
        # "0" where this user may not know, and for one that does not wait.
        waits_in = (proc / str(pid) / "wchan").read_text().strip().removeprefix("0") or None
    return Survivor(pid, name, state, waits_in)


def _failure(survivors: Sequence[Survivor], count: int) -> Failure:
    named = [_words(each) for each in survivors[:_MOST_NAMED] if each.pid]
    more = count - len(named)
    if more:
        named.append(f"{more} more" if named else f"{more} of its processes")
    them, pid = ("it", "process") if count == 1 else ("they", "processes")
    where = next((each.pid for each in survivors if each.pid), None)
    look = f"sudo cat /proc/{where}/stack; sudo dmesg" if where else "sudo dmesg"
    return Failure(
        at=datetime.now(UTC),
        result="stuck",
        message=f"it survived SIGKILL: {', '.join(named)} still there, and nothing is started in its place",
        advice=(
            f"no signal ends a process that waits in the kernel: find out what {them} wait{'s' if count == 1 else ''} "
            f"for ({look}) and mend that, most often a hung network file system or a GPU's driver, or reboot the host; "
            f"once the {pid} {'is' if count == 1 else 'are'} gone, the agent goes on by itself"
        ),
    )


def _words(survivor: Survivor) -> str:
    known = [
        survivor.name or "",
        f"state {survivor.state}" if survivor.state else "",
        f"in {survivor.waits_in}" if survivor.waits_in else "",
    ]
    said = ", ".join(part for part in known if part)
    return f"process {survivor.pid}{f' ({said})' if said else ''}"
