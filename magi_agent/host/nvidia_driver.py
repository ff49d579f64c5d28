"""Whether NVIDIA's driver in the kernel and its libraries still belong together."""

import threading
from pathlib import Path
from typing import Final

from magi_agent.host.gpu_devices import CUDA, Tree, nvidia_driver_version, nvidia_mismatch
from magi_agent.host.libraries import installed_library

_LOADERS_CACHE: Final = Path("/etc/ld.so.cache")
"""Written anew by ldconfig(8), which every package with libraries runs."""


class NvidiaDriver:
    """Looks for libraries again only where the loader's cache or the kernel's driver is another than before.

    Thread-safe. Without a driver it costs one look at a file that is not there.
    """

    def __init__(self, tree: Tree | None = None, loaders_cache: Path = _LOADERS_CACHE) -> None:
        self._tree = tree or Tree()
        self._loaders_cache = loaders_cache
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] | None = None
        self._problem: str | None = None

    def problem(self) -> str | None:
        """Say what is wrong and that a boot mends it; ``None`` where nothing is. Reads files, and may run ldconfig."""
        version = nvidia_driver_version(self._tree)
        if version is None:
            return None
        with self._lock:
            try:
                status = self._loaders_cache.stat()
                seen: tuple[object, ...] = (version, status.st_ino, status.st_mtime_ns, status.st_size)
            except OSError:
                seen = (version,)
            if seen != self._seen:
                mismatch = nvidia_mismatch(self._tree, installed_library(CUDA))
                self._problem = f"{mismatch}; reboot this host" if mismatch else None
                self._seen = seen
            return self._problem
