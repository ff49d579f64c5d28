"""``magictl drain``: the agent starts nothing more, so that the host can be taken out of service."""

import click

from magi_agent.cli.answers import record, text
from magi_agent.cli.command import command
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import moment


@command("magictl drain", "magictl drain --off")
@click.option("--off", is_flag=True, help="End it: starts are possible again.")
def drain(session: Session, off: bool) -> None:
    """Start nothing more on this host; what runs goes on.

    /health/ready says so ("draining"), and its status stays as it was. With --json: the answer of PUT /api/drain.
    """
    answer = session.client.request("PUT", "/api/drain", {"draining": not off}).body
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return
    if off:
        screen.line(Cell("✓ ", "green"), "models can be started again")
        return
    since = record(answer).get("since")
    said = f"  since {moment(since)}" if text(since) else ""
    screen.line(Cell("✓ ", "green"), "draining: nothing is started", Cell(said, "dim"))
    screen.note("  what runs goes on; stop it: magictl stop --all; end the draining: magictl drain --off")
