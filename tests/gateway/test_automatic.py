"""The model ``auto``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from magi_agent.gateway.automatic import tier_for, tiers_for
from magi_agent.profiles.profile import DEFAULT_TIERS, TierConfig
from magi_agent.vocabulary import Tier
from tests.api.conftest import Serve
from tests.gateway.test_gateway import ONE, OTHER, openai_failure, started

HARD = "Prove step by step that the sum of two even numbers is even."


async def test_the_complexity_picks_the_tier_and_the_answer_says_so(serve: Serve) -> None:
    api = await serve(ONE, OTHER)
    for model_id, tier in ((ONE, "fast"), (OTHER, "powerful")):
        await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})
        await started(api, model_id)

    told = []
    for prompt in ("hi", HARD, "Write a Python function that reverses a list."):
        answer = await api.ask("POST", "/v1/completions", {"model": "auto", "prompt": prompt, "max_tokens": 2})
        assert answer.success()["model"] == answer.headers["X-Magi-Model"]
        told.append((answer.headers["X-Magi-Model"], answer.headers["X-Magi-Tier"]))
        assert 0 <= float(answer.headers["X-Magi-Score"]) <= 10

    # No model is balanced: the next larger tier is asked.
    assert told == [(ONE, "fast"), (OTHER, "powerful"), (OTHER, "powerful")]
    listed = (await api.ask("GET", "/v1/models")).success()["data"]
    assert listed[-1]["id"] == "auto"
    await api.ask("PUT", f"/api/models/{OTHER}/settings", {"aliases": ["auto"]})
    named = await api.ask("POST", "/v1/completions", {"model": "auto", "prompt": "hi", "max_tokens": 2})
    assert named.success()["model"] == OTHER
    assert "X-Magi-Score" not in named.headers


@pytest.mark.parametrize(
    ("score", "tier"),
    [(0, "fast"), (3, "fast"), (3.01, "balanced"), (7, "balanced"), (7.01, "powerful"), (10, "powerful")],
)
def test_without_a_profile_the_usual_bounds_hold(score: float, tier: str) -> None:
    assert tier_for(score, DEFAULT_TIERS) == tier


def test_the_first_tier_that_takes_the_score_is_meant_and_other_names_are_none() -> None:
    configured = [TierConfig("tiny", 10, 1), TierConfig("powerful", 2, 1), TierConfig("fast", 5, 1)]

    assert [tier_for(score, configured) for score in (1, 2, 3, 5, 6)] == [
        *(Tier.POWERFUL, Tier.POWERFUL, Tier.FAST, Tier.FAST, Tier.POWERFUL),
    ]


@pytest.mark.parametrize(
    ("configured", "tiers"),
    [
        (DEFAULT_TIERS, set(Tier)),
        ((), {Tier.POWERFUL}),
        ([TierConfig("fast", math.inf, 1)], {Tier.FAST}),
        ([TierConfig("fast", 10, 1)], {Tier.FAST}),
        ([TierConfig("fast", 9.99, 1)], {Tier.FAST, Tier.POWERFUL}),
        ([TierConfig("fast", 5, 1), TierConfig("balanced", 5, 1)], {Tier.FAST, Tier.POWERFUL}),
        ([TierConfig("fast", -1, 1), TierConfig("balanced", 0, 1)], {Tier.BALANCED, Tier.POWERFUL}),
        ([TierConfig("tiny", 4, 1), TierConfig("balanced", math.inf, 1)], {Tier.BALANCED}),
    ],
)
def test_the_tiers_that_some_score_picks_are_known(configured: Sequence[TierConfig], tiers: set[Tier]) -> None:
    assert tiers_for(configured) == tiers
    assert {tier_for(score / 100, configured) for score in range(1001)} == tiers


async def test_the_profiles_bounds_hold_and_smaller_ones_are_asked_where_there_are_no_larger(serve: Serve) -> None:
    api = await serve(ONE, OTHER)
    for model_id, tier in ((ONE, "fast"), (OTHER, "balanced")):
        await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})
        await api.ask("PUT", f"/api/models/{model_id}/settings", {"startPolicy": "onDemand"})
        await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})

    async def asked(prompt: str, path: str = "/v1/completions") -> tuple[str, str]:
        reply = await api.ask("POST", path, {"model": "auto", "prompt": prompt, "max_tokens": 2})
        reply.success()
        return reply.headers["X-Magi-Model"], reply.headers["X-Magi-Tier"]

    # None is powerful.
    assert [await asked("hi"), await asked(HARD)] == [(ONE, "fast"), (OTHER, "balanced")]

    bounds = [
        {"name": name, "maxScore": most, "expectedTimeSeconds": 1, "description": ""}
        for name, most in (("balanced", 1), ("fast", None))
    ]
    profile = {"name": "bounds", "enabledModels": [ONE, OTHER], "tierConfig": bounds}
    assert (await api.ask("POST", "/api/models/profiles", profile)).status == 201
    (await api.ask("POST", "/api/models/profiles/bounds/activate")).success()
    assert [await asked("hi"), await asked(HARD)] == [(OTHER, "balanced"), (ONE, "fast")]

    # Neither is for that.
    reply = await api.ask("POST", "/v1/embeddings", {"model": "auto", "input": "hi"})
    openai_failure(reply, 404, "model_not_found")
