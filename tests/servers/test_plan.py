"""The plan, as the pure function it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.servers.plan import Plan, Step, UnitCondition, Verb, make_plan

ABSENT, UP, GOING, QUEUED, FAILED, STUCK = (
    UnitCondition.ABSENT,
    UnitCondition.UP,
    UnitCondition.GOING,
    UnitCondition.QUEUED,
    UnitCondition.FAILED,
    UnitCondition.STUCK,
)
NOW = 100.0


@pytest.mark.parametrize(
    ("run", "condition", "restart", "retry_at", "verb", "wake_at"),
    [
        (True, ABSENT, False, None, Verb.START, None),
        (True, FAILED, False, None, Verb.START, None),
        (True, UP, False, None, None, None),
        (True, UP, True, None, Verb.RESTART, None),
        (True, UP, True, NOW + 5, Verb.RESTART, None),
        (True, GOING, False, None, None, None),
        (True, GOING, True, None, None, None),
        (True, STUCK, False, None, None, None),
        (True, STUCK, True, NOW - 1, None, None),
        (False, STUCK, False, None, None, None),
        (True, QUEUED, False, None, None, None),
        (True, QUEUED, True, None, None, None),
        (True, FAILED, False, NOW - 1, Verb.START, None),
        (True, FAILED, False, NOW, Verb.START, None),
        (True, FAILED, False, NOW + 5, None, NOW + 5),
        (True, ABSENT, False, NOW + 5, None, NOW + 5),
        (True, ABSENT, True, NOW + 5, None, NOW + 5),
        (True, UP, False, NOW + 5, None, None),
        (False, ABSENT, False, None, None, None),
        (False, UP, False, None, Verb.STOP, None),
        (False, UP, True, None, Verb.STOP, None),
        (False, QUEUED, False, None, Verb.STOP, None),
        (False, GOING, False, None, None, None),
        (False, FAILED, False, None, Verb.CLEAR, None),
        (False, FAILED, False, NOW + 5, Verb.CLEAR, None),
        (None, UP, True, NOW + 5, None, None),
        (None, FAILED, False, None, None, None),
        (None, QUEUED, False, None, None, None),
    ],
)
def test_what_is_done_about_one_model(
    run: bool | None,
    condition: UnitCondition,
    restart: bool,
    retry_at: float | None,
    verb: Verb | None,
    wake_at: float | None,
) -> None:
    plan = make_plan(
        {} if run is None else {"m": run},
        {"m": condition},
        restarts={"m"} if restart else set(),
        retry_at={} if retry_at is None else {"m": retry_at},
        now=NOW,
    )

    assert plan == Plan(() if verb is None else (Step(verb, "m"),), wake_at)


def test_a_model_without_a_unit_is_absent() -> None:
    plan = make_plan({"b": True, "a": True, "c": False}, {}, restarts=(), retry_at={}, now=NOW)

    assert plan.steps == (Step(Verb.START, "a"), Step(Verb.START, "b"))


def test_the_first_cool_down_to_end_is_when_to_look_again() -> None:
    later = {"a": NOW + 9, "b": NOW + 3, "c": NOW + 7}

    assert make_plan(dict.fromkeys("abc", True), {}, restarts=(), retry_at=later, now=NOW).wake_at == NOW + 3


IDS = st.sampled_from([f"model-{letter}" for letter in "abcdefgh"])


@given(
    wanted=st.dictionaries(IDS, st.booleans()),
    units=st.dictionaries(IDS, st.sampled_from(UnitCondition)),
    restarts=st.sets(IDS),
    retry_at=st.dictionaries(IDS, st.floats(0, 2 * NOW)),
    queued_become=st.sampled_from([ABSENT, UP]),
)
def test_carrying_plans_out_leads_to_what_is_wanted_and_to_nothing_else(
    wanted: dict[str, bool],
    units: dict[str, UnitCondition],
    restarts: set[str],
    retry_at: dict[str, float],
    queued_become: UnitCondition,
) -> None:
    untouched = {model_id: condition for model_id, condition in units.items() if model_id not in wanted}
    world = dict(units)
    now = NOW
    for _ in range(5):
        plan = make_plan(wanted, world, restarts=restarts, retry_at=retry_at, now=now)
        acted_on = [step.model_id for step in plan.steps]
        assert len(set(acted_on)) == len(acted_on)
        assert set(acted_on) <= wanted.keys()
        for step in plan.steps:
            _carry_out(step, world, wanted, restarts, retry_at, now)
        for model_id, condition in world.items():
            if model_id in wanted and condition in (GOING, QUEUED, STUCK):
                world[model_id] = {GOING: ABSENT, QUEUED: queued_become, STUCK: FAILED}[condition]
        if plan.wake_at is not None:
            assert plan.wake_at > now
            now = max(retry_at.values())

    for model_id, run in wanted.items():
        assert world.get(model_id, ABSENT) is (UP if run else ABSENT)
    assert {model_id: world[model_id] for model_id in untouched} == untouched
    settled = make_plan(wanted, world, restarts=restarts, retry_at=retry_at, now=now)
    assert settled == Plan((), None)


def _carry_out(
    step: Step,
    world: dict[str, UnitCondition],
    wanted: dict[str, bool],
    restarts: set[str],
    retry_at: dict[str, float],
    now: float,
) -> None:
    before = world.get(step.model_id, ABSENT)
    match step.verb:
        case Verb.START:
            assert wanted[step.model_id]
            assert before in (ABSENT, FAILED)
            assert retry_at.get(step.model_id, now) <= now
            world[step.model_id] = UP
            restarts.discard(step.model_id)
        case Verb.STOP:
            assert not wanted[step.model_id]
            assert before in (UP, QUEUED)
            world[step.model_id] = ABSENT
        case Verb.RESTART:
            assert wanted[step.model_id]
            assert before is UP
            world[step.model_id] = ABSENT
            restarts.discard(step.model_id)
        case Verb.CLEAR:
            assert not wanted[step.model_id]
            assert before is FAILED
            world[step.model_id] = ABSENT
