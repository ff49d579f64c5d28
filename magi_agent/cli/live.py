"""The live lines on a terminal while something takes long: a spinner, a name, its state, and the seconds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from magi_agent.cli.grid import Cell
from magi_agent.cli.phrasing import safe, seconds_taken
from magi_agent.cli.screen import Screen

if TYPE_CHECKING:
    from rich.live import Live
    from rich.spinner import Spinner

MOST_LINES = 12
"""More would scroll out of a small terminal, which a live display cannot follow."""


class LiveLines:
    """Lines that are drawn over again, one for each thing under way."""

    def __init__(self, live: "Live") -> None:
        self._live = live
        self._spinners: dict[str, Spinner] = {}

    def show(self, under_way: Sequence[tuple[str, Cell, float]]) -> None:
        """Draw what is under way: for each its name, its state, and its seconds so far."""
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        lines: list[Spinner | Text] = []
        for name, state, seconds in under_way[:MOST_LINES]:
            spinner = self._spinners.setdefault(name, Spinner("dots", style="cyan"))
            spinner.update(
                text=Text.assemble(
                    (safe(name), "bold"), " ", (safe(state.text), state.style), " ", (seconds_taken(seconds), "dim")
                )
            )
            lines.append(spinner)
        if len(under_way) > MOST_LINES:
            lines.append(Text(f"  and {len(under_way) - MOST_LINES} more", "dim"))
        self._live.update(Group(*lines))


@contextmanager
def live_lines(screen: Screen) -> Iterator[LiveLines | None]:
    """Have live lines on standard error until the block is left, when they go.

    Yields ``None`` where standard error is no terminal or JSON was asked for: nobody would see them.
    """
    if screen.as_json or not screen.is_terminal(screen.err):
        yield None
        return
    from rich.live import Live

    with Live(console=screen.console(screen.err), transient=True, refresh_per_second=10) as live:
        yield LiveLines(live)
