"""What the agent refuses, and what is wrong with each part of it, with the names that people type."""

from magi_agent.cli.answers import records, text
from magi_agent.cli.exits import CommandError
from magi_agent.cli.grid import Cell
from magi_agent.cli.phrasing import snake_case
from magi_agent.cli.screen import Screen


def show_refusal(screen: Screen, error: CommandError) -> None:
    """Write an error, and each fault of its ``details.errors`` that its sentence does not tell of."""
    faults = [(text(fault.get("field")), text(fault.get("message"))) for fault in records(error.details.get("errors"))]
    if screen.as_json or not faults:
        screen.failure(error)
        return
    sentence = error.message
    for field, message in faults:
        # The agent speaks of a setting by its name on the wire.
        sentence = sentence.replace(f"{field}: {message}", f"{snake_case(field)}: {message}") if field else sentence
    screen.failure(CommandError(error.kind, sentence))
    for field, message in faults:
        if message and message not in sentence:
            screen.note("  ", Cell(snake_case(field), "bold"), f": {message}" if field else message)
