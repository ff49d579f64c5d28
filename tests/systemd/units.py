"""Units of the private manager as a test handles them: asked by systemctl, waited for with a bound."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

PATTERN = "systemdtest-*.service"


class MakeName(Protocol):
    """Gives a unit name that no other test has; the unit is gone when the test ends."""

    def __call__(self, stem: str = "unit", suffix: str = ".service") -> str: ...


def run(*command: str, check: bool = True, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert not check or ended.returncode == 0, f"{command}: {ended.stderr}"
    return ended


def systemctl(*words: str, check: bool = True) -> str:
    return run("systemctl", "--user", *words, check=check).stdout.strip()


def shown(unit: str, prop: str) -> str:
    return systemctl("show", "--value", f"--property={prop}", unit)


async def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait for a condition while the loop turns."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait for a condition where there is no loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
