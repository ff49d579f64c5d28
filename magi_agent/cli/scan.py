"""``magictl scan``: a folder of models as the registry would list it, without any agent."""

from pathlib import Path

import click

from magi_agent.cli import completing
from magi_agent.cli.command import command
from magi_agent.cli.exits import CommandError, Exit
from magi_agent.cli.grid import Cell
from magi_agent.cli.listing import show_problems
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted
from magi_agent.cli.tables import models_grid


@command("magictl scan ~/models", "magictl scan /models --json | jq '.models[].sizeBytes'")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", shell_complete=completing.folders)
def scan(session: Session, folders: tuple[str, ...]) -> int:
    """List a folder's models as the registry would, without agent.

    Only headers are read; nothing is started, and nothing is written. Ids and ports are given for good by the agent.
    """
    from magi_agent.cli.scanned import model_json
    from magi_agent.discovery.facts import TierThresholds
    from magi_agent.discovery.scanner import Scanner
    from magi_agent.registry.merging import merge

    paths = [_folder(folder) for folder in folders]
    found = Scanner(paths, TierThresholds(), cache_path=None).scan()
    problems = [str(problem) for problem in found.problems]
    screen = session.screen
    wire = {model_id: model_json(model) for model_id, model in sorted(merge({}, found.models, ()).models.items())}
    if screen.as_json:
        scan_paths = [str(path) for path in paths]
        screen.json({"models": wire, "scanPath": ":".join(scan_paths), "scanPaths": scan_paths, "problems": problems})
        return Exit.OK
    if wire:
        screen.grid(models_grid(wire.items()))
        show_problems(screen, wire)
    else:
        screen.note(f"no models found in {', '.join(str(path) for path in paths)}")
    for problem in problems:
        screen.note(Cell("! ", "yellow"), problem)
    if wire:
        screen.note(Cell(f"{counted(len(wire), 'model')}; ids and ports are given for good by the agent", "dim"))
    return Exit.OK


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    try:
        if not path.is_dir():
            what = "is no folder" if path.exists() else "does not exist"
            raise CommandError("FolderUnreadable", f"{name} {what}", {"folder": name})
        next(path.iterdir(), None)
    except OSError as error:
        raise CommandError("FolderUnreadable", f"cannot read {name}: {error.strerror}", {"folder": name}) from None
    return path.resolve()
