"""Tables give way to a narrow terminal, and what matters most in them stays."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from magi_agent.cli.drawing import draw
from magi_agent.cli.grid import Cell, Column, Grid

SENTENCE = "it needs 318 MiB of memory, and of all the others nobody gives any back before tomorrow " * 5
COLUMNS = (Column("WHEN"), Column("BY", 1), Column("RUN", 2), Column("WHAT", is_prose=True))


def drawn(width: int) -> list[str]:
    text = io.StringIO()
    row = (Cell("2026-11-30 02:15:02"), Cell("uid 0 (pid 83)"), Cell("d7a4a4a7"), Cell(SENTENCE))
    draw(Grid(COLUMNS, (row,)), Console(file=text, width=width), width)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [200, 110, 80, 60])
def test_sentences_are_folded_and_never_left_out(width: int) -> None:
    lines = drawn(width)

    assert all(len(line) <= width for line in lines)
    assert "WHAT" in lines[0].split()
    at = lines[0].index("WHAT")
    told = " ".join(line[at:].strip() for line in lines[1:] if not line.startswith("no room for"))
    assert told.split()[: len(SENTENCE.split())] == SENTENCE.split()


def test_other_columns_stay_where_the_sentences_can_be_folded() -> None:
    assert drawn(110)[0].split() == ["WHEN", "BY", "RUN", "WHAT"]
    assert drawn(60)[0].split() == ["WHEN", "WHAT"]
