"""In which order models are started."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from magi_agent.events import EventStream
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.defaults import RuntimeDefaults
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.desired import Desired
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.plan import make_plan
from magi_agent.servers.start_order import Rank, StartOrder
from magi_agent.vocabulary import StartPolicy
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent

RANKS = st.builds(
    Rank,
    is_unpinned=st.booleans(),
    is_unnamed=st.booleans(),
    place=st.sampled_from([0, 1, 2, sys.maxsize]),
    is_for_requests=st.booleans(),
    need=st.integers(0, 3),
    model_id=st.text("abc", min_size=1, max_size=3),
)


@given(st.lists(RANKS, unique_by=lambda rank: rank.model_id), st.randoms())
def test_the_order_is_total_and_the_same_however_models_are_listed(ranks: list[Rank], chance: object) -> None:
    by_id = {rank.model_id: rank for rank in ranks}
    mixed = list(by_id)
    chance.shuffle(mixed)  # type: ignore[attr-defined]

    plans = [
        make_plan(
            dict.fromkeys(ids, True), {}, restarts=(), retry_at={}, now=0.0, order=lambda model_id: by_id[model_id]
        )
        for ids in (list(by_id), mixed)
    ]

    assert plans[0] == plans[1]
    started = [by_id[step.model_id] for step in plans[0].steps]
    assert len(started) == len(ranks)
    assert all(one < other for one, other in pairwise(started))


async def test_what_makes_a_model_more_wanted(make_agent: MakeAgent, models: Path, toy_model: MakeToyModel) -> None:
    ids = ["pinned", "named", "second", "first", "big", "small", "on-demand", "also-small"]
    for model_id in ids:
        toy_model(models / f"srv-{model_id}.gguf", name="longer" * 100 if model_id == "big" else "toy")
    # Wishes are kept without an agent that would follow them.
    agent = make_agent()
    await agent.registry.load()
    await agent.scan()
    await agent.choose("srv-pinned", RuntimeSettings(pinned=True))
    await agent.choose("srv-on-demand", RuntimeSettings(start_policy=StartPolicy.ON_DEMAND))
    await agent.desired.load("boot")
    await agent.desired.wish([f"srv-{each}" for each in ids], run=True, by="profile x")
    await agent.desired.wish(["srv-named"], run=True, by="somebody", named=True)
    # Somebody who speaks of all takes nobody's word back.
    await agent.desired.wish([f"srv-{each}" for each in ids], run=True, by="somebody")
    order = StartOrder(agent.registry, agent.effective, agent.desired, {"srv-first": 0, "srv-second": 1}.get)

    wanted = ["pinned", "named", "first", "second", "also-small", "small", "big", "on-demand"]
    assert order.ordered(agent.registry.models) == tuple(f"srv-{each}" for each in wanted)

    await agent.desired.wish(["srv-named"], run=False, by="somebody")
    await agent.desired.wish(["srv-named"], run=True, by="profile x")
    assert order.ordered(agent.registry.models)[1:3] == ("srv-first", "srv-second")


async def test_a_model_that_is_not_there_has_a_rank_too(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.json", EventStream())
    await registry.load()
    order = StartOrder(
        registry, EffectiveSettings(RuntimeDefaults()), Desired(tmp_path / "desired.json"), lambda _: None
    )

    assert order.rank("gone") < replace(order.rank("gone"), model_id="gone-too")
