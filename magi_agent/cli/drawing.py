"""Tables on a terminal, drawn by rich."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from magi_agent.cli.grid import GAP, Grid
from magi_agent.cli.phrasing import safe


def draw(grid: Grid, console: Console, width: int) -> None:
    """Draw ``grid`` within ``width`` characters; columns left out for want of room are named below it."""
    table, left_out = table_of(grid, width)
    console.print(table, width=width)
    if left_out:
        console.print(Text(f"no room for: {', '.join(left_out)} (a wider terminal, or --json, shows them)", "dim"))


def table_of(grid: Grid, width: int) -> tuple[Table, tuple[str, ...]]:
    """Return ``grid`` as rich draws it within ``width`` characters, and the titles of columns left out."""
    kept, left_out = grid.fitted(width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold", width=None)
    for index in kept:
        column = grid.columns[index]
        table.add_column(
            column.title,
            justify=column.justify,
            no_wrap=index != 0 and not column.is_prose,
            overflow="fold",
            max_width=None if index else _room_for_name(grid, kept, width),
        )
    for row in grid.rows:
        table.add_row(*(Text(safe(row[index].text), row[index].style) for index in kept))
    return table, left_out


def _room_for_name(grid: Grid, kept: tuple[int, ...], width: int) -> int:
    others = sum(grid.width(index) + GAP for index in kept if index and not grid.columns[index].is_prose)
    return max(10, width - others)
