"""Processes that survive SIGKILL until they are let go: those in a freezer of control groups' version 1.

They stay in their units' control groups, which are of another hierarchy, and wait in the kernel like one whose network
file system hangs: state D, and whatever signal comes is held back.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from magi_agent.host.unified_hierarchy import first_version_hierarchy

_PATIENCE = 10.0


@contextlib.contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Freeze processes; they go on at the end, whatever happens, and die then of what they were sent."""
    with _hierarchy() as mounted_on:
        folder = mounted_on / f"magi-test-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            for pid in pids:
                (folder / "cgroup.procs").write_text(str(pid))
            _set(folder, "FROZEN")
            yield
        finally:
            _set(folder, "THAWED")
            for line in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # it may be gone by now
                    (mounted_on / "cgroup.procs").write_text(line)
            _remove(folder)


@contextlib.contextmanager
def _hierarchy() -> Iterator[Path]:
    hierarchy = first_version_hierarchy("freezer")
    if hierarchy is not None:
        yield hierarchy.mounted_on
        return
    folder = Path(f"/run/magi-test-freezer-{os.getpid()}")
    with contextlib.suppress(PermissionError):
        folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "cgroup", "-o", "freezer", "freezer", str(folder)], check=False, capture_output=True, text=True
    )
    if mount.returncode:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no freezer of version 1 can be had here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def _set(folder: Path, state: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    (folder / "freezer.state").write_text(state)
    while (folder / "freezer.state").read_text().strip() != state:
        assert time.monotonic() < deadline, f"not {state} within {_PATIENCE:g} s"
        time.sleep(0.01)


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return folder.rmdir()
        except OSError:
            assert time.monotonic() < deadline, f"processes stay in {folder}"
            time.sleep(0.01)
