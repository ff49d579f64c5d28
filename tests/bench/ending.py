"""The end of a process that a benchmark has begun."""

from __future__ import annotations

import subprocess
from typing import Any


def end(process: subprocess.Popen[Any], seconds: float = 30.0) -> None:
    """Have it ended when this returns: by SIGTERM, and where that is not heeded in so many seconds, by SIGKILL."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        # llama-server forgets a SIGTERM that comes between its first healthy answer and its main loop.
        process.kill()
        process.wait()
