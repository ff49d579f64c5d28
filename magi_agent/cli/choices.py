"""``magictl enable``, ``disable`` and ``rescan``: what is in use, and what there is."""

from collections.abc import Mapping

import click

from magi_agent.cli.answers import record
from magi_agent.cli.client import segment
from magi_agent.cli.command import command
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.names import with_suggestion
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted, number

RESCAN_SECONDS = 900.0
"""A first scan of some thousand headers on a slow disk takes minutes."""

_ids = click.argument("ids", nargs=-1, required=True, metavar="ID...")
_now = click.option("--now", is_flag=True, help="Start or stop it at once, too.")


@command("magictl enable smollm2-135m-instruct.q4_1", "magictl enable smollm2-135m-instruct.q4_1 --now")
@_ids
@_now
def enable(session: Session, ids: tuple[str, ...], now: bool) -> int:
    """Choose models to be in use: up whenever the host is.

    What runs now does not change without --now.
    """
    return _choose(session, ids, enabled=True, now=now)


@command("magictl disable smollm2-135m-instruct.q4_1", "magictl disable smollm2-135m-instruct.q4_1 --now")
@_ids
@_now
def disable(session: Session, ids: tuple[str, ...], now: bool) -> int:
    """Choose models not to be in use.

    What runs now goes on without --now.
    """
    return _choose(session, ids, enabled=False, now=now)


def _choose(session: Session, ids: tuple[str, ...], *, enabled: bool, now: bool) -> int:
    status: int = Exit.OK
    for model_id in dict.fromkeys(ids):
        try:
            _choose_one(session, model_id, enabled=enabled, now=now)
        except CommandError as error:
            explained = with_suggestion(session.client, error)
            session.screen.failure(explained)
            status = max(status, explained.exit_status)
            if explained.exit_status == Exit.UNREACHABLE:
                break
    return status


def _choose_one(session: Session, model_id: str, *, enabled: bool, now: bool) -> None:
    query = "?apply=true" if now else ""
    reply = session.client.request("PUT", f"/api/models/{segment(model_id)}/enabled{query}", {"enabled": enabled})
    screen = session.screen
    if screen.as_json:
        screen.json(reply.body)
        return
    body = record(reply.body)
    word = "enabled" if enabled else "disabled"
    screen.line(Cell("✓ ", "green"), Cell(model_id, "bold"), f" {word}", Cell(_what_is_left(body, model_id), "yellow"))


def _what_is_left(body: Mapping[str, object], model_id: str) -> str:
    if body.get("restartRequired") is not True:
        return ""
    if body.get("enabled") is True:
        return f"; it does not run as chosen yet: magictl start {model_id}"
    return f"; it still runs: magictl stop {model_id}"


@command("magictl rescan", "magictl rescan --json")
def rescan(session: Session) -> None:
    """Read the model folders again, now.

    The agent sees new files by itself; this is for those who cannot wait. No choice and no server is touched.
    """
    screen = session.screen
    answer = session.client.request("POST", "/api/models/rescan", timeout=RESCAN_SECONDS).body
    if screen.as_json:
        screen.json(answer)
        return
    body = record(answer)
    counts = {name: int(number(body.get(name)) or 0) for name in ("modelsFound", "modelsAdded", "modelsRemoved")}
    screen.line(
        Cell("✓ ", "green"),
        f"{counted(counts['modelsFound'], 'model')} found, {counts['modelsAdded']} new, {counts['modelsRemoved']} gone",
    )
