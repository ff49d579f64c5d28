"""``magictl port`` and ``port-range``: where the servers listen."""

import re

import click

from magi_agent.cli.answers import record, texts
from magi_agent.cli.client import model_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session

_AUTO, _DEFAULT = "auto", "default"
_LARGEST_PORT = 65535
_RANGE = re.compile(r"(\d{1,5})-(\d{1,5})", re.ASCII)


@command("magictl port smollm2-135m-instruct.q4_1 8085", "magictl port smollm2-135m-instruct.q4_1 auto")
@click.argument("model_id", metavar="ID", shell_complete=model_ids)
@click.argument("port", metavar="PORT|auto")
def port(session: Session, model_id: str, port: str) -> None:
    """Give a model a port of your choice; auto gives it back.

    A model without a port gets the next free one when it is started. With --json: the answer of
    PUT /api/models/ID/port.
    """
    chosen = None if port == _AUTO else _port_of(port)
    answer = session.client.request("PUT", f"{model_path(model_id)}/port", {"port": chosen}).body
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return
    said = f": port {chosen}" if chosen is not None else " gets a port when it is started"
    screen.line(Cell("✓ ", "green"), Cell(model_id, "bold"), said)
    if record(answer).get("restartRequired") is True:
        screen.note(Cell("! ", "yellow"), f"it runs with another port; to change it: magictl restart {model_id}")


@command("magictl port-range", "magictl port-range 8080-8129", "magictl port-range default", name="port-range")
@click.argument("wanted", metavar="[LO-HI|default]", required=False)
def port_range(session: Session, wanted: str | None) -> None:
    """Show or choose the range that ports are given from.

    Default is the one that is configured. No model loses a port that it has. With --json: the answer of
    PUT /api/models/port-range; without a range, its key portRange alone.
    """
    screen = session.screen
    if wanted is None:
        now = session.client.get("/api/models/registry", "portRange")["portRange"]
        if screen.as_json:
            screen.json({"portRange": now})
        else:
            screen.line(_shown(now))
        return
    chosen = None if wanted == _DEFAULT else _range_of(wanted)
    answer = session.client.request("PUT", "/api/models/port-range", {"portRange": chosen}).body
    if screen.as_json:
        screen.json(answer)
        return
    screen.line(Cell("✓ ", "green"), "ports are given from ", Cell(_shown(record(answer).get("portRange")), "bold"))
    if outside := texts(record(answer).get("outside")):
        screen.note(Cell("! ", "yellow"), f"outside of it, and kept: the ports of {', '.join(outside)}")


def _port_of(word: str) -> int:
    number = int(word) if word.isdecimal() and word.isascii() and len(word) <= 5 else 0
    if not 1 <= number <= _LARGEST_PORT:
        raise click.UsageError(
            f"{word!r} is no port; give one from 1 to {_LARGEST_PORT}, or auto", click.get_current_context()
        )
    return number


def _range_of(word: str) -> list[object]:
    found = _RANGE.fullmatch(word)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= low <= high <= _LARGEST_PORT:
        raise click.UsageError(
            f"{word!r} is no range of ports; give one like 8080-8099, or default", click.get_current_context()
        )
    return [low, high]


def _shown(ports: object) -> str:
    return "-".join(str(port) for port in ports) if isinstance(ports, list) else str(ports)
