"""A table before it is drawn: columns, rows, and what to leave out where there is no room."""

from dataclasses import dataclass
from typing import Final, Literal

from magi_agent.cli.phrasing import safe

GAP = 2
"""Spaces between two columns."""
_NARROWEST_PROSE: Final = 30


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of text and rich's name of its style."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column. ``rank`` 0 is never left out; of the others the highest goes first where there is no room."""

    title: str
    rank: int = 0
    justify: Literal["left", "right"] = "left"
    is_prose: bool = False
    """Whether it holds sentences, which are folded where there is no room for them on one line."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table. Each row has one cell for each column; the first column is the name of the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def width(self, index: int) -> int:
        """Return the width the column needs so that nothing in it is cut."""
        return max([len(self.columns[index].title), *(len(safe(row[index].text)) for row in self.rows)])

    def fitted(self, width: int, narrowest_name: int = 30) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the columns that fit in ``width`` characters, by index, and the titles of those left out.

        The first column may be folded, but columns are left out before it gets narrower than ``narrowest_name``, or one
        of prose too narrow to read.
        """
        kept = list(range(len(self.columns)))
        widths = [self.width(index) for index in kept]
        widths[0] = min(widths[0], narrowest_name)
        widths = [
            min(each, _NARROWEST_PROSE) if column.is_prose else each
            for column, each in zip(self.columns, widths, strict=True)
        ]
        by_rank = sorted((index for index in kept if self.columns[index].rank), key=lambda i: self.columns[i].rank)
        while by_rank and sum(widths[index] + GAP for index in kept) - GAP > width:
            kept.remove(by_rank.pop())
        left_out = tuple(column.title for index, column in enumerate(self.columns) if index not in kept)
        return tuple(kept), left_out

    def plain(self) -> str:
        """Return the whole table as text: nothing cut or folded, no spaces at line ends."""
        widths = [self.width(index) for index in range(len(self.columns))]
        lines = [self._plain_line([column.title for column in self.columns], widths)]
        lines += [self._plain_line([safe(cell.text) for cell in row], widths) for row in self.rows]
        return "".join(line + "\n" for line in lines)

    def _plain_line(self, texts: list[str], widths: list[int]) -> str:
        parts = [
            text.rjust(width) if column.justify == "right" else text.ljust(width)
            for text, width, column in zip(texts, widths, self.columns, strict=True)
        ]
        return (" " * GAP).join(parts).rstrip()
