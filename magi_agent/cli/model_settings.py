"""``magictl settings``: how one model's server is run."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from magi_agent.cli.answers import record, text, texts
from magi_agent.cli.client import Client, Json, model_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids, setting_keys, setting_words
from magi_agent.cli.exits import CommandError, Exit, RefusedError
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted
from magi_agent.cli.power import WAIT_SECONDS, act_on_each
from magi_agent.cli.refusals import show_refusal
from magi_agent.cli.screen import Screen
from magi_agent.cli.setting_words import WrongWordError, assigned, setting_of, summary
from magi_agent.cli.sheet import Fact, write_section
from magi_agent.runtime_settings.settings import setting_names, wire_name

LABEL_WIDTH = max(len(name) for name in setting_names())
SOURCES: Mapping[str, str] = {
    "model": "set for the model",
    "profile": "from the profile",
    "tier": "the tier's default",
    "host": "the host's default",
}
_LARGEST_FILE = 1024 * 1024


@command(
    "magictl settings smollm2-135m-instruct.q4_1",
    "magictl settings smollm2-135m-instruct.q4_1 ctx_size=8k n_gpu_layers=all --now",
    "magictl settings big-model --unset ctx_size memory_max=24G",
    "magictl settings --list",
    name="settings",
)
@click.argument("model_id", metavar="ID", required=False, shell_complete=model_ids)
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=setting_words)
@click.option("--unset", multiple=True, metavar="KEY", shell_complete=setting_keys, help="Leave KEY to the defaults.")
@click.option("--clear", is_flag=True, help="Leave everything to the defaults.")
@click.option("--file", "source", type=click.Path(), metavar="FILE", help="Take all from a JSON file; - is input.")
@click.option("--now", is_flag=True, help="Restart the server where that is due, and watch it done.")
@click.option("--list", "as_list", is_flag=True, help="Describe every setting there is.")
def settings(
    session: Session,
    model_id: str | None,
    words: tuple[str, ...],
    unset: tuple[str, ...],
    clear: bool,
    source: str | None,
    now: bool,
    as_list: bool,
) -> int:
    """Show or choose how a model's server is run.

    What is not named stays as it is; with --file and --clear nothing does. Keys are in snake_case or camelCase; bytes
    may be written as 24G, tokens as 32k. What runs now does not change without --now.

    With --json: the answer of GET or PUT /api/models/ID/settings, with --now another document for the server, and with
    --list the settings' JSON schema.
    """
    if as_list:
        if model_id or words or unset or clear or source or now:
            raise click.UsageError("--list goes with nothing else", click.get_current_context())
        _describe_all(session.screen)
        return Exit.OK
    if model_id is None or "=" in model_id:
        raise click.UsageError("name the model, or --list", click.get_current_context())
    try:
        named = dict(assigned(word) for word in words)
        dropped = {setting_of(key) for key in unset}
    except WrongWordError as error:
        raise click.UsageError(str(error), click.get_current_context()) from None
    if source is not None and (clear or named or dropped):
        raise click.UsageError("--file takes the place of all; give nothing beside it", click.get_current_context())
    if source is not None:
        return _choose(session, model_id, _read_file(source), now=now)
    if not (named or dropped or clear):
        return _show_or_apply(session, model_id, now=now)
    chosen = {} if clear else dict(record(_asked(session.client, model_id).get("runtimeSettings")))
    for name in dropped:
        chosen.pop(wire_name(name), None)
    chosen |= {wire_name(name): value for name, value in named.items()}
    return _choose(session, model_id, chosen, now=now)


def setting_facts(document: Mapping[str, object]) -> Iterator[Fact]:
    """Yield each setting that holds, with where it comes from, from the answer of GET /api/models/{id}/settings."""
    chosen, effective = record(document.get("runtimeSettings")), record(document.get("effective"))
    sources = record(document.get("sources"))
    for name in setting_names():
        key = wire_name(name)
        value = effective.get(key)
        if value is None:
            continue
        source = text(sources.get(key))
        remark = SOURCES.get(source, source)
        own = chosen.get(key)
        if own is not None and own != value:
            remark += f"; the model's own is {summary(name, own)}"
        yield Fact(name, Cell(summary(name, value)), f"({remark})" if remark else "")


def say_warnings(screen: Screen, document: Mapping[str, object]) -> None:
    """Write what holds and will hardly do, of an answer about a model's settings."""
    for warning in texts(document.get("warnings")):
        screen.note(Cell("! ", "yellow"), warning)


def _asked(client: Client, model_id: str) -> dict[str, object]:
    return client.get(_path(model_id), "runtimeSettings", "effective")


def _path(model_id: str) -> str:
    return f"{model_path(model_id)}/settings"


def _show_or_apply(session: Session, model_id: str, *, now: bool) -> int:
    screen = session.screen
    if now:
        server = record(session.client.get(model_path(model_id), "server").get("server"))
        if server.get("restartRequired") is True:
            return act_on_each(session, "restart", [model_id], WAIT_SECONDS)
    document = _asked(session.client, model_id)
    if screen.as_json:
        screen.json(document)
        return Exit.OK
    facts = list(setting_facts(document))
    screen.line(Cell(model_id, "bold"))
    write_section(screen, "Settings", facts, label_width=max([len(fact.label) for fact in facts], default=0))
    say_warnings(screen, document)
    if not facts:
        screen.line("nothing is set: llama-server's own defaults hold; what there is: magictl settings --list")
    return Exit.OK


def _read_file(source: str) -> dict[str, object]:
    try:
        content = sys.stdin.read(_LARGEST_FILE) if source == "-" else Path(source).read_text()[:_LARGEST_FILE]
        document = json.loads(content.removeprefix("\ufeff"))
    except OSError as error:
        raise CommandError("FileUnreadable", f"cannot read {source}: {error.strerror}", {"file": source}) from None
    except ValueError as error:
        raise CommandError("FileUnreadable", f"{source} is no JSON: {error}", {"file": source}) from None
    except RecursionError:
        raise CommandError("FileUnreadable", f"{source} is nested too deeply", {"file": source}) from None
    # What --json printed can be given back.
    settings = document.get("runtimeSettings", document) if isinstance(document, dict) else document
    if not isinstance(settings, dict):
        raise CommandError("FileUnreadable", f"{source} holds no JSON object of settings", {"file": source})
    return settings


def _choose(session: Session, model_id: str, chosen: Mapping[str, object], *, now: bool) -> int:
    screen = session.screen
    body: Json = {key: value for key, value in chosen.items() if value is not None}
    try:
        answer = session.client.request("PUT", _path(model_id), body).body
    except RefusedError as error:
        if not error.details.get("errors"):
            raise
        show_refusal(screen, error)
        return error.exit_status
    document = record(answer)
    if screen.as_json:
        screen.json(answer)
    else:
        _say_chosen(screen, model_id, document, now=now)
    if now and document.get("restartRequired") is True:
        return act_on_each(session, "restart", [model_id], WAIT_SECONDS)
    return Exit.OK


def _say_chosen(screen: Screen, model_id: str, document: Mapping[str, object], *, now: bool) -> None:
    chosen = record(document.get("runtimeSettings"))
    count = sum(value is not None for value in chosen.values())
    said = f" has {counted(count, 'setting')} of its own" if count else " has no settings of its own"
    screen.line(Cell("✓ ", "green"), Cell(model_id, "bold"), said)
    for name in setting_names():
        if (value := chosen.get(wire_name(name))) is not None:
            screen.line("  ", Cell(name.ljust(LABEL_WIDTH), "dim"), "  ", summary(name, value))
    overruled = [name for name in setting_names() if _is_overruled(document, wire_name(name))]
    if overruled:
        screen.note(Cell("! ", "yellow"), f"the active profile says otherwise of {', '.join(overruled)}")
    say_warnings(screen, document)
    if document.get("restartRequired") is True and not now:
        reasons = "; ".join(texts(document.get("restartReasons")))
        screen.note(Cell("! ", "yellow"), f"restart due: {reasons or 'it runs with others'}")
        screen.note(f"  to do it: magictl restart {model_id}")


def _is_overruled(document: Mapping[str, object], key: str) -> bool:
    own = record(document.get("runtimeSettings")).get(key)
    return own is not None and record(document.get("effective")).get(key, own) != own


def _describe_all(screen: Screen) -> None:
    from magi_agent.cli.setting_descriptions import describe, schema

    if screen.as_json:
        screen.json(schema())
        return
    write_section(screen, "Settings", describe(), label_width=LABEL_WIDTH)
    screen.note("")
    screen.note(Cell("set one: magictl settings ID KEY=VALUE; commas separate several values", "dim"))
