"""What a server's unit uses, from the files of its control group.

Files and their meaning: https://docs.kernel.org/admin-guide/cgroup-v2.html, "Interface Files" of each controller.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MICROSECONDS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class UnitUsage:
    """Figures of one control group; ``None`` for what the kernel does not count there. Sizes are bytes."""

    memory: int | None = None
    """All that is charged to it, page cache of mapped weights included."""
    memory_anonymous: int | None = None
    memory_mapped: int | None = None
    """Files that its processes have mapped: the weights."""
    memory_high: int | None = None
    memory_max: int | None = None
    """The limits; ``None`` for no limit too."""
    cpu_seconds: float | None = None
    io_read: int | None = None
    io_written: int | None = None
    oom_kills: int | None = None
    """Processes of this run that the kernel killed since memory ran out."""
    tasks: int | None = None


def read_usage(folder: Path) -> UnitUsage:
    """What the files of a version 2 control group say; nothing at all of one that is gone."""
    stat = _pairs(folder / "memory.stat")
    used = _pairs(folder / "cpu.stat").get("usage_usec")
    disks = list(_disks(folder / "io.stat"))
    return UnitUsage(
        memory=_number(folder / "memory.current"),
        memory_anonymous=stat.get("anon"),
        memory_mapped=stat.get("file_mapped"),
        memory_high=_number(folder / "memory.high"),
        memory_max=_number(folder / "memory.max"),
        cpu_seconds=None if used is None else used / _MICROSECONDS,
        io_read=sum(disk.get("rbytes", 0) for disk in disks) if (folder / "io.stat").exists() else None,
        io_written=sum(disk.get("wbytes", 0) for disk in disks) if (folder / "io.stat").exists() else None,
        oom_kills=_pairs(folder / "memory.events").get("oom_kill"),
        tasks=_number(folder / "pids.current"),
    )


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _pairs(path: Path) -> dict[str, int]:
    """A file with a word and a number on each line."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _disks(path: Path) -> Iterator[dict[str, int]]:
    """A file with a device and ``word=number`` on each line."""
    for line in _text(path).splitlines():
        words = (word.partition("=") for word in line.split()[1:])
        yield {name: int(value) for name, _, value in words if value.isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
