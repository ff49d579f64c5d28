"""The few Linux calls that Python 3.11 has no function for: namespaces, mounts and the parent-death signal.

Standard library only. Constants are from the kernel's `sched.h`, `mount.h` and `prctl.h`.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

NEW_MOUNTS = 0x00020000
NEW_PIDS = 0x20000000

NO_SUID = 0x2
NO_DEVICES = 0x4
BIND_ALL_BELOW = 0x1000 | 0x4000
PRIVATE_ALL_BELOW = 0x40000 | 0x4000
SHARED = 0x100000

_SET_PARENT_DEATH_SIGNAL = 1


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def unshare(namespaces: int) -> None:
    """Leave the given kinds of namespace for new ones; a new PID namespace begins with the next child.

    Raises OSError (EPERM without CAP_SYS_ADMIN).
    """
    _checked(_libc().unshare(namespaces), "unshare")


def mount(source: str, target: Path, kind: str = "none", flags: int = 0, options: str = "") -> None:
    """Mount `source` on `target`. Raises OSError naming the target."""
    arguments = (source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _checked(_libc().mount(*arguments), f"mount on {target}")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends. Raises OSError."""
    _checked(_libc().prctl(_SET_PARENT_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")
