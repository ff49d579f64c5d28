"""``magictl top``: how busy the servers are, on one screen that keeps up."""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

from magi_agent.cli.command import command
from magi_agent.cli.exits import Exit, RefusedError, UnreachableError
from magi_agent.cli.grid import Grid
from magi_agent.cli.keyboard import Keyboard, keyboard
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import safe
from magi_agent.cli.screen import Screen
from magi_agent.cli.usage_table import Sample, problems_of, sample_of, summary_of, usage_grid

if TYPE_CHECKING:
    from rich.console import Group

_PATH = "/api/usage"
_PAUSE = 2.0
"""Seconds between two looks; the servers are not asked more often."""
_ANSWER_SECONDS = 15.0
_LINES_AROUND = 5
"""Lines of the screen that are not rows of the table."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class _EndedError(Exception):
    """Somebody wants the command to end, who is not at the keyboard."""


@command("magictl top", "magictl top --seconds 5", "magictl top --json | jq '.servers[] | {modelId, slotsBusy}'")
@click.option(
    "--seconds",
    type=click.FloatRange(_PAUSE, 3600),
    default=_PAUSE,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
def top(session: Session, seconds: float) -> int:
    """Show how busy each server is, until q.

    That is its state, memory, processor, tokens in a second, and slots; 100 % is one processor. Where standard output
    is no terminal, one table is printed, of what the servers did in a moment.

    With --json: the answer of GET /api/usage, once; its counts grow, so two of them give a rate.
    """
    screen = session.screen

    def ask() -> Sample:
        return sample_of(session.client.get(_PATH, "at", "servers", timeout=_ANSWER_SECONDS), time.monotonic())

    if screen.as_json:
        screen.json(session.client.get(_PATH, "at", "servers", timeout=_ANSWER_SECONDS))
    elif not screen.is_terminal(screen.out):
        before = ask()
        time.sleep(seconds)
        screen.grid(usage_grid(before, ask()))
    else:
        _keep_showing(screen, ask, seconds)
    return Exit.OK


def _keep_showing(screen: Screen, ask: Callable[[], Sample], seconds: float) -> None:
    """Draw what ``ask`` gives again and again until somebody ends it. Raises what it raises the first time."""
    from rich.live import Live

    before = latest = ask()
    trouble = ""
    with (
        suppress(KeyboardInterrupt, _EndedError),
        _ended_by_signals(),
        keyboard(sys.stdin) as keys,
        Live(console=screen.console(screen.out), screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(_picture(before, latest, trouble), refresh=True)
            if not _wait(keys, seconds):
                return
            try:
                before, latest, trouble = latest, ask(), ""
            except (UnreachableError, RefusedError) as error:
                trouble = error.message


def _picture(before: Sample, latest: Sample, trouble: str) -> "Group":
    """Return one screen: a line about all, the table as far as there is room, and what is wrong."""
    from rich.console import Group
    from rich.text import Text

    from magi_agent.cli.drawing import table_of

    columns, lines = shutil.get_terminal_size()
    grid = usage_grid(before, latest)
    room = max(1, lines - _LINES_AROUND)
    table, _ = table_of(Grid(grid.columns, grid.rows[:room]), columns)
    told = [Text(f"{time.strftime('%H:%M:%S')}  {summary_of(latest)}", "bold", no_wrap=True, overflow="ellipsis")]
    below = [Text("q ends it", "dim")]
    if len(grid.rows) > room:
        below.insert(0, Text(f"and {len(grid.rows) - room} more: the terminal is too low", "dim"))
    said = [trouble] if trouble else problems_of(latest)[:1]
    below += [Text(safe(sentence), "yellow", no_wrap=True, overflow="ellipsis") for sentence in said]
    return Group(*told, Text(), table, *below)


def _wait(keys: Keyboard, seconds: float) -> bool:
    """Wait for the next look; whether it is wanted."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if keys.pressed(left) in ("q", "Q"):
            return False
    return True


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have the terminal put back before the process ends of a signal."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # a handler's signature
        raise _EndedError

    before = {number: signal.signal(number, end) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
