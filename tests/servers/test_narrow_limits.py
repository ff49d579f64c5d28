"""Limits of memory that somebody set below what a server needs: what is said of them, and what is not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.memory.need import MemoryNeed, Split
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.memory_limits import MemoryLimits, derived_limits
from magi_agent.servers.narrow_limits import warnings_of
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS
from tests.servers.test_memory_limits import needs

GIB = 1 << 30
NEED = MemoryNeed(weights=Split(4 * GIB), mapped=4 * GIB, kv_cache=Split(GIB))
KILLED, SLOWED, READ = "it is killed", "it is slowed down", "its weights do not all stay in memory"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (MemoryLimits(), []),
        (MemoryLimits(5 * GIB, 5 * GIB), []),
        (MemoryLimits(None, 5 * GIB - 1), [("memory_max", READ)]),
        (MemoryLimits(None, GIB), [("memory_max", READ)]),
        (MemoryLimits(None, GIB - 1), [("memory_max", KILLED)]),
        (MemoryLimits(None, 1), [("memory_max", KILLED)]),
        (MemoryLimits(5 * GIB - 1, None), [("memory_high", READ)]),
        (MemoryLimits(GIB - 1, 6 * GIB), [("memory_high", SLOWED)]),
        (MemoryLimits(GIB - 1, GIB - 1), [("memory_max", KILLED), ("memory_high", SLOWED)]),
    ],
)
def test_what_comes_of_a_limit_is_said(limits: MemoryLimits, told: list[tuple[str, str]]) -> None:
    found = warnings_of(NEED, limits)

    assert len(found) == len(told)
    for sentence, (name, comes) in zip(found, told, strict=True):
        assert sentence.startswith(f"{name} is ")
        assert "needs 5.0 GiB of memory (1.0 GiB of its own and 4.0 GiB of weights mapped from files, est" in sentence
        assert f": {comes}" in sentence
        assert f"; raise {name}, or give it less to hold (ctx_size)" in sentence


def test_a_limit_at_the_unit_is_named_as_that() -> None:
    [sentence] = warnings_of(NEED, MemoryLimits(None, 1), "magi-llama-toy.service")
    assert sentence.startswith("MemoryMax of magi-llama-toy.service is ")
    assert "raise MemoryMax of magi-llama-toy.service" in sentence


@given(needs(), st.floats(0.1, 10), st.none() | st.integers(0, 1 << 50))
def test_a_derived_limit_is_none_of_these(need: MemoryNeed, headroom: float, host: int | None) -> None:
    # Up to the largest limit there is, which more than a quadrillion bytes would need.
    if need.host_bytes < 1 << 55:
        assert warnings_of(need, derived_limits(need, headroom, host_bytes=host)) == ()


async def test_the_journal_has_it_with_each_start(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model(models / "srv-tight.gguf")
    caplog.set_level(logging.WARNING)
    async with make_agent() as agent:
        # A high limit that is never met, and a need of which a share is never taken.
        await agent.choose("srv-tight", RuntimeSettings(memory_high=4 * GIB, ctx_size=2048))
        await agent.servers.start("srv-tight", by="test", wait=PATIENCE_OF_TESTS)
        assert not [record for record in caplog.records if "is started, but" in record.getMessage()]
        await agent.servers.stop("srv-tight", by="test", wait=PATIENCE_OF_TESTS)
        await agent.choose("srv-tight", RuntimeSettings(memory_max=1 << 20))
        await agent.servers.start("srv-tight", by="test")
        said = "srv-tight is started, but: memory_max is 1 MiB, and the server needs "
        await agent.until(lambda: said in caplog.text, "the journal has it")
        await agent.servers.stop("srv-tight", by="test", wait=PATIENCE_OF_TESTS)
