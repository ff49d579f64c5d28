"""Which file system a folder is on, and whether inotify hears of everything that happens there.

inotify tells of what passes through this kernel. On a network file system, and on one that another process serves
(FUSE), files change without it. Format of the table of mounts: proc_pid_mountinfo(5).
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.discovery.folders import is_within

MOUNTS_PATH: Final = Path("/proc/self/mountinfo")
"""The mounts this process sees. ``poll`` reports ``POLLPRI | POLLERR`` on it, opened, when they have changed."""
_CHANGED_BY_OTHERS: Final = frozenset(
    {
        "9p",
        "acfs",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "fuse",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "prl_fs",
        "pvfs2",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "vmhgfs",
        "wekafs",
    }
)
_MOST_LINKS: Final = 40
"""In one path, as many as Linux follows: path_resolution(7)."""
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mounted file system, as far as it matters here."""

    mount_id: int
    device: int  # st_dev of what is on it; btrfs gives its subvolumes others
    root: str  # the folder of the file system that is mounted: "/", but for bind mounts
    point: str  # absolute; surrogate-escaped where it is not UTF-8
    kind: str  # the file system's type, with its subtype: ext4, nfs4, fuse.sshfs

    @property
    def is_heard(self) -> bool:
        """Whether inotify tells of every change, whoever makes it. A local disk served by FUSE (fuseblk) counts."""
        return self.kind not in _CHANGED_BY_OTHERS and not self.kind.startswith("fuse.")


class MountTable:
    """The mounts at one moment."""

    def __init__(self, text: str) -> None:
        """Take the table's text; lines of another form are left out."""
        # Of several mounts on one point the last is on top.
        self._by_point = {mount.point: mount for mount in map(_mount_of, text.split("\n")) if mount}

    @classmethod
    def now(cls) -> "MountTable":
        """Read the table; empty, so that every folder counts as local, where there is none."""
        try:
            return cls(MOUNTS_PATH.read_text("utf-8", "surrogateescape"))
        except OSError:
            return cls("")

    def mount_of(self, path: str) -> Mount | None:
        """The mount that a path without symbolic links is on."""
        point = path
        while point not in self._by_point and point != "/":
            point = point.rpartition("/")[0] or "/"
        return self._by_point.get(point)

    def is_heard(self, path: str) -> bool:
        """Whether inotify tells of every change in a folder, given by a path without symbolic links."""
        mount = self.mount_of(path)
        return mount is None or mount.is_heard

    def resolve(self, path: str) -> str:
        """An absolute path without symbolic links, as far as that is told without asking a file system out of earshot.

        Unlike ``realpath``, it never waits for a server.
        """
        found, left, links = "", [*reversed(path.split("/"))], 0
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                found = found.rpartition("/")[0]
                continue
            here = f"{found}/{name}"
            if not self.is_heard(here):
                return os.path.normpath("/".join([here, *reversed(left)]))
            try:
                target = os.readlink(here)  # noqa: PTH115  # names may be anything; and without the detour
            except OSError:
                found = here  # no link, or not there
                continue
            links += 1
            if links > _MOST_LINKS:
                return path
            found = "" if target.startswith("/") else found
            left += reversed(target.split("/"))
        return found or "/"

    def unheard_devices(self) -> frozenset[int]:
        """The devices (``st_dev``) on which files change without inotify's telling."""
        return frozenset(mount.device for mount in self._by_point.values() if not mount.is_heard)

    def unheard_points(self) -> tuple[str, ...]:
        """Where the file systems are mounted on which files change without inotify's telling."""
        return tuple(point for point, mount in self._by_point.items() if not mount.is_heard)

    def concerning(self, folders: Iterable[str]) -> frozenset[Mount]:
        """The mounts that some folders, given by paths without symbolic links, and all below them are on."""
        folders = tuple(folders)
        on = {self.mount_of(folder) for folder in folders}
        on.update(
            mount for point, mount in self._by_point.items() if any(is_within(point, folder) for folder in folders)
        )
        return frozenset(mount for mount in on if mount)


def _mount_of(line: str) -> Mount | None:
    before, _, after = line.partition(" - ")
    fields = before.split(" ")
    try:
        major, _, minor = fields[2].partition(":")
        device = os.makedev(int(major), int(minor))
        return Mount(int(fields[0]), device, _unescaped(fields[3]), _unescaped(fields[4]), after.split(" ")[0])
    except (ValueError, IndexError, OverflowError):
        return None


def _unescaped(text: str) -> str:
    """Undo the escapes of white space and backslashes, each as three octal digits."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
