"""Where output goes: rich text on a terminal, plain full-width text in a pipe, JSON where asked for.

Results go to standard output; errors, notes and live lines to standard error. rich is imported only when something
coloured is really drawn, since it costs more than all the rest of a short command.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from magi_agent.cli.exits import CommandError
from magi_agent.cli.grid import Cell, Grid
from magi_agent.cli.phrasing import safe

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Screen:
    """Writes for one command. ``as_json``: results are JSON, and errors too."""

    as_json: bool
    out: TextIO
    err: TextIO
    environment: Mapping[str, str]

    @classmethod
    def of_this_process(cls, as_json: bool) -> "Screen":
        """Return the screen on this process's own streams."""
        return cls(as_json, sys.stdout, sys.stderr, os.environ)

    def is_terminal(self, stream: TextIO) -> bool:
        """Whether ``stream`` ends at a person who sees colours and a live line."""
        return stream.isatty() and self.environment.get("TERM") != "dumb"

    def coloured(self, stream: TextIO) -> bool:
        """Whether colours go to ``stream``: to a terminal, unless ``NO_COLOR`` (no-color.org) is set."""
        return self.is_terminal(stream) and not self.environment.get("NO_COLOR")

    def console(self, stream: TextIO) -> "Console":
        """Return rich's console on ``stream``."""
        from rich.console import Console

        return Console(file=stream, no_color=not self.coloured(stream), highlight=False, emoji=False, markup=False)

    def json(self, value: object) -> None:
        """Write ``value`` as one JSON document."""
        self._write_json(self.out, value)

    def line(self, *cells: Cell | str) -> None:
        """Write one line of result, made of pieces of text."""
        self._write_line(self.out, cells)

    def note(self, *cells: Cell | str) -> None:
        """Write one line that is no result: a hint, or what is going on."""
        self._write_line(self.err, cells)

    def grid(self, grid: Grid) -> None:
        """Write a table: fitted to the terminal, or whole and plain."""
        if not self.is_terminal(self.out):
            self.out.write(grid.plain())
            return
        from magi_agent.cli.drawing import draw

        draw(grid, self.console(self.out), shutil.get_terminal_size().columns)

    def failure(self, error: CommandError) -> None:
        """Write an error: one line, or one JSON document."""
        if self.as_json:
            self._write_json(self.err, {"error": error.kind, "message": error.message, "details": error.details})
            return
        self.note(Cell("magictl: ", "bold red"), error.message)

    def log_lines(self, lines: list[str]) -> None:
        """Write lines of a server's log to standard error, set in from the left."""
        for line in lines:
            self.note(Cell("  │ ", "red"), Cell(line, "dim"))

    def _write_json(self, stream: TextIO, value: object) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        if not text.isascii():
            try:
                text.encode(stream.encoding or "utf-8")
            except UnicodeEncodeError:
                text = json.dumps(value, indent=2)
        stream.write(text + "\n")
        stream.flush()

    def _write_line(self, stream: TextIO, cells: tuple[Cell | str, ...]) -> None:
        pieces = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        if not self.coloured(stream):
            stream.write("".join(safe(piece.text) for piece in pieces) + "\n")
            stream.flush()
            return
        from rich.text import Text

        text = Text()
        for piece in pieces:
            text.append(safe(piece.text), piece.style)
        self.console(stream).print(text, soft_wrap=True)
