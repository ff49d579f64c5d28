"""``magictl tier`` and ``thinking``: a person's word against discovery's."""

import click

from magi_agent.cli.answers import record
from magi_agent.cli.client import model_path
from magi_agent.cli.command import command
from magi_agent.cli.completing import model_ids
from magi_agent.cli.grid import Cell
from magi_agent.cli.options import Session
from magi_agent.vocabulary import Tier

_AUTO = "auto"

_id = click.argument("model_id", metavar="ID", shell_complete=model_ids)


@command("magictl tier smollm2-135m-instruct.q4_1 fast", "magictl tier smollm2-135m-instruct.q4_1 auto")
@_id
@click.argument("tier", type=click.Choice([*(tier.value for tier in Tier), _AUTO]))
def tier(session: Session, model_id: str, tier: str) -> None:
    """Set a model's tier; auto leaves it to discovery.

    With --json: the answer of PUT /api/models/ID/tier.
    """
    chosen = None if tier == _AUTO else tier
    answer = session.client.request("PUT", f"{model_path(model_id)}/tier", {"tier": chosen}).body
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return
    screen.line(
        Cell("✓ ", "green"), Cell(model_id, "bold"), f": tier {chosen}" if chosen else ": the tier that discovery finds"
    )


@command("magictl thinking qwen3-8b-q4_k_m on", "magictl thinking qwen3-8b-q4_k_m auto")
@_id
@click.argument("thinking", metavar="[on|off|auto]", type=click.Choice(["on", "off", _AUTO]))
def thinking(session: Session, model_id: str, thinking: str) -> None:
    """Say whether a model thinks; auto leaves it to discovery.

    A model that is said to think gets the tier powerful too, unless a tier is set. With --json: the answer of
    PUT /api/models/ID/thinking.
    """
    chosen = {"on": True, "off": False}.get(thinking)
    answer = session.client.request("PUT", f"{model_path(model_id)}/thinking", {"thinking": chosen}).body
    screen = session.screen
    if screen.as_json:
        screen.json(answer)
        return
    said = {True: "thinks", False: "does not think", None: "thinks if discovery says so"}[chosen]
    also = ", and its tier is powerful now" if record(answer).get("tierChanged") is True else ""
    screen.line(Cell("✓ ", "green"), Cell(model_id, "bold"), f" {said}{also}")
