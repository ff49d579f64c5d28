"""The hierarchies of control groups, above all that of version 2, as this process sees them: cgroups(7)."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_MOST_SUBGROUPS: Final = 256
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where the version 2 hierarchy is mounted, and which part of it is seen there."""

    mounted_on: Path
    root: PurePosixPath

    def folder_of(self, control_group: str) -> Path | None:
        """Return the folder of a control group; ``None`` for one outside the part that is seen."""
        path = PurePosixPath(control_group)
        return self.mounted_on / path.relative_to(self.root) if path.is_relative_to(self.root) else None


def unified_hierarchy() -> Hierarchy | None:
    """Find the mount of the version 2 hierarchy in /proc/self/mountinfo (proc(5))."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            root, mounted_on = map(_unescaped, before.split(" ")[3:5])
            # A sandbox may have mounted something over it.
            if Path(mounted_on, "cgroup.procs").exists():
                return Hierarchy(Path(mounted_on), PurePosixPath(root))
    return None


def first_version_hierarchy(controller: str) -> Hierarchy | None:
    """Find the mount of a version 1 hierarchy with a controller; ``None`` where it is none of version 1."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup ") and controller in after.rpartition(" ")[2].split(","):
            root, mounted_on = map(_unescaped, before.split(" ")[3:5])
            return Hierarchy(Path(mounted_on), PurePosixPath(root))
    return None


def _unescaped(path: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), path)


def groups_of(control_group: str) -> Iterable[Path] | None:
    """Give the folders of a control group and of those below it, so many at most.

    ``control_group`` is what systemd calls it: a path below the hierarchy's root; empty for one that is gone, which has
    none. ``None`` where the hierarchy, or its part with this group, is not seen.
    """
    root = unified_hierarchy()
    if root is None:
        return None
    if not control_group:
        return ()
    folder = root.folder_of(control_group)
    return None if folder is None else _subgroups_of(folder)


def processes_in(control_group: str) -> frozenset[int]:
    """The processes of a control group and of those below it; none where they are not seen."""
    found: set[int] = set()
    for folder in groups_of(control_group) or ():
        with contextlib.suppress(OSError, ValueError):
            found.update(map(int, (folder / "cgroup.procs").read_text().split()))
    return frozenset(found)


def _subgroups_of(folder: Path) -> Iterator[Path]:
    groups = [folder]
    for group in groups:
        yield group
        with contextlib.suppress(OSError):
            if len(groups) < _MOST_SUBGROUPS:
                with os.scandir(group) as entries:
                    groups += [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
