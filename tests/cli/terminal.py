"""`magictl` as a person at a terminal has it: its own process on a pseudo-terminal of a given size."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import locations

MAGICTL = locations.VENV / "bin" / "magictl"
_DEADLINE_SECONDS = 40.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def surroundings(**changes: str) -> dict[str, str]:
    """The environment for a `magictl` process, in which nothing but ``changes`` says where an agent is."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "LANG": "C.UTF-8", "TERM": "xterm-256color", **changes}


def without_control(text: str) -> str:
    """What is left of terminal output when colours and movements are taken out."""
    return _CONTROL.sub("", text)


def lines_left(output: str) -> list[str]:
    """The lines that stand on the screen at the end, of output that moves by whole lines only, as live lines do."""
    screen, line = [""], 0
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", output):
        if piece == "\x1b[2K":
            screen[line] = ""
        elif piece == "\x1b[1A":
            line -= 1
        elif piece == "\n":
            line += 1
            screen += [""] * (line == len(screen))
        elif not piece.startswith(("\x1b", "\r")):
            screen[line] += piece
    return [text for text in screen if text]


class Terminal:
    """One process on a terminal. ``output`` is all that it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self.process = process
        self.output = ""
        self._screen = screen
        self._open = True

    @property
    def text(self) -> str:
        """The output without control sequences."""
        return without_control(self.output)

    def type(self, keys: str) -> None:
        """Type, as a person does; ``\\x03`` is Ctrl-C."""
        os.write(self._screen, keys.encode())

    def wait_for(self, condition: Callable[[str], bool], what: str) -> None:
        """Read until the output is as asked; fail when it never is."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not condition(self.output):
            assert self._open, f"it ended without: {what}; it wrote {self.output[-800:]!r}"
            assert time.monotonic() < deadline, f"not in time: {what}; it wrote {self.output[-800:]!r}"
            self._read(0.2)

    def end(self) -> int:
        """Read until the process ends, and return its exit status."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while self._open:
            assert time.monotonic() < deadline, f"it does not end; it wrote {self.output[-800:]!r}"
            self._read(0.2)
        return self.process.wait(_DEADLINE_SECONDS)

    def _read(self, seconds: float) -> None:
        if not select.select([self._screen], [], [], seconds)[0]:
            return
        try:
            piece = os.read(self._screen, 65536)
        except OSError:  # EIO: nobody has the other end open any more.
            piece = b""
        self._open = bool(piece)
        self.output += piece.decode(errors="replace")


@contextmanager
def on_terminal(
    *words: str,
    columns: int = 100,
    lines: int = 40,
    environment: Mapping[str, str] | None = None,
    program: str = str(MAGICTL),
) -> Iterator[Terminal]:
    """Run `magictl`, or another program, on a terminal; killed when the block is left, should it still run."""
    screen, behind = pty.openpty()
    fcntl.ioctl(behind, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [program, *words],
        stdin=behind,
        stdout=behind,
        stderr=behind,
        env=dict(environment or surroundings()),
        preexec_fn=take_terminal,
    )
    os.close(behind)
    try:
        yield Terminal(process, screen)
    finally:
        process.kill()
        process.wait(_DEADLINE_SECONDS)
        os.close(screen)


def shown(*words: str, columns: int = 100, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run `magictl` on a terminal to its end; return its exit status and all that it wrote."""
    with on_terminal(*words, columns=columns, environment=environment) as terminal:
        status = terminal.end()
        return status, terminal.output


def piped(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `magictl` with its output in pipes."""
    return subprocess.run(
        [str(MAGICTL), *words],
        capture_output=True,
        text=True,
        env=dict(environment or surroundings()),
        timeout=_DEADLINE_SECONDS,
        check=False,
    )


def as_nobody(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `magictl` as a user with no rights at all; only root can become one."""
    # The first run, as whoever runs the tests, imports what nobody might not be allowed to read.
    program = (
        "import io, os, sys; from contextlib import redirect_stderr, redirect_stdout\n"
        "from magi_agent.cli.magictl import main\n"
        "with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()): main(sys.argv[1:])\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=dict(environment or surroundings()),
        timeout=_DEADLINE_SECONDS,
        check=False,
    )
