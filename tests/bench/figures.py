"""How the benchmarks sum up repeated runs, hold them against targets and show both. Everything is ready for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 132  # columns, also where the output is no terminal


def spread_of(values: Iterable[float]) -> dict[str, Any]:
    """Return the median of repeated runs, and how far they lie apart."""
    runs = sorted(values)
    return {"median": statistics.median(runs), "lowest": runs[0], "highest": runs[-1], "runs": len(runs)}


def shown(spread: dict[str, Any], digits: int = 1) -> str:
    """Return a spread as it stands in a table: the median, and the extremes in brackets."""
    return f"{spread['median']:,.{digits}f} ({spread['lowest']:,.{digits}f} to {spread['highest']:,.{digits}f})"


def at_least(what: str, measured: float, limit: float, unit: str) -> dict[str, Any]:
    """Hold a figure against the least it may be."""
    return {"target": f"{what}: at least {limit:g} {unit}".rstrip(), "measured": measured, "met": measured >= limit}


def at_most(what: str, measured: float, limit: float, unit: str) -> dict[str, Any]:
    """Hold a figure against the most it may be."""
    return {"target": f"{what}: at most {limit:g} {unit}".rstrip(), "measured": measured, "met": measured <= limit}


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their columns' names; the first column names the row."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=_WIDTH).print(table)


def print_targets(targets: Iterable[dict[str, Any]]) -> None:
    """Print each target, what was measured, and whether that is enough."""
    for target in targets:
        word = "met   " if target["met"] else "MISSED"
        print(f"{word}  {target['target']}; measured {target['measured']:,.4g}")
