"""A folder shown under another path by FUSE: a file system whose server may fall silent or die."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class FuseMount:
    """The folder, the path under which it is shown, and the process that serves it."""

    source: Path
    point: Path
    process: subprocess.Popen[str]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Have every call to it wait meanwhile, of which none was taken: who waits can be killed."""
        assert self.process.stdout is not None
        self._say("be silent")
        assert self.process.stdout.readline() == "silent\n"
        try:
            yield
        finally:
            # It may have died meanwhile.
            with suppress(BrokenPipeError):
                self._say("go on")

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def die(self) -> None:
        """End the server: every call fails from now on."""
        self.process.kill()
        self.process.wait()


@contextmanager
def fuse_mount(source: Path, point: Path) -> Iterator[FuseMount]:
    """Show ``source`` under ``point``; both are made. Skips the test where FUSE is not allowed."""
    source.mkdir()
    point.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.discovery.fuse_folder", source, point],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "mounted\n":
            pytest.skip("FUSE is not allowed here")
        yield FuseMount(source, point, process)
    finally:
        # Whoever waits for it gets an error then.
        process.kill()
        process.communicate()
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
