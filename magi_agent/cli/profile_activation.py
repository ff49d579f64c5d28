"""``magictl profile activate``: what it would change, and changing it."""

from collections.abc import Iterator, Mapping

import click

from magi_agent.cli.answers import record, text, texts
from magi_agent.cli.client import profile_path
from magi_agent.cli.command import command
from magi_agent.cli.exits import Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.operation import follow_started
from magi_agent.cli.options import Session
from magi_agent.cli.power import no_wait_option, wait_option
from magi_agent.cli.profiles import name_argument
from magi_agent.cli.screen import Screen
from magi_agent.cli.sheet import Fact, write_section

_STEPS = ("start", "stop", "enable", "disable", "keep")
_LABEL_WIDTH = 12


@command("magictl profile activate evening --dry-run", "magictl profile activate evening")
@name_argument
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@no_wait_option
@wait_option
def activate(session: Session, name: str, dry_run: bool, no_wait: bool, seconds: int) -> int:
    """Have exactly a profile's models in use.

    Its models are enabled and started where they do not run, all others are disabled and stopped; what runs and stays
    is not touched. Ctrl-C ends the watching only.

    With --json: the answer of POST /api/models/profiles/NAME/activate, and where something is started or stopped, the
    operation as another document.
    """
    screen = session.screen
    query = "?dryRun=true" if dry_run else ""
    reply = session.client.request("POST", f"{profile_path(name)}/activate{query}")
    plan = record(reply.body)
    if screen.as_json:
        screen.json(reply.body)
    else:
        _show(screen, name, plan, dry_run=dry_run)
    if dry_run or not (plan.get("operationId") and (texts(plan.get("start")) or texts(plan.get("stop")))):
        return Exit.OK
    if not screen.as_json:
        screen.line("")
    return follow_started(session, "the activation", reply, 0 if no_wait else seconds)


def _show(screen: Screen, name: str, plan: Mapping[str, object], *, dry_run: bool) -> None:
    slug = text(plan.get("profile")) or name
    if not dry_run:
        screen.line(Cell("✓ ", "green"), Cell(slug, "bold"), " is the active profile")
    facts = list(_changes(plan))
    if facts:
        write_section(screen, "What would change" if dry_run else "What changes", facts, label_width=_LABEL_WIDTH)
    else:
        screen.line("nothing would change" if dry_run else "nothing had to change")
    if restart := texts(plan.get("restart")):
        what = "the profile says otherwise of" if dry_run else "other settings hold now for"
        screen.note(
            Cell("! ", "yellow"),
            f"{what} {', '.join(restart)}, which are not restarted for it: magictl restart --changed",
        )
    if absent := texts(plan.get("absent")):
        screen.note(Cell("! ", "yellow"), f"not there now, and in use when they come back: {', '.join(absent)}")
    for unknown in texts(plan.get("unknown")):
        screen.note(Cell("! ", "yellow"), f"{unknown}: no model has this id")
    for model_id, problem in record(plan.get("unusable")).items():
        screen.note(Cell("! ", "yellow"), f"{model_id} cannot be used: {problem}")
    for model_id, warnings in record(plan.get("warnings")).items():
        for warning in texts(warnings):
            screen.note(Cell("! ", "yellow"), f"{model_id}: {warning}")
    refused = (record(plan.get(key)).values() for key in ("insufficientMemory", "settingsNotUsable"))
    for problem in texts([problem for problems in refused for problem in problems]):
        screen.note(Cell("! ", "yellow"), problem)


def _changes(plan: Mapping[str, object]) -> Iterator[Fact]:
    listed = {step: texts(plan.get(step)) for step in _STEPS}
    if not any(listed[step] for step in _STEPS if step != "keep"):
        return
    for step, ids in listed.items():
        if ids:
            yield Fact(step, Cell(", ".join(ids), "dim" if step == "keep" else ""))
