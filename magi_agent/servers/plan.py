"""From what is desired and what is observed to a plan: a pure function.

A plan can be shown without being carried out, and is made anew from the whole situation every time: nothing in it
depends on how the situation came about.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from magi_agent.systemd.status import UnitStatus


class UnitCondition(StrEnum):
    """What matters of a unit for what to do next."""

    ABSENT = "absent"
    """Not loaded, or inactive: nothing runs."""
    UP = "up"
    """Active, starting, or waiting for systemd's own restart."""
    GOING = "going"
    """Being stopped."""
    QUEUED = "queued"
    """Not running, with a job of systemd's under way: the end of a stop or of half a restart, or a start that waits."""
    FAILED = "failed"
    """It ended badly; its name is taken until that is cleared."""
    STUCK = "stuck"
    """It ended for systemd, and has processes left: nothing can be done about it until they are gone."""


def condition_of(unit: UnitStatus | None) -> UnitCondition:
    """What matters of a unit for what to do next."""
    if unit is None or unit.load_state == "not-found":
        return UnitCondition.ABSENT
    match unit.active_state:
        case "active" | "activating" | "reloading":
            return UnitCondition.UP
        case "deactivating":
            return UnitCondition.GOING
        case _ if unit.job_id is not None:
            return UnitCondition.QUEUED
        case "failed":
            return UnitCondition.FAILED
        case _:
            return UnitCondition.ABSENT


def awaits_retry(unit: UnitStatus) -> bool:
    """Whether it has ended badly and systemd is about to start it again by itself."""
    # systemd 254 and later tell auto-restart-queued from auto-restart.
    return unit.sub_state.startswith("auto-restart") and unit.result not in ("", "success")


class Verb(StrEnum):
    """What can be done about a model's server."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    CLEAR = "clear"
    """Forget a failure, so that the unit's name is free."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do."""

    verb: Verb
    model_id: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to look again."""

    steps: tuple[Step, ...]
    wake_at: float | None
    """When the first cool-down ends, on the clock of ``now``."""


def make_plan(
    wanted: Mapping[str, bool],
    units: Mapping[str, UnitCondition],
    *,
    restarts: Collection[str],
    retry_at: Mapping[str, float],
    now: float,
    order: Callable[[str], Any] = str,
) -> Plan:
    """What leads from ``units`` to ``wanted``.

    ``wanted`` says run or stop for each model somebody spoke about; a unit nobody spoke about is left alone.
    ``restarts`` are models whose running server is to be replaced; ``retry_at`` says when a model that failed may be
    tried again. ``order`` ranks models: those with the least rank are started first, and after all other steps.
    """
    steps = []
    starts = []
    wake_at: float | None = None
    for model_id in sorted(wanted):
        condition = units.get(model_id, UnitCondition.ABSENT)
        if condition in (UnitCondition.GOING, UnitCondition.STUCK):
            continue
        if not wanted[model_id]:
            if condition in (UnitCondition.UP, UnitCondition.QUEUED):
                steps.append(Step(Verb.STOP, model_id))
            elif condition is UnitCondition.FAILED:
                steps.append(Step(Verb.CLEAR, model_id))
        elif condition is UnitCondition.QUEUED:
            continue
        elif condition is UnitCondition.UP:
            if model_id in restarts:
                steps.append(Step(Verb.RESTART, model_id))
        elif (due := retry_at.get(model_id, now)) <= now:
            starts.append(model_id)
        else:
            wake_at = due if wake_at is None else min(wake_at, due)
    if len(starts) > 1:
        starts.sort(key=order)
    return Plan((*steps, *(Step(Verb.START, model_id) for model_id in starts)), wake_at)
