"""Being told that inotify has queued an event, while somebody else reads it.

A poll of the other's descriptor tells of nothing that was read before whoever polls came to run, and that is every
other event: the kernel wakes both, and looks once more before it answers. So the descriptor is made to send a signal
(``O_ASYNC``, fcntl(2)): at every event, to one thread alone, which takes it as something to read, when it wants to.
Until then the kernel has no more to do than to see that it is still there.
"""

import ctypes
import fcntl
import os
import signal
import struct
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Final

_DESCRIPTORS: Final = "/proc/self/fd"
_INOTIFY: Final = "anon_inode:inotify"
_F_SETOWN_EX: Final = 15  # asm-generic/fcntl.h
_F_OWNER_TID: Final = 0
_SIGNAL: Final = signal.SIGIO
_SIGNAL_SET_BYTES: Final = 128
_SIGNAL_INFO_BYTES: Final = 128


class QueuedEvents:
    """Becomes readable (``fileno``) when an instance of inotify that was announced has something queued.

    Made, used and closed by one thread, which has SIGIO blocked from then on until it ends.
    """

    def __init__(self) -> None:
        """Raises OSError where the system has no such thing."""
        # Not blocked, it would end the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
        self._owner = struct.pack("ii", _F_OWNER_TID, threading.get_native_id())
        self._fd = _signal_descriptor(_SIGNAL)

    def fileno(self) -> int:
        """The descriptor to wait for, as select.poll asks for it."""
        return self._fd

    def close(self) -> None:
        """Give it up; instances that live on send their signals in vain."""
        os.close(self._fd)

    def take(self) -> bool:
        """Whether anything was queued since the last time; waits for nothing."""
        with suppress(BlockingIOError):
            return bool(os.read(self._fd, _SIGNAL_INFO_BYTES))
        return False

    def announce_new(self, others: Collection[int]) -> bool:
        """Be told, from now until its end, of what is queued for the one instance that is not among these descriptors.

        Gives whether it will be: not where none or several are new, and it cannot be said which one is meant.
        """
        new = inotify_descriptors().difference(others)
        if len(new) != 1:
            return False
        (fd,) = new
        try:
            fcntl.fcntl(fd, _F_SETOWN_EX, self._owner)
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        except OSError:
            return False
        return True


def inotify_descriptors() -> set[int]:
    """Return this process's descriptors of inotify; none where there is no /proc."""
    found = set()
    with suppress(OSError):
        for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208  # hundreds, each of which would be made a path
            with suppress(OSError):
                if os.readlink(f"{_DESCRIPTORS}/{name}") == _INOTIFY:  # noqa: PTH115
                    found.add(int(name))
    return found


def _signal_descriptor(number: int) -> int:
    """Return a descriptor from which the signal is read in place of being handled: signalfd(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    signals = struct.pack("L", 1 << (number - 1)).ljust(_SIGNAL_SET_BYTES, b"\0")
    fd: int = libc.signalfd(-1, signals, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd
