"""What was probably meant, where no model or profile has the name that was typed."""

import difflib

from magi_agent.cli.answers import models_of, text, texts
from magi_agent.cli.client import Client
from magi_agent.cli.exits import CommandError, UnknownNameError

_MOST = 3
_LIKE = 0.7
_SHORTEST_PART = 3
_LOOK_UP_SECONDS = 5.0
_ADVICE_FOR_PROGRAMS = "; GET "
"""Begins the part of the agent's sentence that a person at a terminal has no use for."""


def close_to(name: str, known: list[str]) -> list[str]:
    """Return the names of ``known`` that ``name`` may stand for, the likeliest first.

    People type the beginning of a long id, or a part of it: where some names hold what was typed, those are meant.
    Else a name is measured against the beginning and the whole of each.
    """
    typed = name.lower()
    if len(typed) >= _SHORTEST_PART and (holding := sorted(other for other in known if typed in other)):
        return holding[:_MOST]
    scored = [(_likeness(typed, other), other) for other in known]
    likely = sorted((item for item in scored if item[0] >= _LIKE), key=lambda item: (-item[0], item[1]))
    return [other for _, other in likely[:_MOST]]


def _likeness(typed: str, other: str) -> float:
    beginning = other[: len(typed) + 1]
    return max(
        difflib.SequenceMatcher(None, typed, other, autojunk=False).ratio(),
        difflib.SequenceMatcher(None, typed, beginning, autojunk=False).ratio(),
    )


def with_suggestion(client: Client, error: CommandError) -> CommandError:
    """Return ``error`` with names that were probably meant; any error but that of an unknown name as it is."""
    if not isinstance(error, UnknownNameError):
        return error
    try:
        name, known, command = _what_there_is(client, error)
    except CommandError:
        return error  # The first error is the one that matters.
    close = close_to(name, known)
    advice = f"did you mean {' or '.join(close)}?" if close else command
    return UnknownNameError(
        error.http_status,
        error.kind,
        f"{error.message.partition(_ADVICE_FOR_PROGRAMS)[0]}; {advice}" if advice else error.message,
        {**error.details, "suggestions": close},
        error.request_id,
    )


def _what_there_is(client: Client, error: UnknownNameError) -> tuple[str, list[str], str]:
    if error.kind == "ProfileNotFound":
        available = texts(error.details.get("availableProfiles"))
        advice = f"there are {', '.join(available)}" if available else ""
        return text(error.details.get("profileName")), available, advice
    registry = client.get("/api/models/registry", "models", timeout=_LOOK_UP_SECONDS)
    known = [model_id for model_id, _ in models_of(registry)]
    return text(error.details.get("modelId")), known, "the ids are in: magictl models"
