"""Runs commands in a virtual machine for whoever holds the other end of its serial port; one at a time.

It is put into the machine's disk as it is, and started by a unit there. A request is a JSON object in one line, and so
is its answer; the first line of all says that the machine is up. Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def lines_of(port: int) -> Iterator[bytes]:
    """Give what comes through the port, line by line."""
    pending = b""
    while piece := os.read(port, 1 << 16):
        pending += piece
        *whole, pending = pending.split(b"\n")
        yield from whole


def answer(port: int, what: object) -> None:
    """Send one answer."""
    rest = memoryview(json.dumps(what).encode() + b"\n")
    while rest:
        rest = rest[os.write(port, rest) :]


def carry_out(request: dict[str, Any]) -> dict[str, object]:
    """Run one command to its end, or to the end of its time."""
    try:
        ran = subprocess.run(
            request["argv"], input=request["stdin"], timeout=request["within"], env=request["environment"],
            cwd="/root", text=True, errors="replace", capture_output=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"late": True}
    except OSError as error:
        return {"returncode": 127, "stdout": "", "stderr": str(error)}
    return {"returncode": ran.returncode, "stdout": ran.stdout, "stderr": ran.stderr}


def main() -> int:
    """Serve until the other end is gone; the argument is the port's path."""
    port = os.open(sys.argv[1], os.O_RDWR)
    answer(port, {"up": True})
    for line in lines_of(port):
        answer(port, carry_out(json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
