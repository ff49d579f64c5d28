"""``magictl enable`` and ``disable``: which models are in use."""

from collections.abc import Mapping

import click

from magi_agent.cli.answers import record
from magi_agent.cli.client import model_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.names import with_suggestion
from magi_agent.cli.options import Session
from magi_agent.cli.power import WAIT_SECONDS, act_on_each

_ids = click.argument("ids", nargs=-1, required=True, metavar="ID...", shell_complete=model_ids)
_now = click.option("--now", is_flag=True, help="Start or stop them too, and watch it done.")


@command("magictl enable smollm2-135m-instruct.q4_1", "magictl enable smollm2-135m-instruct.q4_1 --now")
@_ids
@_now
def enable(session: Session, ids: tuple[str, ...], now: bool) -> int:
    """Choose models to be in use: up whenever the host is.

    What runs now does not change without --now. With --json: one document for each model, and with --now another for
    its server.
    """
    return _choose(session, ids, enabled=True, now=now)


@command("magictl disable smollm2-135m-instruct.q4_1", "magictl disable smollm2-135m-instruct.q4_1 --now")
@_ids
@_now
def disable(session: Session, ids: tuple[str, ...], now: bool) -> int:
    """Choose models not to be in use.

    What runs now goes on without --now. With --json: one document for each model, and with --now another for its
    server.
    """
    return _choose(session, ids, enabled=False, now=now)


def _choose(session: Session, ids: tuple[str, ...], *, enabled: bool, now: bool) -> int:
    status: int = Exit.OK
    chosen: list[str] = []
    for model_id in dict.fromkeys(ids):
        try:
            _choose_one(session, model_id, enabled=enabled, now=now)
            chosen.append(model_id)
        except CommandError as error:
            explained = with_suggestion(session.client, error)
            session.screen.failure(explained)
            status = max(status, explained.exit_status)
            if explained.exit_status == Exit.UNREACHABLE:
                return status
    if now and chosen:
        status = max(status, act_on_each(session, "start" if enabled else "stop", chosen, WAIT_SECONDS))
    return status


def _choose_one(session: Session, model_id: str, *, enabled: bool, now: bool) -> None:
    reply = session.client.request("PUT", f"{model_path(model_id)}/enabled", {"enabled": enabled})
    screen = session.screen
    if screen.as_json:
        screen.json(reply.body)
        return
    left = "" if now else _what_is_left(record(reply.body), model_id)
    word = "enabled" if enabled else "disabled"
    screen.line(Cell("✓ ", "green"), Cell(model_id, "bold"), f" {word}", Cell(left, "yellow"))


def _what_is_left(body: Mapping[str, object], model_id: str) -> str:
    if body.get("restartRequired") is not True:
        return ""
    if body.get("enabled") is True:
        return f"; it does not run yet: magictl start {model_id}"
    return f"; it still runs: magictl stop {model_id}"
