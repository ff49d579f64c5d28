"""``magictl rescan``: the model folders are read again, now."""

from functools import partial

from magi_agent.cli.answers import record
from magi_agent.cli.command import command
from magi_agent.cli.exits import Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.live import live_lines
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted, number, seconds_taken
from magi_agent.cli.waiting import Errand, Errands

RESCAN_SECONDS = 900.0
"""A first scan of some thousand headers on a slow disk takes minutes."""

_LOOK_SECONDS = 0.5


@command("magictl rescan", "magictl rescan --json")
def rescan(session: Session) -> int:
    """Read the model folders again, now.

    The agent sees new files by itself; this is for those who cannot wait. No choice and no server is touched.
    """
    screen = session.screen
    ask = partial(session.client.request, "POST", "/api/models/rescan", timeout=RESCAN_SECONDS)
    errand = Errand("the model folders", ask)
    errands = Errands([errand])
    try:
        with live_lines(screen) as live:
            errands.begin()
            while not errands.wait(_LOOK_SECONDS):
                if live is not None:
                    live.show([(errand.name, Cell("being read", "cyan"), errand.seconds)])
    except KeyboardInterrupt:
        screen.note(Cell("… ", "yellow"), "the agent goes on reading the model folders; what it found: magictl models")
        return Exit.FAILED
    answer = errand.result().body
    if screen.as_json:
        screen.json(answer)
        return Exit.OK
    body = record(answer)
    counts = {name: int(number(body.get(name)) or 0) for name in ("modelsFound", "modelsAdded", "modelsRemoved")}
    screen.line(
        Cell("✓ ", "green"),
        f"{counted(counts['modelsFound'], 'model')} found, {counts['modelsAdded']} new, {counts['modelsRemoved']} gone",
        Cell(f" ({seconds_taken(errand.seconds)})", "dim"),
    )
    return Exit.OK
