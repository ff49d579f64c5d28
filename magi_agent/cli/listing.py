"""``magictl models`` and ``magictl servers``: what could run, and what does."""

from collections.abc import Mapping

import click

from magi_agent.cli.answers import models_of, record, records, text, texts
from magi_agent.cli.command import command
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import counted, number, span
from magi_agent.cli.screen import Screen
from magi_agent.cli.tables import OVERRIDE_LEGEND, failure_lines, has_override, models_grid, servers_grid
from magi_agent.vocabulary import Tier

_SHOWN_LOG_LINES = 10


@command("magictl models", "magictl models --enabled", "magictl models --tier powerful --json | jq .models")
@click.option("--enabled", is_flag=True, help="Only models that are in use.")
@click.option("--tier", type=click.Choice([tier.value for tier in Tier]), help="Only models of this effective tier.")
def models(session: Session, enabled: bool, tier: str | None) -> None:
    """List the models in the registry.

    With --json: the answer of GET /api/models/registry, its models narrowed by the options.
    """
    registry = session.client.get("/api/models/registry", "models")
    chosen = {
        model_id: model
        for model_id, model in models_of(registry)
        if (not enabled or model.get("enabled") is True) and (tier is None or model.get("effectiveTier") == tier)
    }
    screen = session.screen
    if screen.as_json:
        screen.json({**registry, "models": chosen} if enabled or tier else registry)
        return
    if not chosen:
        _say_there_is_none(screen, registry, narrowed=enabled or tier is not None)
        return
    screen.grid(models_grid(chosen.items()))
    if any(has_override(model) for model in chosen.values()):
        screen.note(Cell(OVERRIDE_LEGEND, "dim"))
    show_problems(screen, chosen)


def show_problems(screen: Screen, chosen: Mapping[str, Mapping[str, object]]) -> None:
    """Say below a table what is wrong with the models that cannot be used."""
    troubled = {model_id: model for model_id, model in chosen.items() if text(model.get("problem"))}
    if not troubled:
        return
    screen.line("")
    screen.line(Cell(counted(len(troubled), "problem"), "bold"))
    for model_id, model in troubled.items():
        screen.line("  ", Cell(model_id, "yellow"), ": ", text(model.get("problem")))


def _say_there_is_none(screen: Screen, registry: Mapping[str, object], *, narrowed: bool) -> None:
    if narrowed and record(registry.get("models")):
        screen.note("none of the models is of that kind; all of them: magictl models")
        return
    folders = texts(registry.get("scanPaths")) or [text(registry.get("scanPath"))]
    screen.note(f"no models found in {', '.join(folders)}; put a GGUF file there, then: magictl rescan")


@command("magictl servers", "magictl servers --json | jq '.servers[].url'")
def servers(session: Session) -> None:
    """List the servers: every model that should run, or does.

    With --json: the answer of GET /api/models/servers.
    """
    answer = session.client.get("/api/models/servers", "servers")
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return
    listed = records(answer.get("servers"))
    if not listed:
        screen.note("no server runs, and none should; start one: magictl start ID (ids: magictl models)")
        return
    screen.grid(servers_grid(listed))
    for server in listed:
        show_trouble(screen, server, log_lines=_SHOWN_LOG_LINES)


def show_trouble(screen: Screen, server: Mapping[str, object], *, log_lines: int) -> None:
    """Say below a table why a server failed, with the last of its log, and why a restart is due."""
    sentence, lines = failure_lines(server)
    reasons = texts(server.get("restartReasons"))
    if sentence:
        screen.line("")
        screen.line(Cell(text(server.get("modelId")), "bold red"), ": ", sentence)
        for line in lines[-log_lines:] if log_lines else ():
            screen.line(Cell("  │ ", "red"), Cell(line, "dim"))
        if (seconds := number(server.get("retryInSeconds"))) is not None:
            screen.line(f"  the agent tries again in {span(seconds)}")
    if reasons:
        screen.line(Cell(text(server.get("modelId")), "yellow"), ": restart due: ", "; ".join(reasons))
