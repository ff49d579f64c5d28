"""``magictl history``: what happened to a model's server, and who asked for it."""

from collections.abc import Iterable, Mapping
from typing import Final

import click

from magi_agent.cli.answers import records, text
from magi_agent.cli.client import model_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.grid import Cell, Column, Grid
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING, local_time
from magi_agent.cli.runs import SHOWN_DIGITS
from magi_agent.cli.tables import failure_facts

_MOST_EVENTS: Final = 1000
_STYLES: Final = {"started": "cyan", "ready": "green", "stopped": "dim", "failed": "bold red"}
_COLUMNS: Final = (Column("WHEN"), Column("EVENT"), Column("BY", 1), Column("RUN", 2), Column("WHAT", is_prose=True))


@command(
    "magictl history smollm2-135m-instruct.q4_1",
    "magictl history smollm2-135m-instruct.q4_1 -n 200 --json | jq '.events[] | select(.event == \"failed\")'",
)
@click.argument("model_id", metavar="ID", shell_complete=model_ids)
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, _MOST_EVENTS),
    default=20,
    show_default=True,
    help="How many, the last ones.",
)
def history(session: Session, model_id: str, limit: int) -> None:
    """Show what happened to a model's server, and who asked.

    That is when it was started, ready, stopped, or failed.

    It is as old as the journal of the agent's host. The log of a run: magictl logs ID --run RUN, with what stands
    there of the run's id.

    With --json: the answer of GET /api/models/ID/history.
    """
    answer = session.client.get(f"{model_path(model_id)}/history?limit={limit}", "events")
    if session.screen.as_json:
        session.screen.json(answer)
        return
    events = records(answer["events"])
    if not events:
        session.screen.note(Cell(f"nothing has happened to {model_id} that the journal knows of", "dim"))
        return
    session.screen.grid(Grid(_COLUMNS, tuple(_rows(events, model_id))))
    if answer.get("truncated") is True:
        session.screen.note(
            Cell(f"there is more: magictl history {model_id} -n {min(limit * 10, _MOST_EVENTS)}", "dim")
        )


def _rows(events: Iterable[Mapping[str, object]], model_id: str) -> Iterable[tuple[Cell, ...]]:
    for event in events:
        kind = text(event.get("event"))
        message = text(event.get("message")).removeprefix(f"server of {model_id} ").removeprefix(f"{kind}: ")
        known = ", ".join(fact for fact in failure_facts(event) if fact not in message) if kind == "failed" else ""
        yield (
            Cell(local_time(event.get("at"))),
            Cell(kind, _STYLES.get(kind, "")),
            Cell(text(event.get("by")) or NOTHING),
            Cell(text(event.get("invocationId"))[:SHOWN_DIGITS] or NOTHING, "dim"),
            Cell(f"{message} ({known})" if known else message),
        )
