"""The host's memory, and the limits of control groups that hold for the servers below them.

Files of control groups: the kernel's "Control Group v2", memory interface files, and "Memory Resource Controller" for
version 1. Pressure: https://docs.kernel.org/accounting/psi.html.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

from magi_agent.host.gpu_devices import Tree
from magi_agent.host.unified_hierarchy import Hierarchy, first_version_hierarchy, unified_hierarchy

_NO_LIMIT: Final = 1 << 62
"""Version 1 says "no limit" by the largest number of whole pages there is."""
_PRESSURE: Final = re.compile(r"^(some|full) avg10=(\d+\.\d+) avg60=(\d+\.\d+) avg300=(\d+\.\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SliceLimits:
    """One of systemd's slices as systemd has it, also while nothing is in it; sizes are bytes, ``None`` is no limit."""

    unit: str
    control_group: str
    memory_high: int | None
    memory_max: int | None


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One control group with a limit; sizes are bytes."""

    control_group: str
    unit: str
    """What systemd calls it; empty for the root of what is seen."""
    high: int | None
    """Beyond it processes are slowed down."""
    max: int | None
    """Beyond it processes are killed."""
    used: int | None
    """Anonymous memory and mapped files, what else is cached of files left out; ``None`` where that is not told."""

    @property
    def least(self) -> int:
        """The limit that is met first."""
        return min(limit for limit in (self.high, self.max) if limit is not None)

    @property
    def room(self) -> int:
        """What is left below it."""
        return max(0, self.least - (self.used or 0))


@dataclass(frozen=True, slots=True)
class Pressure:
    """How much of the time, in percent, some processes or all of them waited for memory."""

    some: tuple[float, float, float]
    """Over 10, 60 and 300 seconds."""
    full: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in bytes."""

    total: int
    available: int
    """Without swapping, as the kernel estimates it."""
    swap_total: int
    swap_free: int
    pressure: Pressure | None
    limits: tuple[MemoryLimit, ...]
    """Those that hold for the servers, the innermost first."""
    mapped: int = 0
    """Of what is available, pages of files that processes have mapped: they are in use, as the weights of a server."""

    @property
    def unused(self) -> int:
        """What is available and not in use."""
        return max(0, self.available - self.mapped)

    @property
    def binding(self) -> MemoryLimit | None:
        """The limit that leaves least, where it leaves less than the host has."""
        least = min(self.limits, key=lambda limit: limit.room, default=None)
        return least if least is not None and least.room < self.unused else None

    @property
    def room(self) -> int:
        """What servers may still take."""
        return self.binding.room if self.binding else self.unused


def host_memory(slices: Sequence[SliceLimits], control_group: str, tree: Tree) -> HostMemory:
    """The memory there is; reads files.

    ``slices`` are the servers' slice and those above it, and ``control_group`` is where their manager is: the limits
    of all groups above hold as well.
    """
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return HostMemory(
        total=memory.total,
        available=memory.available,
        swap_total=swap.total,
        swap_free=swap.free,
        pressure=pressure(tree),
        limits=tuple(limits(slices, control_group)),
        mapped=_mapped(tree),
    )


def _mapped(tree: Tree) -> int:
    """Bytes of mapped files that the kernel may drop: what is locked it does not call available (proc(5), meminfo)."""
    try:
        lines = (tree.proc / "meminfo").read_text().splitlines()
    except OSError:
        return 0
    words = (line.replace(":", " ").split() for line in lines)
    kibibytes = {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}
    files = kibibytes.get("Active(file)", 0) + kibibytes.get("Inactive(file)", 0)
    return max(0, min(kibibytes.get("Mapped", 0) - kibibytes.get("Mlocked", 0), files)) * 1024


def pressure(tree: Tree) -> Pressure | None:
    """What the kernel says of waiting for memory; ``None`` where it does not count."""
    try:
        text = (tree.proc / "pressure" / "memory").read_text()
    except OSError:
        return None
    found = {match[1]: (float(match[2]), float(match[3]), float(match[4])) for match in _PRESSURE.finditer(text)}
    return Pressure(found["some"], found["full"]) if found.keys() >= {"some", "full"} else None


def limits(
    slices: Sequence[SliceLimits],
    control_group: str,
    unified: Hierarchy | None = None,
    first: Hierarchy | None = None,
) -> Iterator[MemoryLimit]:
    """The limits that hold for a group below ``slices``, the innermost first, by this host's hierarchies or others."""
    if first is None and unified is None:
        first, unified = first_version_hierarchy("memory"), unified_hierarchy()
    hierarchy = first or unified
    told = {each.control_group: each for each in slices}
    inner = PurePosixPath(slices[0].control_group if slices else control_group or "/")
    for path in (inner, *inner.parents):
        group = str(path)
        folder = hierarchy.folder_of(group) if hierarchy else None
        high, most, used = _of_first(folder) if first else _of_unified(folder)
        said = told.get(group)
        # What systemd knows holds from the first process on, also where there is no folder yet.
        high = _least(high, said.memory_high if said else None)
        most = _least(most, said.memory_max if said else None)
        if high is not None or most is not None:
            yield MemoryLimit(group, said.unit if said else path.name, high, most, used)


def _of_unified(folder: Path | None) -> tuple[int | None, int | None, int | None]:
    if folder is None:
        return None, None, None
    current, stat = _number(folder / "memory.current"), _stat(folder / "memory.stat")
    return _number(folder / "memory.high"), _number(folder / "memory.max"), _used(current, stat, "file_mapped")


def _of_first(folder: Path | None) -> tuple[int | None, int | None, int | None]:
    if folder is None:
        return None, None, None
    limit = _number(folder / "memory.limit_in_bytes")
    current, stat = _number(folder / "memory.usage_in_bytes"), _stat(folder / "memory.stat")
    totals = {name.removeprefix("total_"): value for name, value in stat.items() if name.startswith("total_")}
    return None, None if limit is None or limit >= _NO_LIMIT else limit, _used(current, totals, "mapped_file")


def _used(current: int | None, stat: Mapping[str, int], mapped: str) -> int | None:
    """What is in use: all that is counted but files that nobody has mapped, which the kernel drops when it must."""
    if current is None:
        return None
    files = stat.get("active_file", 0) + stat.get("inactive_file", 0)
    return max(0, current - files + min(files, stat.get(mapped, 0)))


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _stat(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    except OSError:
        return {}
