"""Which resource controllers a control group may use, and by which version of the interface (cgroups(7))."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.host.unified_hierarchy import unified_hierarchy

WANTED: Final = ("memory", "cpu", "io", "pids")
"""The controllers that carry out the servers' limits and count what they use."""
_FIRST_VERSION: Final = {"memory": "memory", "cpu": "cpu", "io": "blkio", "pids": "pids"}


@dataclass(frozen=True, slots=True)
class Controllers:
    """What there is for a control group."""

    available: tuple[str, ...]
    """Of those that are wanted."""
    is_unified: bool
    """Whether they are those of version 2, which alone has ``MemoryHigh=`` and limits for users' managers."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Of those that are wanted."""
        return tuple(name for name in WANTED if name not in self.available)


def controllers(control_group: str) -> Controllers | None:
    """The controllers that the control groups below ``control_group`` may use; ``None`` where the kernel hides it.

    ``control_group`` is what systemd calls it: a path below the hierarchy's root.
    """
    first = _first_version()
    if first is None:
        return None
    if first:
        return Controllers(tuple(name for name in WANTED if _FIRST_VERSION[name] in first), is_unified=False)
    root = unified_hierarchy()
    folder = root.folder_of(control_group or "/") if root else None
    try:
        listed = (folder / "cgroup.controllers").read_text().split() if folder else None
    except OSError:
        listed = None
    return None if listed is None else Controllers(tuple(name for name in WANTED if name in listed), is_unified=True)


def _first_version() -> frozenset[str] | None:
    """The controllers that are mounted as version 1, of /proc/self/mountinfo (proc(5))."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    mounts = (line.partition(" - ")[2] for line in lines)
    options = (mount.rpartition(" ")[2] for mount in mounts if mount.startswith("cgroup "))
    return frozenset(option for each in options for option in each.split(",")) & frozenset(_FIRST_VERSION.values())
