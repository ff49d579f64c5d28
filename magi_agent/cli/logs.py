"""``magictl logs``: a server's log, as the agent reads it from the journal of its host."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import urlencode

import click

from magi_agent.cli.address import is_on_this_host
from magi_agent.cli.answers import record, records, text
from magi_agent.cli.client import server_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.event_source import EventSource
from magi_agent.cli.exits import UnreachableError
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import local_time, number
from magi_agent.cli.runs import refuse_unknown, run_named
from magi_agent.cli.screen import Screen

_MOST_LINES: Final = 1_000_000
_MOST_AT_ONCE: Final = 10_000
"""Lines in one answer of the agent's."""
_USUAL: Final = 50
_STYLES: Final = ((3, "red"), (4, "yellow"), (6, ""))
"""Styles of priorities of syslog(3), up to each."""
_Entry = Mapping[str, object]


@command(
    "magictl logs smollm2-135m-instruct.q4_1",
    "magictl logs smollm2-135m-instruct.q4_1 -f",
    "magictl logs smollm2-135m-instruct.q4_1 -n 500 --since '10 min ago'",
    "magictl logs smollm2-135m-instruct.q4_1 --run previous -p warning",
    "magictl logs smollm2-135m-instruct.q4_1 --run 3f9a07c2",
)
@click.argument("model_id", metavar="ID", shell_complete=model_ids)
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, _MOST_LINES),
    help="How many lines, the last ones. [default: 50, or all since]",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on, until Ctrl-C.")
@click.option("--since", metavar="TIME", help="Only what is newer: '2026-01-02 03:04', -1h, '10 min ago', yesterday.")
@click.option("--until", metavar="TIME", help="Only what is older, likewise.")
@click.option("-p", "--priority", metavar="WORD", help="Only what is as important: err, warning, notice, info, debug.")
@click.option(
    "--run", metavar="RUN", help="One run alone: current (or the last one), previous, or at least 4 digits of its id."
)
def logs(
    session: Session,
    model_id: str,
    lines: int | None,
    follow: bool,
    since: str | None,
    until: str | None,
    priority: str | None,
    run: str | None,
) -> None:
    """Show the log of a model's server, of earlier runs too.

    Lines that systemd says of the server are marked; magictl history shows the ids of runs. Times are those of this
    host's zone; a TIME without a zone is in that of the agent's host.

    With --json: one JSON object for each line.
    """
    if follow and until is not None:
        raise click.UsageError("--follow goes on with what is yet to come: leave --until out")
    most = lines if lines is not None else _MOST_LINES if since else _USUAL
    path = server_path(model_id, "logs")
    try:
        run = run_named(session.client, model_id, run) if run else run
        wanted = {"since": since, "until": until, "priority": priority, "run": run}
        query = {key: value for key, value in wanted.items() if value is not None}
        if follow:
            with suppress(KeyboardInterrupt):
                for entry in _followed(session, path, {**query, "lines": str(min(most, _MOST_AT_ONCE))}):
                    _show(session.screen, entry)
            return
        shown = 0
        for entry in _last(session, path, query, most):
            _show(session.screen, entry)
            shown += 1
        if run and not shown and most and not (since or until or priority):
            refuse_unknown(session.client, model_id, run)
    except UnreachableError as error:
        raise _without_agent(session, model_id, error) from None
    if not shown and not session.screen.as_json and session.screen.is_terminal(session.screen.out):
        session.screen.note(Cell(f"nothing like that is in the log of {model_id}", "dim"))


def _last(session: Session, path: str, query: Mapping[str, str], most: int) -> Iterator[_Entry]:
    """The last entries, oldest first; asked for in pages from the end."""
    pages: list[list[_Entry]] = []
    before: dict[str, str] = {}
    left = most
    while True:
        words = urlencode({**query, **before, "lines": min(left, _MOST_AT_ONCE)})
        answer = session.client.get(f"{path}?{words}", "entries")
        page = records(answer["entries"])
        pages.append(page)
        left -= len(page)
        if not page or left <= 0 or answer.get("truncated") is not True:
            break
        before = {"before": text(page[0].get("cursor"))}
    for page in reversed(pages):
        yield from page


def _followed(session: Session, path: str, query: Mapping[str, str]) -> Iterator[_Entry]:
    """The last entries and all that come, through restarts of the agent: by the last one's id nothing is lost."""

    def say(what: str) -> None:
        if not session.screen.as_json:
            session.screen.note(Cell("… ", "yellow"), Cell(what, "dim"))

    source = EventSource(
        session.client,
        f"{path}?{urlencode({**query, 'follow': 'true'})}",
        on_loss=lambda error: say(f"{error.message if error else 'the agent has ended the stream'}; trying again"),
        on_return=lambda: say("the agent is there again"),
    )
    for message in source:
        with suppress(ValueError, RecursionError):
            yield record(json.loads(message.data))


def _show(screen: Screen, entry: _Entry) -> None:
    if screen.as_json:
        screen.json_line(entry)
        return
    priority = number(entry.get("priority"))
    style = next((style for most, style in _STYLES if priority is None or priority <= most), "dim")
    is_systemds = entry.get("source") == "systemd"
    said_by = Cell("systemd: ", "cyan") if is_systemds else Cell("")
    screen.line(Cell(local_time(entry.get("at")), "dim"), "  ", said_by, Cell(text(entry.get("message")), style))


def _without_agent(session: Session, model_id: str, error: UnreachableError) -> UnreachableError:
    """Say where the log is while no agent answers."""
    if not is_on_this_host(session.client.address):
        return error
    return UnreachableError(
        f"{error.message}; the log is there without it: journalctl -t magi-llama-{model_id}", error.details
    )
