"""Where scenarios run: a machine that has systemd as PID 1 and may be changed at will."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Protocol


class Machine(Protocol):
    """A booted machine; `packaging/roots/container.py` has one in a container, `this_machine.py` is this one."""

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Begin a command as root, with pipes to all three streams."""

    def entered(
        self, command: Sequence[str], *, stdin: str = "", within: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root, to its end. Raises subprocess.SubprocessError."""

    def reboot(self) -> None:
        """Shut everything down, boot again, and return when all is up."""
