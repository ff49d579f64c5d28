"""How busy a server is, from the answers of builds that differ, and of some that nobody should believe."""

from __future__ import annotations

import json

import pytest

from magi_agent.servers.usage import ServerUsage, usage_of

METRICS = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 4
llamacpp:tokens_predicted_total 100
llamacpp:predicted_tokens_seconds 144.103
llamacpp:requests_processing 1
llamacpp:requests_deferred 2
"""
FREE = {"id": 0, "n_ctx": 4096, "is_processing": False, "next_token": [{"n_decoded": 7}]}
BUSY = {"id": 1, "n_ctx": 4096, "is_processing": True, "next_token": [{"has_next_token": True, "n_decoded": 80}]}
OLDER = {"id": 1, "is_processing": True, "next_token": {"n_decoded": 80}}


@pytest.mark.parametrize("busy", [BUSY, OLDER])
def test_tokens_of_requests_under_way_count(busy: dict[str, object]) -> None:
    assert usage_of(json.dumps([FREE, busy]), METRICS) == ServerUsage(
        slots_total=2, slots_busy=1, requests_waiting=2, prompt_tokens=4, generated_tokens=180
    )


def test_a_build_without_slots_says_how_many_requests_it_works_on() -> None:
    usage = usage_of(None, METRICS)
    assert (usage.slots_total, usage.slots_busy, usage.generated_tokens) == (None, 1, 100)


def test_a_build_without_metrics_says_its_slots() -> None:
    usage = usage_of(json.dumps([FREE, BUSY]), None)
    assert (usage.slots_total, usage.slots_busy, usage.generated_tokens, usage.problem) == (2, 1, None, None)


@pytest.mark.parametrize("slots", [None, "", "{}", "[" * 100_000, '"x"', "nonsense"])
@pytest.mark.parametrize("metrics", [None, "", "nonsense", "llamacpp:requests_deferred nan"])
def test_what_says_nothing_is_no_figure(slots: str | None, metrics: str | None) -> None:
    assert usage_of(slots, metrics) == ServerUsage(problem="this build says neither its slots nor its metrics")


@pytest.mark.parametrize("figure", ["nan", "inf", "-inf", "-1", "1e999", "x", "0x10"])
def test_a_figure_that_is_none_is_not_known(figure: str) -> None:
    assert usage_of("[]", f"llamacpp:tokens_predicted_total {figure}\n").generated_tokens is None


@pytest.mark.parametrize("count", [-5, "80", None, 1.5, [3]])
def test_a_slot_that_counts_wrongly_counts_nothing(count: object) -> None:
    slot = {"is_processing": True, "next_token": [{"n_decoded": count}, "x", None]}
    assert usage_of(json.dumps([slot, 7]), METRICS).generated_tokens == 100
