"""Who listens on a unix socket, as the kernel says it.

Whoever connects may ask for the process that called listen(2) (``SO_PEERCRED``, unix(7)). Of the control group the
kernel says nothing (sock_diag(7) tells it for TCP only), but a control group's folder names its processes
(``cgroup.procs``, cgroups(7)), to unprivileged processes too and where /proc shows nothing of others.

Everything here takes well under a millisecond, so it is called from the event loop.
"""

import contextlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.host.unified_hierarchy import groups_of

_UCRED: Final = struct.Struct("=iII")
"""struct ucred: process, user, group."""


@dataclass(frozen=True, slots=True)
class UnixListener:
    """A process that listens on a unix socket."""

    pid: int
    """0 where it is none of this process's namespace."""
    uid: int


def unix_listener(path: Path) -> UnixListener | None:
    """Return who listens at ``path``; ``None`` where nobody does, or where this process may not connect."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
        channel.setblocking(False)  # a queue that is full is no reason to wait
        try:
            channel.connect(str(path))
        except OSError:
            return None
        pid, uid, _ = _UCRED.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return UnixListener(pid, uid)


def unix_owned_by(path: Path, control_group: str) -> bool | None:
    """Tell whether who listens at ``path`` is a process of this control group or one below it.

    ``control_group`` is what systemd calls it: a path below the hierarchy's root. ``False`` also when nobody listens
    there or the control group is gone; ``None`` where the kernel does not tell.
    """
    listener = unix_listener(path)
    if listener is None or not listener.pid:
        return False
    groups = groups_of(control_group)
    if groups is None:
        return None
    return any(listener.pid in _processes_of(group) for group in groups)


def _processes_of(group: Path) -> frozenset[int]:
    with contextlib.suppress(OSError):
        return frozenset(map(int, (group / "cgroup.procs").read_text().split()))
    return frozenset()
