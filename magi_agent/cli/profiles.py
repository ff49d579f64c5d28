"""``magictl profile list``, ``show`` and ``active``."""

from collections.abc import Iterator, Mapping

import click

from magi_agent.cli.answers import record, records, text, texts
from magi_agent.cli.client import ACTIVE_PROFILE, Client, profile_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import profile_names
from magi_agent.cli.exits import CommandError, Exit, UnknownNameError
from magi_agent.cli.grid import Cell, Column, Grid
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import NOTHING, number
from magi_agent.cli.screen import Screen
from magi_agent.cli.setting_words import summary
from magi_agent.cli.sheet import Fact, write_section
from magi_agent.runtime_settings.settings import setting_names, wire_name

_COLUMNS = (Column("PROFILE"), Column("ACTIVE"), Column("MODELS", 0, "right"), Column("DESCRIPTION", 1))
_NARROWEST_LABEL = 10
_LOOK_UP_SECONDS = 5.0

name_argument = click.argument("name", metavar="NAME", shell_complete=profile_names)


@command("magictl profile list", "magictl profile list --json", name="list")
def list_profiles(session: Session) -> None:
    """List the profiles.

    With --json: the answer of GET /api/models/profiles.
    """
    client, screen = session.client, session.screen
    names = client.request("GET", "/api/models/profiles").body
    if screen.as_json:
        screen.json(names)
        return
    if not names:
        screen.note("there are no profiles; make one of what is in use: magictl profile create NAME --from-current")
        return
    active = text(client.get("/api/models/profiles/active").get("name"))
    screen.grid(Grid(_COLUMNS, tuple(_row(client, name, active) for name in texts(names))))


@command("magictl profile show production", "magictl profile show production --json")
@name_argument
def show(session: Session, name: str) -> None:
    """Show what a profile says.

    The name active stands for the active one. With --json: the answer of GET /api/models/profiles/NAME.
    """
    profile = session.client.get(profile_path(meant(session.client, name)), "enabledModels")
    if session.screen.as_json:
        session.screen.json(profile)
    else:
        _show(session.screen, profile)


@command("magictl profile active")
def active(session: Session) -> int:
    """Show the active profile.

    With --json: the answer of GET /api/models/profiles/active.
    """
    answer = session.client.get("/api/models/profiles/active", "name")
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return Exit.OK
    if profile := record(answer.get("profile")):
        _show(screen, profile)
    elif text(answer.get("name")):
        screen.line(Cell(text(answer.get("name")), "bold"))
    else:
        screen.note("no profile is active; activate one: magictl profile activate NAME (names: magictl profile list)")
    if problem := text(answer.get("problem")):
        screen.note(Cell("! ", "yellow"), problem)
    return Exit.OK


def meant(client: Client, name: str) -> str:
    """Return the name of the profile that is meant, which for ``active`` is the active one's.

    Raises ``UnknownNameError`` where none is active.
    """
    if name != ACTIVE_PROFILE:
        return name
    if active := text(client.get("/api/models/profiles/active", "name").get("name")):
        return active
    raise UnknownNameError(
        404,
        "ProfileNotFound",
        "no profile is active; activate one: magictl profile activate NAME (names: magictl profile list)",
        {"profileName": name},
    )


def _row(client: Client, name: str, active: str) -> tuple[Cell, ...]:
    try:
        profile = client.get(profile_path(name), timeout=_LOOK_UP_SECONDS)
    except CommandError:
        profile = {}  # It went, or got unreadable, since the list was made.
    count = len(texts(profile.get("enabledModels"))) if profile else NOTHING
    return (
        Cell(name, "bold" if name == active else ""),
        Cell("yes", "green") if name == active else Cell("no", "dim"),
        Cell(f"{count}"),
        Cell(text(profile.get("description"))),
    )


def _show(screen: Screen, profile: Mapping[str, object]) -> None:
    screen.line(Cell(text(profile.get("name")), "bold"))
    if description := text(profile.get("description")):
        screen.line(description)
    enabled = texts(profile.get("enabledModels"))
    facts = [Fact("" if index else "models", Cell(model_id)) for index, model_id in enumerate(enabled)]
    sections = [("In use", facts or [Fact("models", Cell("none", "dim"))])]
    for model_id, settings in record(profile.get("runtimeSettings")).items():
        sections.append((f"Settings of {model_id}", list(_settings(record(settings)))))
    sections.append(("Requests", list(_routing(profile))))
    width = max(_NARROWEST_LABEL, *(len(fact.label) for _, facts in sections for fact in facts))
    for title, facts in sections:
        write_section(screen, title, facts, label_width=width)


def _settings(settings: Mapping[str, object]) -> Iterator[Fact]:
    for name in setting_names():
        if (value := settings.get(wire_name(name))) is not None:
            yield Fact(name, Cell(summary(name, value)))


def _routing(profile: Mapping[str, object]) -> Iterator[Fact]:
    for tier in records(profile.get("tierConfig")):
        highest, seconds = number(tier.get("maxScore")), number(tier.get("expectedTimeSeconds"))
        value = "any score" if highest is None else f"score up to {highest:g}"
        remark = "" if seconds is None else f"(in about {seconds:g} s)"
        yield Fact(text(tier.get("name")), Cell(value), remark)
    two_stage = record(profile.get("twoStage"))
    if two_stage.get("enabled") is True:
        stages = f"{text(two_stage.get('stage1Tier'))}, then {text(two_stage.get('stage2Tier'))}"
        yield Fact("two stages", Cell(stages), f"(first up to {two_stage.get('stage1MaxTokens')} tokens)")
    balancing = record(profile.get("loadBalancing"))
    if balancing.get("enabled") is True:
        yield Fact("balancing", Cell(text(balancing.get("strategy"))))
