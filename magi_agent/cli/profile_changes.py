"""``magictl profile create``, ``edit`` and ``delete``."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from magi_agent.cli.answers import models_of, record, text
from magi_agent.cli.client import Client, Json, no_such_model, profile_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted
from magi_agent.cli.profiles import meant, name_argument
from magi_agent.cli.refusals import show_refusal
from magi_agent.cli.screen import Screen

_TAKEN_ALONG = ("tierConfig", "twoStage", "loadBalancing", "runtimeSettings")
"""What a profile made of the present state gets from the active one, beside the models."""


@command(
    "magictl profile create evening --from-current --description 'what runs after work'",
    "magictl profile create tiny --model smollm2-135m-instruct.q4_1",
)
@click.argument("name", metavar="NAME")
@click.option("--from-current", is_flag=True, help="With the models in use now, and what else the active one says.")
@click.option("--description", default="", metavar="TEXT", help="What it is for.")
@click.option(
    "--model", "models", multiple=True, metavar="ID", shell_complete=model_ids, help="With this model in use."
)
def create(session: Session, name: str, from_current: bool, description: str, models: tuple[str, ...]) -> None:
    """Make a profile. Nothing changes until it is activated.

    With --json: the answer of POST /api/models/profiles.
    """
    body: dict[str, object] = {"name": name, "description": description}
    if from_current or models:
        body |= _present(session.client, from_current=from_current, named=models)
    answer = session.client.request("POST", "/api/models/profiles", body).body
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return
    slug = text(record(answer).get("profileName")) or name
    enabled = body.get("enabledModels")
    count = len(enabled) if isinstance(enabled, list) else 0
    where = text(record(answer).get("path"))
    screen.line(Cell("✓ ", "green"), Cell(slug, "bold"), f" with {counted(count, 'model')}", Cell(f"  {where}", "dim"))
    screen.note(f"  to use it: magictl profile activate {slug}; to change it: magictl profile edit {slug}")


@command("magictl profile edit evening", "EDITOR=nano magictl profile edit evening")
@name_argument
def edit(session: Session, name: str) -> int:
    """Change a profile in your editor, as YAML.

    The name active stands for the active one. The editor is that of $VISUAL or $EDITOR. Leaving it without saving
    changes nothing. With --json: the answer of PUT /api/models/profiles/NAME.
    """
    from magi_agent.cli.profile_yaml import from_yaml, to_yaml

    client, screen = session.client, session.screen
    name = meant(client, name)
    path = profile_path(name)
    before = client.get(path, "name", "enabledModels")
    written = to_yaml(before)
    while True:
        edited = _edited(written)
        if edited is None or edited == to_yaml(before):
            screen.note("nothing was changed")
            return Exit.OK
        try:
            answer = _replace(client, path, before, from_yaml(edited))
        except CommandError as error:
            show_refusal(screen, error)
            if not _again(screen):
                screen.note(f"  what you wrote is kept in {_kept(name, edited)}")
                return error.exit_status
            written = edited
            continue
        _say_replaced(screen, name, answer)
        return Exit.OK


@command("magictl profile delete evening")
@name_argument
def delete(session: Session, name: str) -> None:
    """Delete a profile that is not active. No model changes.

    With --json: the answer of DELETE /api/models/profiles/NAME.
    """
    answer = session.client.request("DELETE", profile_path(name)).body
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
    else:
        screen.line(Cell("✓ ", "green"), Cell(name, "bold"), " deleted")


def _present(client: Client, *, from_current: bool, named: tuple[str, ...]) -> Mapping[str, object]:
    """Return what a new profile says: the models that are named, and with ``from_current`` what holds now."""
    known = dict(models_of(client.get("/api/models/registry", "models")))
    for model_id in named:
        if model_id not in known:
            raise no_such_model(model_id)
    enabled = [model_id for model_id, model in known.items() if from_current and model.get("enabled") is True]
    enabled += [model_id for model_id in dict.fromkeys(named) if model_id not in enabled]
    active: Mapping[str, object] = {}
    if from_current:
        active = record(client.get("/api/models/profiles/active").get("profile"))
    return {"enabledModels": enabled, **{key: active[key] for key in _TAKEN_ALONG if key in active}}


def _edited(written: str) -> str | None:
    """Return the text after a person has edited it; ``None`` where it was not saved."""
    sys.stdout.flush()
    try:
        return click.edit(written, extension=".yaml")
    except click.ClickException as error:
        raise CommandError("EditorFailed", f"{error.format_message()}; set EDITOR to one that works") from None


def _replace(client: Client, path: str, before: Mapping[str, object], edited: dict[str, object]) -> Json:
    if client.get(path, "enabledModels") != before:
        raise CommandError("ProfileChanged", "somebody else has changed the profile meanwhile; edit it anew")
    return client.request("PUT", path, edited).body


def _again(screen: Screen) -> bool:
    if screen.as_json or not (screen.is_terminal(screen.err) and sys.stdin.isatty()):
        return False
    try:
        return click.confirm("edit it again?", default=True, err=True)
    except click.Abort:
        return False


def _kept(name: str, edited: str) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"{name.replace('/', '-')[:50]}-", suffix=".yaml", delete=False, encoding="utf-8"
    ) as file:
        file.write(edited)
    return Path(file.name)


def _say_replaced(screen: Screen, name: str, answer: Json) -> None:
    if screen.as_json:
        screen.json(answer)
        return
    where = text(record(answer).get("path"))
    screen.line(Cell("✓ ", "green"), Cell(name, "bold"), " replaced", Cell(f"  {where}", "dim"))
    screen.note(f"  for its models to be those in use: magictl profile activate {name}")
