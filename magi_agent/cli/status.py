"""``magictl status``: the agent, its health, and what runs, on one screen."""

from collections.abc import Collection, Iterable, Mapping

from magi_agent.cli.answers import models_of, record, records, text, texts
from magi_agent.cli.command import command
from magi_agent.cli.grid import Cell
from magi_agent.cli.listing import show_trouble
from magi_agent.cli.options import Session
from magi_agent.cli.phrasing import moment, number
from magi_agent.cli.screen import Screen
from magi_agent.cli.tables import servers_grid

_NOT_READY = frozenset({503})
"""The status of a health that is not well, and of a part that cannot answer now: both are what one wants to see."""
_LABEL_WIDTH = 9
_MOST_NAMED = 8
_NAMING_KEYS = ("modelId", "name", "profileName", "path", "service", "id")
_EXPLAINING_KEYS = ("state", "error", "reason", "problem", "message")


@command("magictl status", "magictl status --json | jq .health.status")
def status(session: Session) -> None:
    """Show the agent's health, what is missing and why, what runs.

    With --json: the answers of GET / (agent), /health/ready (health), /api/models/servers (servers), and of
    /api/models/registry without its models (registry). Exit status 0 whenever the agent answers.
    """
    client, screen = session.client, session.screen
    agent = client.get("/", "name", "version")
    health, registry, servers = (
        record(client.request("GET", path, also_accept=_NOT_READY).body)
        for path in ("/health/ready", "/api/models/registry", "/api/models/servers")
    )
    if screen.as_json:
        summary = {key: value for key, value in registry.items() if key != "models"}
        screen.json({"agent": agent, "health": health, "registry": summary, "servers": servers})
        return
    _show_agent(screen, agent, str(client.address))
    _show_health(screen, health)
    if "error" in registry:
        _row(screen, "models", Cell(text(registry.get("message")), "yellow"))
    else:
        _show_models(screen, registry, {text(server.get("modelId")) for server in records(servers.get("servers"))})
        _show_folders(screen, registry, scanning=health.get("scanning") is True)
    if profile := text(health.get("activeProfile")):
        _row(screen, "profile", profile)
    if "error" in servers:
        _row(screen, "servers", Cell(text(servers.get("message")), "yellow"))
    elif listed := records(servers.get("servers")):
        screen.line("")
        screen.grid(servers_grid(listed))
        for server in listed:
            show_trouble(screen, server, log_lines=0)


def _row(screen: Screen, label: str, *cells: Cell | str) -> None:
    screen.line(Cell(label.ljust(_LABEL_WIDTH), "dim"), *cells)


def _show_agent(screen: Screen, agent: Mapping[str, object], address: str) -> None:
    name = " ".join(part for part in (text(agent.get("name")), text(agent.get("version"))) if part)
    state = text(agent.get("status"))
    _row(screen, "agent", Cell(name or "the agent", "bold"), f", {state}" if state else "", Cell(f"  {address}", "dim"))


def _show_health(screen: Screen, health: Mapping[str, object]) -> None:
    ready = text(health.get("status")) == "ready"
    _row(screen, "health", Cell("ready", "green") if ready else Cell("not ready", "bold red"))
    if health.get("draining") is True:
        screen.line(" " * _LABEL_WIDTH, Cell("draining: ", "yellow"), "nothing is started; end it: magictl drain --off")
    for key, value in health.items():
        if not isinstance(value, list | dict) or key == "counts":
            continue
        for line in _findings(value):
            screen.line(" " * _LABEL_WIDTH, Cell(f"{_spaced(key)}: ", "yellow"), line)


def _findings(value: list[object] | dict[str, object]) -> Iterable[str]:
    """Yield one line for each thing that health names, with its reason where it has one."""
    if isinstance(value, dict):
        for name, reason in value.items():
            if isinstance(reason, str):
                yield f"{name}: {reason}"
        return
    for item in value:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            name = next((text(item[key]) for key in _NAMING_KEYS if text(item.get(key))), "")
            reasons = [text(item[key]) for key in _EXPLAINING_KEYS if text(item.get(key))]
            yield ": ".join(part for part in (name, ", ".join(reasons)) if part)


def _spaced(key: str) -> str:
    """Return a camelCase key as words."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in key)


def _show_models(screen: Screen, registry: Mapping[str, object], with_server: Collection[str]) -> None:
    models = [model for _, model in models_of(registry)]
    enabled = sum(model.get("enabled") is True for model in models)
    unusable = sum(text(model.get("status")) not in {"", "ok"} for model in models)
    said = [f"{len(models)} found, {enabled} enabled"]
    if unusable:
        said.append(f"{unusable} not usable (see: magictl models)")
    _row(screen, "models", ", ".join(said))
    stopped = [
        model_id
        for model_id, model in models_of(registry)
        if model.get("enabled") is True and text(model.get("startPolicy")) == "alwaysOn" and model_id not in with_server
    ]
    if stopped:
        # Somebody stopped it, or has not started it yet: nothing is wrong, but they may be looking for the way.
        line = f"enabled, and not wanted now; to start: magictl start {' '.join(stopped[:_MOST_NAMED])}"
        more = len(stopped) - _MOST_NAMED
        screen.line(" " * _LABEL_WIDTH, Cell(f"{line} (and {more} more)" if more > 0 else line, "dim"))


def _show_folders(screen: Screen, registry: Mapping[str, object], *, scanning: bool) -> None:
    folders = texts(registry.get("scanPaths")) or text(registry.get("scanPath")).split(":")
    _row(screen, "folders" if len(folders) > 1 else "folder", ", ".join(folders))
    _row(screen, "scanned", moment(registry.get("lastScan")) + ("; a scan is under way" if scanning else ""))
    ports = registry.get("portRange")
    if isinstance(ports, list) and len(ports) == 2 and all(number(port) is not None for port in ports):
        given = len(_ports_given(registry))
        _row(screen, "ports", f"{ports[0]} to {ports[1]}, {given} of {int(ports[1]) - int(ports[0]) + 1} given out")


def _ports_given(registry: Mapping[str, object]) -> set[float]:
    return {port for _, model in models_of(registry) if (port := number(model.get("port"))) is not None}
