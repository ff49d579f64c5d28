"""``magictl events``: what changes in the agent, as it changes."""

import json
from collections.abc import Mapping
from datetime import datetime
from urllib.parse import urlencode

import click

from magi_agent.cli.answers import record, text, texts
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.event_source import EventSource
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import number, seconds_taken, size
from magi_agent.cli.screen import Screen
from magi_agent.cli.tables import state_cell
from magi_agent.vocabulary import EventType

_Line = list[Cell | str]


@command(
    "magictl events",
    "magictl events qwen3-8b-q4_k_m --type serverChanged",
    "magictl events --json | jq -r 'select(.after == \"failed\").modelId'",
)
@click.argument("ids", nargs=-1, metavar="[ID]...", shell_complete=model_ids)
@click.option(
    "--type",
    "types",
    multiple=True,
    type=click.Choice([kind.value for kind in EventType]),
    help="Only this kind; may be given repeatedly.",
)
@click.option("-n", "--count", type=click.IntRange(1), metavar="COUNT", help="End after as many events.")
def events(session: Session, ids: tuple[str, ...], types: tuple[str, ...], count: int | None) -> int:
    """Show what changes, as it changes, until Ctrl-C.

    With ids, only what is about these models. An agent that goes away is waited for, and what it remembers of the
    meantime is shown; where something is missing, that is said.

    With --json: one JSON object in each line.
    """
    screen = session.screen
    query = urlencode([*(("types", name) for name in types), *(("modelId", name) for name in ids)])
    source = EventSource(
        session.client,
        f"/api/events?{query}" if query else "/api/events",
        on_loss=lambda error: _say_loss(screen, error),
        on_return=lambda: _say_return(screen),
    )
    shown = 0
    try:
        for message in source:
            try:
                event = record(json.loads(message.data))
            except (ValueError, RecursionError):
                continue
            if screen.as_json:
                screen.text(json.dumps(event) + "\n")
            else:
                screen.line(*line_of(event))
            shown += text(event.get("type")) != "gap"
            if shown == count:
                break
    except KeyboardInterrupt:
        pass
    return Exit.OK


def _say_loss(screen: Screen, error: CommandError | None) -> None:
    if not screen.as_json:
        why = error.message if error else "the agent has ended the stream; it may be restarting"
        screen.note(Cell("… ", "yellow"), Cell(f"{why}; trying again", "dim"))


def _say_return(screen: Screen) -> None:
    if not screen.as_json:
        screen.note(Cell("… ", "yellow"), Cell("the agent is there again", "dim"))


def line_of(event: Mapping[str, object]) -> _Line:
    """Return one event as a line: when, and what in words."""
    return [Cell(f"{_time(event.get('at'))}  ", "dim"), *_words(event)]


def _words(event: Mapping[str, object]) -> _Line:
    model = Cell(text(event.get("modelId")), "bold")
    name, by = text(event.get("name")), text(event.get("by"))
    match text(event.get("type")):
        case EventType.SERVER_CHANGED:
            return [model, "  ", state_cell(event.get("before")), " -> ", *_state_after(event)]
        case EventType.SERVER_PROGRESS:
            return [model, Cell(f"  {_progress(event)}", "dim")]
        case EventType.SERVER_TROUBLED:
            return [model, "  ", Cell(text(event.get("message")), "yellow")]
        case EventType.CHOICES_CHANGED:
            return [model, "  what is chosen for it has changed"]
        case EventType.MODELS_CHANGED:
            return [Cell("models", "bold"), f"  {_models(event)}"]
        case EventType.PROFILES_CHANGED:
            return [Cell(f"profile {name}", "bold"), "  was made, replaced or deleted"]
        case EventType.PROFILE_ACTIVATED:
            return [Cell(f"profile {name}", "bold"), "  is active", Cell(f" (by {by})", "dim")]
        case EventType.CONFIGURATION_RELOADED:
            return [Cell("configuration", "bold"), f"  was read again; {_reloaded(event)}"]
        case EventType.OPERATION_FINISHED:
            outcome = Cell("succeeded", "green") if event.get("succeeded") is True else Cell("failed", "bold red")
            return [Cell(text(event.get("kind")), "bold"), "  ", outcome]
        case EventType.DRAIN_CHANGED:
            said = "nothing is started any more" if event.get("draining") is True else "servers are started again"
            return [Cell("drain", "bold"), f"  {said}", Cell(f" (by {by})", "dim")]
        case "gap":
            return [Cell("gap", "bold yellow"), f"  {text(event.get('message'))}"]
        case kind:
            return [Cell(kind or "event", "bold"), f"  {json.dumps(event)}"]


def _state_after(event: Mapping[str, object]) -> _Line:
    said = text(record(event.get("failure")).get("message"))
    by_force = [Cell(" (by force)", "yellow")] if event.get("forced") is True else []
    return [state_cell(event.get("after")), *by_force, *([Cell(f": {said}", "red")] if said else [])]


def _progress(event: Mapping[str, object]) -> str:
    told = [f"not ready yet, {seconds_taken(number(event.get('elapsedSeconds')) or 0.0)}"]
    if number(event.get("memoryBytes")) is not None:
        told.append(f"{size(event.get('memoryBytes'))} in memory")
    if number(event.get("readBytes")) is not None:
        of_all = f" of {size(event['modelBytes'])}" if number(event.get("modelBytes")) else ""
        told.append(f"{size(event.get('readBytes'))}{of_all} read")
    return ", ".join(told)


def _models(event: Mapping[str, object]) -> str:
    told = [
        f"{word}: {', '.join(ids)}"
        for key, word in (("added", "new"), ("changed", "changed"), ("removed", "gone"))
        if (ids := texts(event.get(key)))
    ]
    if unlisted := number(event.get("unlisted")):
        told.append(f"and {unlisted:.0f} more")
    return "; ".join(told)


def _reloaded(event: Mapping[str, object]) -> str:
    changed, waiting = texts(event.get("changed")), texts(event.get("awaitingRestart"))
    told = f"changed: {', '.join(changed)}" if changed else "nothing has changed"
    return f"{told}; waits for a restart of the agent: {', '.join(waiting)}" if waiting else told


def _time(value: object) -> str:
    try:
        return datetime.fromisoformat(text(value)).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return "--:--:--"
