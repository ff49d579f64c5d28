"""``magictl export`` and ``import``: all choices as one file; and other programs' settings, taken over."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from magi_agent.cli.answers import record, texts
from magi_agent.cli.command import command
from magi_agent.cli.completing import litellm_or_files, model_ids
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted
from magi_agent.cli.screen import Screen

_LARGEST_FILE = 16 * 1024 * 1024
_STANDARD_STREAM = "-"
_LITELLM = "litellm"
_SECONDS = 120.0
_ENDS = 2  # of a range


@command(
    "magictl export > choices.json",
    "magictl export backup.json",
    "magictl export litellm --api-base http://this-host:8000 > litellm.yaml",
)
@click.argument("path", metavar="[FILE|litellm]", required=False, type=click.Path(), shell_complete=litellm_or_files)
@click.option("--api-base", metavar="URL", help="For litellm: where it reaches the agent.")
def export(session: Session, path: str | None, api_base: str | None) -> None:
    """Write all choices and profiles as one JSON document.

    What people chose for each model, and the profiles that they made. It goes to standard output without FILE, with
    --json too: the answer of GET /api/export.

    The word litellm prints the enabled models, their tiers and auto as a LiteLLM router's configuration instead, in
    YAML; a file of that name is ./litellm.
    """
    if path == _LITELLM:
        from magi_agent.cli.litellm import export_litellm

        export_litellm(session, api_base)
        return
    if api_base is not None:
        raise click.UsageError("--api-base is for: magictl export litellm", click.get_current_context())
    from magi_agent.atomic_file import write_atomically

    document = session.client.get("/api/export", "version", "models", timeout=_SECONDS)
    screen = session.screen
    if path is None or path == _STANDARD_STREAM:
        screen.json(document)
        return
    try:
        write_atomically(Path(path), (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(), mode=0o644)
    except OSError as error:
        raise CommandError("FileUnwritable", f"cannot write {path}: {error.strerror}", {"file": path}) from None
    if screen.as_json:
        screen.json(document)
        return
    models, profiles = len(record(document.get("models"))), len(record(document.get("profiles")))
    screen.line(
        Cell("✓ ", "green"),
        f"the choices for {counted(models, 'model')} and {counted(profiles, 'profile')} are in {path}",
    )


@command(
    "magictl import choices.json --dry-run",
    "magictl import llama-swap.yaml",
    "echo 'llama-server -m /models/a.gguf -c 8192 -ngl 99' | magictl import -",
    "magictl import command.txt --for smollm2-135m-instruct.q4_1",
    name="import",
)
@click.argument("path", metavar="FILE", type=click.Path())
@click.option("--for", "model_id", metavar="ID", shell_complete=model_ids, help="The model that a command line is for.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
def import_file(session: Session, path: str, model_id: str | None, dry_run: bool) -> int:
    """Take over choices, or another program's settings.

    FILE, or standard input for -, is what magictl export wrote, a llama-server command line, a llama-swap
    configuration, or a preset file of llama-server's router; which of them it is, is seen. Of another program's it is
    said what became which setting, and what could not be carried over; settings that it does not name stay. Of entries
    that mean one model and differ, none is taken over.

    With --json: the answer of POST /api/import, or an object with a list of models.
    """
    content = _read(path)
    if (document := _our_export(content)) is not None:
        if model_id is not None:
            raise click.UsageError("an export names its models itself; leave --for out", click.get_current_context())
        return _import_choices(session, document, dry_run=dry_run)
    from magi_agent.cli.taking_over import take_over

    source = "standard input" if path == _STANDARD_STREAM else path
    return take_over(session, source, content, model_id, dry_run=dry_run)


def _read(path: str) -> str:
    try:
        if path == _STANDARD_STREAM:
            content = sys.stdin.buffer.read(_LARGEST_FILE + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise CommandError(
                "FileUnreadable", f"{path} is larger than {_LARGEST_FILE // 1024**2} MiB", {"file": path}
            )
        return content.decode("utf-8-sig")
    except OSError as error:
        raise CommandError("FileUnreadable", f"cannot read {path}: {error.strerror}", {"file": path}) from None
    except UnicodeDecodeError:
        raise CommandError("FileUnreadable", f"{path} is no text", {"file": path}) from None


def _our_export(content: str) -> dict[str, object] | None:
    """Return the document where it is an export of ours."""
    if not content.lstrip().startswith("{"):
        return None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and "version" in document and "models" in document else None


def _import_choices(session: Session, document: dict[str, object], *, dry_run: bool) -> int:
    query = "?dryRun=true" if dry_run else ""
    answer = session.client.request("POST", f"/api/import{query}", document, timeout=_SECONDS).body
    if session.screen.as_json:
        session.screen.json(answer)
    else:
        _show(session.screen, record(answer), dry_run=dry_run)
    return Exit.FAILED if texts(record(answer).get("problems")) else Exit.OK


def _show(screen: Screen, answer: Mapping[str, object], *, dry_run: bool) -> None:
    changed, unchanged = texts(answer.get("changed")), texts(answer.get("unchanged"))
    for model_id in changed:
        screen.line(Cell("· " if dry_run else "✓ ", "green"), Cell(model_id, "bold"))
    said = [f"{counted(len(changed), 'model')} {'would change' if dry_run else 'changed'}"]
    said.append(f"{len(unchanged)} as before")
    if profiles := texts(answer.get("profiles")):
        said.append(f"{counted(len(profiles), 'profile')} {'would be written' if dry_run else 'written'}")
    ports = answer.get("portRange")
    if isinstance(ports, list) and len(ports) == _ENDS:
        said.append(f"ports from {ports[0]} to {ports[1]}")
    screen.line(", ".join(said))
    if unknown := texts(answer.get("unknown")):
        screen.note(Cell("! ", "yellow"), f"no such model here: {', '.join(unknown)}")
    for problem in texts(answer.get("problems")):
        screen.note(Cell("✗ ", "red"), problem)
