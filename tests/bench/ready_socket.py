"""The socket that a service says READY on, and that it is alive, as its manager hears it (sd_notify(3))."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_READY_SECONDS = 60.0
_LOOK_SECONDS = 1.0  # how often the process is looked at, which may have ended
_MESSAGE_BYTES = 4096


class ReadySocket:
    """Hears READY. Its path goes to the service as NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))

    def __enter__(self) -> ReadySocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
        self.path.unlink()

    def wait_ready(self, process: subprocess.Popen[bytes] | None) -> int:
        """Return the process's id once it says READY. Raises RuntimeError where it ends before, or never does."""
        assert process is not None
        deadline = time.monotonic() + _READY_SECONDS
        self._socket.settimeout(_LOOK_SECONDS)
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if b"READY=1" in self._socket.recv(_MESSAGE_BYTES).split(b"\n"):
                    return process.pid
            except TimeoutError:
                continue
        raise RuntimeError(f"process {process.args!r} did not get ready, exit status {process.poll()}")


@contextmanager
def heard(path: Path) -> Iterator[None]:
    """Take in whatever a service says on a socket at ``path``, as a manager does, until the block is left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.bind(str(path))

        def hear() -> None:
            while channel.recv(_MESSAGE_BYTES):
                pass

        hearing = threading.Thread(target=hear, daemon=True)
        hearing.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"", str(path))
            hearing.join()
            path.unlink()
