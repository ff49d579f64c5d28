"""A peer that a benchmark measures the agent against: a module of this checkout that serves HTTP on a unix socket."""

from __future__ import annotations

import http.client
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from locations import CHECKOUT

from tests.agent_process import wait_until
from tests.bench.ending import end
from tests.bench.unix_http import fetch


@contextmanager
def running_peer(module: str, arguments: Sequence[str], listening: Path) -> Iterator[None]:
    """Run the module until the block is left; begins when it answers on the socket `listening`."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=CHECKOUT, stdin=subprocess.DEVNULL)

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{module} ended with exit status {process.returncode}")
        try:
            fetch(listening, "/")
        except (OSError, http.client.HTTPException):
            return False
        return True

    try:
        wait_until(answers, f"{module} answers")
        yield
    finally:
        end(process)
