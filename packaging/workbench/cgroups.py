"""A cgroup of our own in every hierarchy systemd uses: made, entered, emptied and removed.

Works with pure version 2, with systemd's named version 1 hierarchy and with both ("hybrid"), with or without
systemd as PID 1, and below whatever cgroup the caller is in. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PREFIX = "magi-private-"
_POLL_SECONDS = 0.01


class CgroupError(Exception):
    """No cgroup can be made here; the text says why."""


@dataclass(frozen=True, slots=True)
class Group:
    """One cgroup, as its folder in each hierarchy."""

    folders: tuple[Path, ...]

    def child(self, path: str) -> Group:
        """Make (or find) a cgroup below this one. Raises OSError."""
        below = Group(tuple(folder / path for folder in self.folders))
        for folder in below.folders:
            folder.mkdir(parents=True, exist_ok=True)
        return below

    def enter(self) -> None:
        """Move the calling process here. Raises OSError."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text("0")

    def remove(self, wait_seconds: float) -> bool:
        """Kill every process in it, however deep, and remove it; False if something is left after the wait."""
        deadline = time.monotonic() + wait_seconds
        while True:
            for folder in self.folders:
                _kill_all(folder)
                _try_to_remove(folder)
            if not any(folder.exists() for folder in self.folders):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)


def create() -> Group:
    """Make a new cgroup below the caller's own, and clear away what dead callers left there.

    Raises CgroupError where there is no usable hierarchy or the caller may not write to it.
    """
    own = _own_folders()
    if not own:
        raise CgroupError("no cgroup hierarchy that systemd can use is mounted (version 2, or version 1 name=systemd)")
    for folder in own:
        _sweep(folder)
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        return Group(own).child(name)
    except OSError as error:
        raise CgroupError(f"cannot make the cgroup {name}: {error}") from error


def _own_folders() -> tuple[Path, ...]:
    """Return the folders of the caller's own cgroup, from /proc/self/cgroup and /proc/self/mountinfo (proc(5))."""
    paths: dict[str, PurePosixPath] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in {"", "name=systemd"}:
            paths[controllers] = PurePosixPath(path)
    folders: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mounted_on = before.split()[3:5]
        kind, _, options = after.split()[:3]
        hierarchy = {"cgroup2": "", "cgroup": "name=systemd"}.get(kind)
        if hierarchy not in paths or (hierarchy and hierarchy not in options.split(",")):
            continue
        # A container may see only a part of the hierarchy, named by the mount's root.
        with contextlib.suppress(ValueError):
            folders.setdefault(hierarchy, Path(mounted_on) / paths[hierarchy].relative_to(root))
    return tuple(folders.values())


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_PREFIX}*"):
        maker = left.name.removeprefix(_PREFIX).split("-")[0]
        if maker.isdecimal() and not Path("/proc", maker).exists():
            _try_to_remove(left)


def _processes(folder: Path) -> list[int]:
    found: list[int] = []
    for listing in (folder / "cgroup.procs", *folder.rglob("cgroup.procs")):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in listing.read_text().split()]
    # 0 stands for a process outside the reader's PID namespace.
    return [pid for pid in found if pid > 0]


def _kill_all(folder: Path) -> None:
    for pid in _processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _try_to_remove(folder: Path) -> None:
    deepest_first = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*deepest_first, folder):
        with contextlib.suppress(OSError):
            path.rmdir()
