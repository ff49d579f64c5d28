"""``magictl logs``: a server's log, from the journal.

The journal is where it lives, so it can be read when the agent is down. journalctl takes this process's place.
"""

import os
import re
import sys

import click

from magi_agent.cli.address import is_on_this_host
from magi_agent.cli.answers import record, text
from magi_agent.cli.client import model_path, no_such_model
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.exits import CommandError, RefusedError, UnreachableError
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.vocabulary import Scope

_MODEL_ID = re.compile(r"[a-z0-9._-]{1,200}")
_MOST_LINES = 1_000_000
_NOT_NOW = 503


@command(
    "magictl logs smollm2-135m-instruct.q4_1",
    "magictl logs smollm2-135m-instruct.q4_1 -f",
    "magictl logs smollm2-135m-instruct.q4_1 -n 500 --since '10 min ago'",
)
@click.argument("model_id", metavar="ID", shell_complete=model_ids)
@click.option("-n", "--lines", type=click.IntRange(0, _MOST_LINES), help="How many lines. [default: 50, or all since]")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on, until Ctrl-C.")
@click.option("--since", metavar="TIME", help="Only what is newer, in any form that journalctl knows.")
def logs(session: Session, model_id: str, lines: int | None, follow: bool, since: str | None) -> None:
    """Show the log of a model's server, of earlier runs too.

    The journal is this host's, so an agent elsewhere is not asked.

    With --json: one JSON object for each line, as journalctl writes it.
    """
    address = session.client.address
    if not is_on_this_host(address):
        raise CommandError(
            "JournalElsewhere",
            f"the logs are in the journal of the agent's host, and {address} may be another; run magictl logs there",
            {"address": str(address)},
        )
    scope = _scope(session, model_id)
    directory = os.environ.get("MAGI_JOURNAL_DIRECTORY")
    command_line = journal_command(
        model_id,
        scope,
        os.getuid(),
        lines=lines if lines is not None else None if since else 50,
        follow=follow,
        since=since,
        as_json=session.as_json,
        to_person=session.screen.is_terminal(sys.stdout),
        directory=directory,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(command_line[0], command_line)  # noqa: S606  # no shell is what we want
    except FileNotFoundError:
        raise CommandError(
            "JournalUnavailable", "there is no journalctl here; the logs are in systemd's journal"
        ) from None
    except OSError as error:
        raise CommandError("JournalUnavailable", f"cannot run journalctl: {error.strerror}") from None


def journal_command(
    model_id: str,
    scope: Scope,
    user: int,
    *,
    lines: int | None,
    follow: bool,
    since: str | None,
    as_json: bool,
    to_person: bool,
    directory: str | None,
) -> list[str]:
    """Return the journalctl command line for one server's log.

    Fields that begin with ``_`` are the journal's own word; any process may claim a ``SYSLOG_IDENTIFIER``, so in the
    system scope it counts for nothing. A user manager's journal may lack the unit's field, so there the identifier is
    matched, of the same user's processes only. Fields: systemd.journal-fields(7). A person is told what journalctl
    has to say beside the log: that there is nothing, or that the journal may not be read.
    """
    unit = f"magi-llama-{model_id}.service"
    words = ["journalctl", "--no-pager", "--output=json" if as_json else "--output=short-iso"]
    if as_json or not to_person:
        words.append("--quiet")
    if not as_json:
        words.append("--no-hostname")
    if directory:
        words.append(f"--directory={directory}")
    if lines is not None:
        words.append(f"--lines={lines}")
    if since is not None:
        words.append(f"--since={since}")
    if follow:
        words.append("--follow")
    if scope is Scope.SYSTEM:
        return [*words, f"_SYSTEMD_UNIT={unit}", "+", f"UNIT={unit}", "_PID=1"]
    own = [f"_UID={user}"] if user else []
    matches = [f"_SYSTEMD_USER_UNIT={unit}", *own, "+", f"USER_UNIT={unit}", *own]
    return [*words, *matches, "+", f"SYSLOG_IDENTIFIER=magi-llama-{model_id}", *own]


def _scope(session: Session, model_id: str) -> Scope:
    """Make sure that there is such a model, and return whose manager runs its server."""
    if not _MODEL_ID.fullmatch(model_id):
        raise no_such_model(model_id)
    try:
        session.client.get(model_path(model_id), "modelId")
        health = session.client.request("GET", "/health/ready", also_accept=frozenset({_NOT_NOW})).body
        told = text(record(health).get("systemdScope"))
    except (UnreachableError, RefusedError) as error:
        if isinstance(error, RefusedError) and error.http_status != _NOT_NOW:
            raise
        session.screen.note(
            Cell("magictl: ", "yellow"), f"{error.message.split(';')[0]}; reading the journal without the agent"
        )
        told = os.environ.get("MAGI_SYSTEMD_SCOPE", "")
    return Scope.USER if told == Scope.USER.value else Scope.SYSTEM
