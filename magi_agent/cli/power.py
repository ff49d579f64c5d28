"""``magictl start``, ``stop`` and ``restart``: told to the agent, and watched until done."""

from collections.abc import Iterable, Mapping
from functools import partial

import click

from magi_agent.cli.answers import record, records, text
from magi_agent.cli.client import Client, Reply, server_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids, running_ids
from magi_agent.cli.exits import CommandError, Exit, UnreachableError
from magi_agent.cli.grid import Cell
from magi_agent.cli.live import LiveLines, live_lines
from magi_agent.cli.names import with_suggestion
from magi_agent.cli.operation import follow
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import number, seconds_taken
from magi_agent.cli.refusals import show_refusal
from magi_agent.cli.screen import Screen
from magi_agent.cli.tables import failure_facts, failure_lines, log_lines, state_cell
from magi_agent.cli.waiting import Errand, Errands

WAIT_SECONDS = 600
"""How long an outcome is waited for where ``--wait`` says nothing else."""

LONGEST_WAIT_SECONDS = 3600
"""More the agent does not take for ``?wait=``."""

_ANSWER_SECONDS = 15.0
_LOOK_SECONDS = 0.5
"""How often the state is asked for while the outcome is awaited."""
_LOOK_UP_SECONDS = 5.0
_ACCEPTED = 202
_UNDER_WAY: Mapping[str, str] = {"start": "starting", "stop": "stopping", "restart": "restarting"}
_GOES_ON: Mapping[str, str] = {"start": "goes on loading", "stop": "goes on stopping", "restart": "goes on restarting"}
_DONE: Mapping[str, str] = {"start": "started", "stop": "stopped", "restart": "restarted"}

_ids = click.argument("ids", nargs=-1, metavar="[ID]...", shell_complete=model_ids)
_ids_running = click.argument("ids", nargs=-1, metavar="[ID]...", shell_complete=running_ids)
_all_in_use = click.option("--all", "everything", is_flag=True, help="All models that are in use.")
_all_running = click.option("--all", "everything", is_flag=True, help="All models that run.")
no_wait_option = click.option("--no-wait", is_flag=True, help="Tell the agent, and do not wait for the outcome.")
wait_option = click.option(
    "--wait",
    "seconds",
    type=click.IntRange(1, LONGEST_WAIT_SECONDS),
    default=WAIT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the outcome.",
)

_force = click.option("--force", is_flag=True, help="Start them also where they do not fit into memory.")


@command("magictl start smollm2-135m-instruct.q4_1", "magictl start --all", "magictl start big-model --no-wait")
@_ids
@_all_in_use
@_force
@no_wait_option
@wait_option
def start(session: Session, ids: tuple[str, ...], everything: bool, force: bool, no_wait: bool, seconds: int) -> int:
    """Start models, and watch them load.

    Ctrl-C ends the watching only: the agent goes on loading.
    """
    return _act(session, "start", ids, "all" if everything else None, 0 if no_wait else seconds, force=force)


@command("magictl stop smollm2-135m-instruct.q4_1", "magictl stop --all")
@_ids_running
@_all_running
@no_wait_option
@wait_option
def stop(session: Session, ids: tuple[str, ...], everything: bool, no_wait: bool, seconds: int) -> int:
    """Stop models that run. They stay stopped until they are started, or the host is."""
    return _act(session, "stop", ids, "all" if everything else None, 0 if no_wait else seconds)


@command("magictl restart smollm2-135m-instruct.q4_1", "magictl restart --changed")
@_ids_running
@click.option("--changed", is_flag=True, help="All that run with other settings, or another llama-server, than is due.")
@_force
@no_wait_option
@wait_option
def restart(session: Session, ids: tuple[str, ...], changed: bool, force: bool, no_wait: bool, seconds: int) -> int:
    """Stop models and start them again, with their present settings.

    With --changed one after the other, which ends at the first that fails.
    """
    return _act(session, "restart", ids, "changed" if changed else None, 0 if no_wait else seconds, force=force)


def _act(
    session: Session, verb: str, ids: tuple[str, ...], several: str | None, seconds: int, *, force: bool = False
) -> int:
    """Act on ``ids``, or on the ``several`` that the agent finds."""
    if bool(ids) == bool(several):
        option = "--changed" if verb == "restart" else "--all"
        raise click.UsageError(f"name the models to {verb}, or {option}", click.get_current_context())
    if several and force:
        raise click.UsageError("--force goes with the names of models", click.get_current_context())
    if several:
        return follow(session, f"{verb}-{several}", seconds)
    return act_on_each(session, verb, ids, seconds, force=force)


def act_on_each(session: Session, verb: str, ids: Iterable[str], seconds: int, *, force: bool = False) -> int:
    """Start, stop or restart models, wait at most ``seconds`` for each, say what came of it; return the exit status."""
    client = session.client
    errands = Errands([Errand(name, partial(_ask, client, verb, name, seconds, force)) for name in dict.fromkeys(ids)])
    try:
        with live_lines(session.screen) as live:
            errands.begin()
            _watch(client, verb, errands, live)
    except KeyboardInterrupt:
        return _left_alone(session, verb, errands, seconds)
    return _report_all(session, verb, errands.all, seconds)


def _ask(client: Client, verb: str, model_id: str, seconds: int, force: bool) -> Reply:
    query = "&".join([*([f"wait={seconds}"] if seconds else ()), *(["force=true"] if force else ())])
    path = f"{server_path(model_id, verb)}{f'?{query}' if query else ''}"
    return client.request("POST", path, timeout=seconds + _ANSWER_SECONDS, is_long=seconds > 0)


def _watch(client: Client, verb: str, errands: Errands, live: LiveLines | None) -> None:
    """Wait until all have ended; show the state of those under way meanwhile, where somebody looks."""
    states: Mapping[str, str] = {}
    while not errands.wait(_LOOK_SECONDS):
        if live is None:
            continue
        states = _states(client) or states
        live.show(
            [
                (errand.name, state_cell(states.get(errand.name, _UNDER_WAY[verb])), errand.seconds)
                for errand in errands.all
                if errand.begun and not errand.ended
            ]
        )


def _states(client: Client) -> Mapping[str, str]:
    """Return each server's state; nothing where the agent is too busy to say."""
    try:
        answer = client.get("/api/models/servers", timeout=_LOOK_UP_SECONDS)
    except CommandError:
        return {}
    return {text(server.get("modelId")): text(server.get("state")) for server in records(record(answer).get("servers"))}


def _left_alone(session: Session, verb: str, errands: Errands, seconds: int) -> int:
    """Say what goes on after Ctrl-C, and which had ended before it."""
    status = _report_all(session, verb, [errand for errand in errands.all if errand.ended], seconds)
    waiting = [errand.name for errand in errands.all if errand.begun and not errand.ended]
    untold = [errand.name for errand in errands.all if not errand.begun]
    if waiting:
        session.screen.note(
            Cell("… ", "yellow"), f"{', '.join(waiting)}: {_GOES_ON[verb]} in the agent; see how: magictl servers"
        )
    if untold:
        session.screen.note(Cell("! ", "yellow"), f"the agent was not told yet to {verb} {', '.join(untold)}")
    return max(status, Exit.FAILED)


def _report_all(session: Session, verb: str, errands: Iterable[Errand], seconds: int) -> int:
    """Write what came of each errand; that the agent is not there is said once."""
    status: int = Exit.OK
    said: set[str] = set()
    for errand in errands:
        try:
            status = max(status, _report(session, verb, errand, seconds))
        except UnreachableError as error:
            if error.message not in said:
                session.screen.failure(error)
            said.add(error.message)
            status = max(status, error.exit_status)
    return status


def _report(session: Session, verb: str, errand: Errand, seconds: int) -> int:
    """Write what came of one errand, and return its exit status. Raises ``UnreachableError``."""
    screen = session.screen
    try:
        reply = errand.result()
    except UnreachableError:
        raise
    except CommandError as error:
        explained = with_suggestion(session.client, error)
        show_refusal(screen, explained)
        if not screen.as_json:
            show_failure_details(screen, explained.details, explained.message)
        return explained.exit_status
    if screen.as_json:
        screen.json(reply.body)
    else:
        _show_success(screen, verb, errand, reply)
    if reply.status == _ACCEPTED and seconds:
        screen.failure(CommandError("TimedOut", f"{errand.name} is not through after {seconds} s"))
        return Exit.FAILED
    return Exit.OK


def _show_success(screen: Screen, verb: str, errand: Errand, reply: Reply) -> None:
    body = record(reply.body)
    server = record(body.get("server"))
    state = text(server.get("state"))
    if reply.status == _ACCEPTED:
        screen.line(Cell("… ", "yellow"), Cell(errand.name, "bold"), f": {_GOES_ON[verb]}; see how: magictl servers")
        return
    done = state or _DONE[verb]
    said: list[Cell | str] = [Cell("✓ ", "green"), Cell(errand.name, "bold"), " ", state_cell(done)]
    port = number(server.get("port"))
    if state in {"ready", "degraded"} and port is not None:
        said.append(f" on port {port:.0f}")
    said.append(
        Cell(" (was already)" if body.get("changed") is False else f" ({seconds_taken(errand.seconds)})", "dim")
    )
    screen.line(*said)
    if state == "degraded":
        screen.note("  ", failure_lines(server)[0])


def show_failure_details(screen: Screen, failure: Mapping[str, object], said: str) -> None:
    """Write what an error carries beyond its sentence ``said``: how it ended, what to do, the last lines of the log."""
    facts = failure_facts(failure)
    if facts and any(fact not in said for fact in facts):
        screen.note("  ", ", ".join(facts))
    advice = text(failure.get("advice"))
    if advice and advice not in said:
        screen.note("  ", Cell(advice, "bold"))
    screen.log_lines(log_lines(failure))
