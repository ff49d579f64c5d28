"""The part of ``magictl import`` that takes other programs' settings over: reading, finding the models, a report."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import click

from magi_agent.cli.answers import models_of, record, text, texts
from magi_agent.cli.client import Client, model_path, no_such_model
from magi_agent.cli.exits import CommandError, Exit, UnreachableError
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted, snake_case
from magi_agent.cli.refusals import show_refusal
from magi_agent.cli.screen import Screen
from magi_agent.cli.setting_words import shown
from magi_agent.imports.detection import read_import
from magi_agent.imports.imported import Imported, ImportedModel, InvalidImport, LeftOut
from magi_agent.imports.matching import Candidate, match
from magi_agent.runtime_settings.reading import written
from magi_agent.runtime_settings.settings import wire_name

_MOST_NAMED = 5
_ALIASES = "aliases"


@dataclass
class _Taken:
    """One model of the other program's, the model here, and what came of it."""

    model: ImportedModel
    ids: tuple[str, ...]
    """Models here that may be meant."""
    settings: Mapping[str, object]
    """As they stand on the wire."""
    answer: Mapping[str, object] = field(default_factory=dict)
    error: CommandError | None = None

    @property
    def model_id(self) -> str | None:
        """The model here, where it is one."""
        return self.ids[0] if len(self.ids) == 1 else None

    @property
    def name(self) -> str:
        """What the other program calls the model."""
        return self.model.name or self.model.reference or "a model without name"


def take_over(session: Session, source: str, content: str, model_id: str | None, *, dry_run: bool) -> int:
    """Give models here the settings that ``content`` has for them, say what became of each, return the exit status.

    ``model_id`` is the model that is meant, where it holds one alone. What it does not name stays as it is.
    """
    registry = session.client.get("/api/models/registry", "models")
    try:
        imported = read_import(content, texts(registry.get("allowedFlags")))
    except InvalidImport as error:
        raise CommandError("InvalidImport", f"cannot import {source}: {error}", {"line": error.line}) from None
    if model_id is not None and len(imported.models) != 1:
        raise click.UsageError(
            f"there are {len(imported.models)} models in it; --for goes with one", click.get_current_context()
        )
    taken = _found(dict(models_of(registry)), imported, model_id)
    _refuse_contradictions(taken)
    for one in taken:
        if one.model_id is not None and one.settings and one.error is None and not dry_run:
            _apply(session.client, one)
    screen = session.screen
    if screen.as_json:
        screen.json(_json(imported, taken, dry_run=dry_run))
    else:
        _show(screen, imported, taken, dry_run=dry_run)
    if taken and not any(one.ids for one in taken):
        return Exit.NOT_FOUND
    return Exit.FAILED if any(one.model_id is None or one.error for one in taken) else Exit.OK


def _found(known: Mapping[str, Mapping[str, object]], imported: Imported, model_id: str | None) -> list[_Taken]:
    if model_id is not None and model_id not in known:
        raise no_such_model(model_id)
    candidates = [
        Candidate(name, text(model.get("filePath")), tuple(texts(model.get("parts")))) for name, model in known.items()
    ]
    return [
        _Taken(
            model,
            (model_id,) if model_id is not None else match(model.reference, candidates),
            {wire_name(name): value for name, value in written(model.settings).items()},
        )
        for model in imported.models
    ]


def _refuse_contradictions(taken: Sequence[_Taken]) -> None:
    """Give an error to all that mean one model and have other settings for it.

    Other names are no contradiction: a model may have many.
    """
    by_id: dict[str, list[_Taken]] = {}
    for one in taken:
        if one.model_id is not None:
            by_id.setdefault(one.model_id, []).append(one)
    for model_id, group in by_id.items():
        keys = sorted(set().union(*(_differing(group[0], other) for other in group[1:])))
        for one in group if keys else ():
            one.error = _contradiction(one, model_id, group, keys)


def _differing(one: _Taken, other: _Taken) -> set[str]:
    """Return the settings that two have differently, but for other names."""
    keys = one.settings.keys() | other.settings.keys()
    return {key for key in keys if one.settings.get(key) != other.settings.get(key)} - {_ALIASES}


def _contradiction(one: _Taken, model_id: str, group: Sequence[_Taken], keys: Sequence[str]) -> CommandError:
    names = list(dict.fromkeys(other.name for other in group))
    return CommandError(
        "ImportContradictory",
        f"{one.name}: {len(group)} entries ({_some(names)}) mean {model_id} and differ in"
        f" {', '.join(map(snake_case, keys))}, so none is taken over; import the command of the one that is meant"
        f" alone, with --for {model_id}",
        {"modelId": model_id, "entries": names, "settings": list(keys)},
    )


def _apply(client: Client, one: _Taken) -> None:
    """Lay the settings over those that the model has. That the agent is gone ends it all."""
    try:
        path = f"{model_path(one.model_id or '')}/settings"
        own = record(client.get(path, "runtimeSettings").get("runtimeSettings"))
        chosen = {key: value for key, value in own.items() if value is not None}
        wanted = {**chosen, **one.settings}
        if _ALIASES in one.settings:
            # Somebody may ask for the model by those that it has.
            wanted[_ALIASES] = list(dict.fromkeys([*texts(own.get(_ALIASES)), *texts(one.settings[_ALIASES])]))
        one.answer = record(client.request("PUT", path, wanted).body)
    except UnreachableError:
        raise
    except CommandError as error:
        one.error = error


def _show(screen: Screen, imported: Imported, taken: Sequence[_Taken], *, dry_run: bool) -> None:
    screen.line(f"{counted(len(imported.models), 'model')} in a {imported.origin}")
    for one in taken:
        _show_one(screen, one, dry_run=dry_run, alone=len(taken) == 1)
    if imported.left_out:
        screen.line("")
        screen.line(Cell("beside the models", "bold"))
        _show_left_out(screen, imported.left_out)


def _show_one(screen: Screen, one: _Taken, *, dry_run: bool, alone: bool) -> None:
    model = one.model
    screen.line("")
    screen.line(Cell(one.name, "bold"))
    for carried in model.carried:
        screen.line(Cell("  ✓ ", "green"), carried.source, Cell("  becomes  ", "dim"), carried.became)
    _show_left_out(screen, model.left_out)
    if one.model_id is None:
        _say_whose(screen, one, alone=alone)
        return
    count = counted(len(one.settings), "setting")
    if one.error is not None:
        show_refusal(screen, one.error)
    elif not one.settings:
        screen.line("  nothing of it is a setting for ", Cell(one.model_id, "bold"))
    elif dry_run:
        screen.line(f"  would give {count} to ", Cell(one.model_id, "bold"))
    else:
        screen.line(Cell("✓ ", "green"), Cell(one.model_id, "bold"), f" has {count} of this")
        if one.answer.get("restartRequired") is True:
            screen.note(Cell("! ", "yellow"), f"it runs with others; to apply: magictl restart {one.model_id}")
    if model.suggested_flags:
        word = f"extra_flags={shown('extra_flags', list(model.suggested_flags))}"
        command = shlex.join(["magictl", "settings", one.model_id, word])
        screen.note(f"  once agent.toml allows the flags: {command}")


def _show_left_out(screen: Screen, left_out: Sequence[LeftOut]) -> None:
    for one in left_out:
        screen.line(Cell("  ! ", "yellow"), one.source, ": ", one.reason)


def _say_whose(screen: Screen, one: _Taken, *, alone: bool) -> None:
    if one.ids:
        problem = f"it may be each of {_some(one.ids)}"
    else:
        problem = f"no model here is {one.model.reference or 'named in it'}"
    advice = "name the one that is meant: --for ID" if alone else "import its command alone, with --for ID"
    screen.failure(CommandError("ModelNotFound", f"{problem}; {advice}"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")


def _json(imported: Imported, taken: Sequence[_Taken], *, dry_run: bool) -> dict[str, object]:
    return {
        "origin": imported.origin.value,
        "dryRun": dry_run,
        "models": [
            {
                "name": one.model.name,
                "modelId": one.model_id,
                "candidates": list(one.ids),
                "settings": dict(one.settings),
                "carried": [{"source": carried.source, "became": carried.became} for carried in one.model.carried],
                "leftOut": _left_out_json(one.model.left_out),
                "suggestedFlags": list(one.model.suggested_flags),
                "answer": dict(one.answer) or None,
                "error": _error_json(one.error) if one.error else None,
            }
            for one in taken
        ],
        "leftOut": _left_out_json(imported.left_out),
    }


def _left_out_json(left_out: Sequence[LeftOut]) -> list[dict[str, str]]:
    return [{"source": one.source, "reason": one.reason} for one in left_out]


def _error_json(error: CommandError) -> dict[str, object]:
    return {"error": error.kind, "message": error.message, "details": error.details}
