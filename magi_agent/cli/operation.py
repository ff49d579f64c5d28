"""Actions on several models: an operation in the agent, followed until it ends."""

import time
from collections.abc import Mapping

from magi_agent.cli.answers import record, text
from magi_agent.cli.client import Client, Reply, segment
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.live import LiveLines, live_lines
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted
from magi_agent.cli.screen import Screen
from magi_agent.cli.tables import failure_sentence, state_cell

_ENDED = frozenset({"succeeded", "failed"})
_LOOK_SECONDS = 0.3
_MARKS: Mapping[str, Cell] = {
    "succeeded": Cell("✓ ", "green"),
    "failed": Cell("✗ ", "red"),
    "skipped": Cell("- ", "yellow"),
}
_EXPLAINED = frozenset({"failed", "skipped"})
_NOTHING_TO_DO: Mapping[str, str] = {
    "start-all": "there is nothing to start",
    "stop-all": "there is nothing to stop",
    "restart-changed": "no server is due for a restart",
}


def follow(session: Session, action: str, seconds: int) -> int:
    """Ask for an action on several models, follow it for at most ``seconds``, and return the exit status."""
    return follow_started(session, action, session.client.request("POST", f"/api/models/servers/{action}"), seconds)


def follow_started(session: Session, action: str, reply: Reply, seconds: int) -> int:
    """Follow the operation that ``reply`` is about for at most ``seconds``, and return the exit status."""
    client, screen = session.client, session.screen
    path, operation = _where(reply), record(reply.body)
    try:
        if "models" not in operation:
            operation = client.get(path, "status", "models")
        with live_lines(screen) as live:
            operation = _followed(client, path, operation, seconds, live)
    except KeyboardInterrupt:
        screen.note(Cell("… ", "yellow"), f"{action} goes on in the agent; see how: magictl servers")
        return Exit.FAILED
    if screen.as_json:
        screen.json(operation)
    else:
        _show(screen, action, operation)
    status = text(operation.get("status"))
    as_asked = status == "succeeded" or (status not in _ENDED and not seconds)
    return Exit.OK if as_asked else Exit.FAILED


def _where(reply: Reply) -> str:
    """Return the operation's path: the answer's Location, as a path of this API whatever proxy stands between."""
    body = record(reply.body)
    told = text(body.get("id")) or text(body.get("operationId"))
    return f"/api/operations/{segment(told or reply.headers.get('location', '').rsplit('/', 1)[-1])}"


def _followed(
    client: Client, path: str, operation: Mapping[str, object], seconds: int, live: LiveLines | None
) -> Mapping[str, object]:
    begun = time.monotonic()
    while text(operation.get("status")) not in _ENDED:
        elapsed = time.monotonic() - begun
        if elapsed >= seconds:
            break
        if live is not None:
            models = record(operation.get("models"))
            live.show(
                [
                    (model_id, state_cell(text(record(step).get("state")) or "waiting"), elapsed)
                    for model_id, step in models.items()
                    if text(record(step).get("status")) not in _ENDED
                ]
            )
        time.sleep(min(_LOOK_SECONDS, seconds - elapsed))
        operation = client.get(path, "status", "models")
    return operation


def _show(screen: Screen, action: str, operation: Mapping[str, object]) -> None:
    models = {model_id: record(step) for model_id, step in record(operation.get("models")).items()}
    if not models:
        screen.line(_NOTHING_TO_DO.get(action, "there was nothing to start or stop"))
        return
    for model_id, step in models.items():
        status = text(step.get("status"))
        message = text(step.get("message")) or failure_sentence(step)
        screen.line(
            _MARKS.get(status, Cell("… ", "yellow")),
            Cell(model_id, "bold"),
            " ",
            Cell("skipped", "yellow") if status == "skipped" else state_cell(text(step.get("state")) or status),
            f"  {message}" if message and status in _EXPLAINED else "",
        )
    failed = sum(text(step.get("status")) == "failed" for step in models.values())
    if text(operation.get("status")) not in _ENDED:
        screen.note(f"{action} goes on in the agent; see how: magictl servers")
    elif failed:
        error = f"{counted(failed, 'model')} of {len(models)} did not do it; why: magictl servers"
        screen.failure(CommandError("OperationFailed", error))
