"""The model ``auto``."""

from __future__ import annotations

from tests.api.conftest import Serve
from tests.gateway.test_gateway import ONE, OTHER, started

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
