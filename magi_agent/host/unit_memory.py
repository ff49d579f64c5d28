"""What the processes of a unit use of the host's memory.

Of a control group of version 2, ``memory.stat`` tells (kernel's cgroup-v2.rst): ``anon``, and ``file_mapped``, which
counts a file's pages only for the group that brought them in. Elsewhere ``/proc/PID/status`` does (proc(5)), for a
process that may be seen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from magi_agent.host.unified_hierarchy import unified_hierarchy

_KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes in use."""

    anonymous: int
    mapped: int
    """Pages of files that are mapped: model files, programs, libraries."""
    source: Literal["control group", "process"]
    """What told it: ``control group`` or ``process``."""


def unit_memory(control_group: str, main_pid: int | None) -> UnitMemory | None:
    """What a unit uses; ``None`` where neither its control group nor its process tells. Blocks a little."""
    return _of_control_group(control_group) or (_of_process(main_pid) if main_pid else None)


def mapped_by(pid: int) -> int:
    """Bytes of files that a process has mapped and that are in memory, whoever brought them in; 0 where it is gone."""
    seen = _of_process(pid)
    return seen.mapped if seen else 0


def _of_control_group(control_group: str) -> UnitMemory | None:
    root = unified_hierarchy()
    folder = root.folder_of(control_group) if root and control_group else None
    if folder is None:
        return None
    figures = _figures(folder / "memory.stat", "")
    if "anon" not in figures:
        return None
    return UnitMemory(figures["anon"], figures.get("file_mapped", 0), "control group")


def _of_process(pid: int) -> UnitMemory | None:
    figures = _figures(Path("/proc") / str(pid) / "status", ":")
    if "RssAnon" not in figures:
        return None
    return UnitMemory(figures["RssAnon"] * _KIB, figures.get("RssFile", 0) * _KIB, "process")


def _figures(path: Path, after_name: str) -> dict[str, int]:
    """The lines ``name number …`` of a file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {
        each[0].removesuffix(after_name) if after_name else each[0]: int(each[1])
        for each in words
        if len(each) > 1 and each[1].isdecimal()
    }
