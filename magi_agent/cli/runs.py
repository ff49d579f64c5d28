"""Runs of a model's server, named by the first digits of their ids."""

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from magi_agent.cli.answers import records, text
from magi_agent.cli.client import Client, model_path
from magi_agent.cli.exits import CommandError
from magi_agent.cli.phrasing import local_time

SHOWN_DIGITS: Final = 8
"""Of an id, where it is shown; among candidates more, where these do not tell all of them apart."""
_LEAST_DIGITS: Final = 4
_ALL_DIGITS: Final = 32
_MOST_EVENTS: Final = 1000
_MOST_LISTED: Final = 10
_DIGITS: Final = re.compile(r"[0-9a-fA-F]+")


def run_named(client: Client, model_id: str, word: str) -> str:
    """The run that is meant by ``word``: the id that begins with these digits, by the model's history.

    A whole id, and what is no id, is left to the agent. Raises ``CommandError`` where it is not one run that begins so,
    with those that it may be.
    """
    if not _DIGITS.fullmatch(word):
        return word
    if len(word) >= _ALL_DIGITS:
        return word.lower()
    runs = _runs(client, model_id)
    found = [run for run in runs if run.startswith(word.lower())]
    if len(word) < _LEAST_DIGITS:
        message = f"{word}: of a run's id, at least {_LEAST_DIGITS} digits are needed"
        raise _refusal("RunAmbiguous", message, word, runs, found or list(runs))
    if not found:
        raise _refusal("RunNotFound", f"no run of {model_id} has an id that begins with {word}", word, runs, list(runs))
    if len(found) > 1:
        message = f"{len(found)} runs of {model_id} have an id that begins with {word}"
        raise _refusal("RunAmbiguous", message, word, runs, found)
    return found[0]


def refuse_unknown(client: Client, model_id: str, run: str) -> None:
    """Raise ``CommandError``, with the runs there are, where the model's history knows of none with this whole id."""
    if len(run) != _ALL_DIGITS:
        return
    runs = _runs(client, model_id)
    if run not in runs:
        raise _refusal("RunNotFound", f"no run of {model_id} has the id {run}", run, runs, list(runs))


def _runs(client: Client, model_id: str) -> dict[str, object]:
    """The ids of the runs that the history knows, the newest first, each with the time it is first told of."""
    events = records(client.get(f"{model_path(model_id)}/history?limit={_MOST_EVENTS}", "events")["events"])
    first: dict[str, object] = {}
    for event in events:
        if run := text(event.get("invocationId")):
            first.setdefault(run, event.get("at"))
    return dict(reversed(first.items()))


def _refusal(kind: str, message: str, word: str, runs: Mapping[str, object], meant: list[str]) -> CommandError:
    candidates = meant[:_MOST_LISTED]
    # Of ids in their order, no other two have as much in common as neighbours.
    digits = max(SHOWN_DIGITS, 1 + max(map(len, map(os.path.commonprefix, pairwise(sorted(candidates)))), default=0))
    listed = ", ".join(f"{run[:digits]} ({local_time(runs[run])})" for run in candidates)
    more = f", and {len(meant) - len(candidates)} more: magictl history" if len(meant) > len(candidates) else ""
    they = f"; these there are: {listed}{more}" if candidates else "; the journal knows of none"
    return CommandError(kind, f"{message}{they}", {"run": word, "candidates": candidates})
