"""One agent at a time on the same state."""

import contextlib
import fcntl
import os
from pathlib import Path

from magi_agent.errors import AlreadyRunning, ConfigurationError


class StateLock:
    """An exclusive lock on the state folder, held until the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "agent.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise ``AlreadyRunning`` naming the process that has it.

        Raises ``ConfigurationError`` where the folder cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigurationError(
                f"registry.registry_path: cannot keep state in {self._path.parent}: {error.strerror}"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise AlreadyRunning(
                f"another agent{f' (process {owner})' if owner else ''} uses the state in {self._path.parent}; "
                "stop it, or give this one a REGISTRY_PATH of its own"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise ConfigurationError(
                f"registry.registry_path: {self._path} cannot be locked: {error.strerror}"
            ) from None
        self._descriptor = descriptor
        # Whose it is only helps a person: the lock holds without it, on a full disk too.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
