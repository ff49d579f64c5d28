"""Where output goes: rich text on a terminal, plain full-width text in a pipe, JSON where asked for.

Results go to standard output; errors, notes and live lines to standard error. rich is imported only when something
coloured is really drawn, since it costs more than all the rest of a short command.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, TextIO

from magi_agent.cli.exits import CommandError, OutputError
from magi_agent.cli.grid import Cell, Grid
from magi_agent.cli.phrasing import safe

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_MARKS = str.maketrans({"✓": "+", "✗": "x", "…": "...", "│": "|"})
"""Our own marks for a terminal whose character set lacks them: as question marks they would all be one."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Writes for one command. ``as_json``: results are JSON, and errors too."""

    as_json: bool
    out: TextIO
    err: TextIO
    environment: Mapping[str, str]

    @classmethod
    def of_this_process(cls, as_json: bool) -> "Screen":
        """Return the screen on this process's own streams; one that is closed swallows what is written."""
        out, err = (stream or StringIO() for stream in (sys.stdout, sys.stderr))
        return cls(as_json, out, err, os.environ)

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

    def json_line(self, value: object) -> None:
        """Write ``value`` as one line of JSON, of which there may be many."""
        self._put(self.out, _harmless(json.dumps(value, ensure_ascii=False)) + "\n")

    def line(self, *cells: Cell | str) -> None:
        """Write one line of result, made of pieces of text."""
        self._write_line(self.out, cells)

    def text(self, text: str) -> None:
        """Write ``text`` of our own as it is: what another program reads."""
        self._put(self.out, text)

    def note(self, *cells: Cell | str) -> None:
        """Write one line that is no result: a hint, or what is going on."""
        self._write_line(self.err, cells)

    def grid(self, grid: Grid) -> None:
        """Write a table: fitted to the terminal, or whole and plain."""
        if not self.is_terminal(self.out):
            self._put(self.out, grid.plain())
            return
        from magi_agent.cli.drawing import draw

        with _writing():
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
        if not _can_carry(stream, text):
            text = json.dumps(value, indent=2)
        self._put(stream, _harmless(text) + "\n")

    def _write_line(self, stream: TextIO, cells: tuple[Cell | str, ...]) -> None:
        pieces = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        if not _can_carry(stream, "".join(piece.text for piece in pieces)):
            pieces = [Cell(piece.text.translate(_PLAIN_MARKS), piece.style) for piece in pieces]
        if not self.coloured(stream):
            self._put(stream, "".join(safe(piece.text) for piece in pieces) + "\n")
            return
        from rich.text import Text

        text = Text()
        for piece in pieces:
            text.append(safe(piece.text), piece.style)
        with _writing():
            self.console(stream).print(text, soft_wrap=True)

    def _put(self, stream: TextIO, text: str) -> None:
        with _writing():
            stream.write(text)
            stream.flush()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(error) from error


def _can_carry(stream: TextIO, text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _harmless(document: str) -> str:
    """Return a JSON document with its invisible characters as escapes: some terminals obey U+009B and its like."""
    if document.replace("\n", "").isprintable():
        return document
    return "".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in document)


def _escaped(letter: str) -> str:
    # json leaves DEL as it is.
    return f"\\u{ord(letter):04x}" if letter.isascii() else json.dumps(letter)[1:-1]
