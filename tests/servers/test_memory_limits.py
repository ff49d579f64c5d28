"""Limits of memory that follow from what a model needs; `make test-vm` shows them on a kernel that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.memory.need import MemoryNeed, Split
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.limited_launch import LimitedPlacing, with_limits
from magi_agent.servers.llama_server import (
    argv_of,
    differences,
    environment_of,
    memory_limits_of,
    set_memory_limits_of,
)
from magi_agent.servers.memory_limits import (
    LARGEST_LIMIT,
    SMALLEST_LIMIT,
    MemoryLimits,
    derived_limits,
    limits_with_set,
    may_share_host_memory,
    source_of,
)
from magi_agent.servers.placed import Placed
from magi_agent.servers.unit_limits import unit_limits
from magi_agent.settings.loading import load_settings
from tests.servers.test_llama_server import LAUNCH

MIB = 1 << 20
GIB = 1 << 30
SIZES = st.integers(0, 1 << 50)
SPLITS = st.builds(Split, SIZES, SIZES)
SETTINGS = load_settings({}, {})
NEED = MemoryNeed(weights=Split(4 * GIB), mapped=4 * GIB, kv_cache=Split(GIB), may_grow=8 * GIB)


@st.composite
def needs(draw: st.DrawFn) -> MemoryNeed:
    weights = draw(SPLITS)
    return MemoryNeed(
        weights=weights,
        mapped=draw(st.integers(0, weights.host)),
        kv_cache=draw(SPLITS),
        recurrent_state=draw(SPLITS),
        compute=draw(SPLITS),
        draft=draw(SPLITS),
        may_grow=draw(SIZES),
    )


@given(needs(), st.floats(0.1, 10), st.none() | SIZES, st.booleans())
def test_a_limit_is_above_the_need_and_in_order(
    need: MemoryNeed, headroom: float, host: int | None, shares: bool
) -> None:
    limits = derived_limits(need, headroom, host_bytes=host, shares_host_memory=shares)

    assert limits.high is not None
    assert limits.max is not None
    assert SMALLEST_LIMIT <= need.host_bytes + 256 * MIB <= limits.high < limits.max <= LARGEST_LIMIT
    assert limits.max % MIB == 0
    if shares:
        assert limits.max >= need.host_bytes + need.gpu_bytes
    if host is None:
        assert limits.high >= need.host_bytes + need.may_grow


@given(needs(), st.sampled_from(["weights", "kv_cache", "recurrent_state", "compute", "draft"]), SPLITS, SIZES, SIZES)
def test_who_needs_more_may_use_more(need: MemoryNeed, part: str, more: Split, growth: int, host: int) -> None:
    larger = replace(need, **{part: getattr(need, part) + more}, may_grow=need.may_grow + growth)
    for settings in ({}, {"host_bytes": host}, {"shares_host_memory": True}):
        before, after = (derived_limits(each, 0.25, **settings) for each in (need, larger))
        assert (before.max or 0) <= (after.max or 0)
        assert (before.high or 0) <= (after.high or 0)


def test_what_a_limit_is_made_of() -> None:
    assert derived_limits(NEED, 0.25).max == ((GIB + GIB // 4) + 8 * GIB + GIB + 4 * GIB + 4 * GIB // 64 + 512 * MIB)
    on_gpu = replace(NEED, weights=Split(0, 40 * GIB), mapped=0)
    assert derived_limits(on_gpu, 0.25).max == (GIB + GIB // 4) + 8 * GIB + GIB + 512 * MIB + GIB
    assert derived_limits(on_gpu, 0.25, shares_host_memory=True).max == (
        41 * GIB + 41 * GIB // 4 + 8 * GIB + GIB + 512 * MIB + GIB
    )


def test_kept_prompts_do_not_make_a_limit_that_the_host_has_no_memory_for() -> None:
    assert derived_limits(NEED, 0.25, host_bytes=14 * GIB).max == 14 * GIB - 14 * GIB // 16
    assert derived_limits(NEED, 0.25, host_bytes=8 * GIB).max == 8 * GIB - 512 * MIB
    # What it needs without any growth is given to it, whatever the host has: it was started with that in sight.
    tight = GIB + GIB // 4 + 4 * GIB + 4 * GIB // 64 + 512 * MIB
    assert derived_limits(NEED, 0.25, host_bytes=4 * GIB).max == tight


@pytest.mark.parametrize(
    ("derived", "settings", "expected"),
    [
        (MemoryLimits(99 * MIB, 100 * MIB), RuntimeSettings(), MemoryLimits(99 * MIB, 100 * MIB)),
        (MemoryLimits(), RuntimeSettings(), MemoryLimits()),
        (MemoryLimits(1, 2), RuntimeSettings(memory_max=200 * MIB), MemoryLimits(198 * MIB, 200 * MIB)),
        (MemoryLimits(), RuntimeSettings(memory_max=200 * MIB), MemoryLimits(198 * MIB, 200 * MIB)),
        (MemoryLimits(1, 2), RuntimeSettings(memory_max=64 * GIB), MemoryLimits(64 * GIB - 128 * MIB, 64 * GIB)),
        (MemoryLimits(1, 2), RuntimeSettings(memory_max=5), MemoryLimits(None, 5)),
        (MemoryLimits(99 * MIB, 100 * MIB), RuntimeSettings(memory_high=50), MemoryLimits(50, 100 * MIB)),
        (MemoryLimits(), RuntimeSettings(memory_high=50), MemoryLimits(50, None)),
        (
            MemoryLimits(99 * MIB, 100 * MIB),
            RuntimeSettings(memory_high=200 * MIB),
            MemoryLimits(200 * MIB, 202 * MIB),
        ),
        (MemoryLimits(1, 2), RuntimeSettings(memory_high=7, memory_max=9), MemoryLimits(7, 9)),
    ],
)
def test_what_is_set_wins(derived: MemoryLimits, settings: RuntimeSettings, expected: MemoryLimits) -> None:
    assert limits_with_set(derived, settings) == expected


@pytest.mark.parametrize(
    ("settings", "memory", "expected"),
    [
        (RuntimeSettings(), MemoryLimits(1, 2), (1, 2, 0)),
        (RuntimeSettings(memory_high=5, memory_max=9), MemoryLimits(1, 2), (5, 9, 0)),
        (RuntimeSettings(memory_max=9), MemoryLimits(None, None), (None, 9, 0)),
        (RuntimeSettings(memory_high=9), MemoryLimits(None, None), (9, None, None)),
        (RuntimeSettings(memory_max=9), None, (None, 9, None)),
        (RuntimeSettings(), None, (None, None, None)),
    ],
)
def test_a_unit_with_a_limit_uses_no_swap(
    settings: RuntimeSettings, memory: MemoryLimits | None, expected: tuple[int | None, ...]
) -> None:
    limits = unit_limits(settings, "/models/x.gguf", memory)

    assert tuple(limits[name] for name in ("memory_high", "memory_max", "memory_swap_max")) == expected


@given(needs(), st.none() | st.integers(1, 1 << 60), st.none() | st.integers(1, 1 << 60))
def test_limits_that_hold_are_in_order_whatever_is_set(need: MemoryNeed, high: int | None, most: int | None) -> None:
    if high and most and high > most:
        high, most = most, high
    limits = limits_with_set(derived_limits(need, 0.25), RuntimeSettings(memory_high=high, memory_max=most))

    assert limits.max is not None
    assert limits.max == most or most is None
    assert limits.high is None or limits.high <= limits.max
    assert limits.high == high or high is None


@pytest.mark.parametrize(
    ("devices", "may"),
    [([], True), (["CUDA0", "CUDA1"], False), (["ROCm0"], False), (["Vulkan0"], True), (["CUDA0", "Vulkan0"], True)],
)
def test_whose_memory_may_be_the_hosts(devices: list[str], may: bool) -> None:
    assert may_share_host_memory(devices) is may


@pytest.mark.parametrize(
    ("in_force", "chosen", "made_with", "source"),
    [(None, 1, 2, None), (1, 1, 1, "set"), (2, None, 2, "derived"), (3, 1, 1, "operator"), (3, None, None, "operator")],
)
def test_where_a_limit_comes_from(
    in_force: int | None, chosen: int | None, made_with: int | None, source: str | None
) -> None:
    assert source_of(in_force, chosen, made_with) == source


def test_a_need_that_changes_is_no_reason_to_restart() -> None:
    launched, now = (with_limits(LAUNCH, need, SETTINGS) for need in (NEED, replace(NEED, may_grow=0)))
    environment = [f"{name}={value}" for name, value in environment_of(launched).items()]

    assert launched.memory_limits != now.memory_limits
    assert differences(now, argv_of(launched), environment) == ()
    assert differences(LAUNCH, argv_of(launched), environment) == ()
    assert memory_limits_of(environment) == launched.memory_limits
    assert set_memory_limits_of(environment) == MemoryLimits()
    assert memory_limits_of([]) is None


def test_where_they_are_off_nothing_is_derived() -> None:
    settings = load_settings({"memory_limits": "off"}, {})
    chosen = replace(LAUNCH, runtime_settings=RuntimeSettings(memory_max=GIB))

    assert with_limits(chosen, NEED, settings).memory_limits is None


async def test_what_is_placed_is_limited_and_what_nobody_knows_is_not() -> None:
    places = _Places(Placed(LAUNCH, replace(NEED, kv_cache=Split(gpu=GIB)), None, {"CUDA0": GIB}, None))
    placing = LimitedPlacing(places, SETTINGS)

    limited = (await placing.place(LAUNCH, {})).launch.memory_limits
    assert limited == with_limits(LAUNCH, places.placed.need, SETTINGS, ["CUDA0"]).memory_limits
    assert limited != with_limits(LAUNCH, places.placed.need, SETTINGS, ["Vulkan0"]).memory_limits

    places.placed = Placed(LAUNCH, None, "its header says nothing", {}, None)
    assert (await placing.place(LAUNCH, {})).launch.memory_limits == MemoryLimits()
    placing.reconfigure(load_settings({"memory_limits": "off"}, {}))
    assert (await placing.place(LAUNCH, {})).launch.memory_limits is None


class _Places:
    def __init__(self, placed: Placed) -> None:
        self.placed = placed

    async def place(self, launch: LaunchSpecification, promised: Mapping[str, int]) -> Placed:  # noqa: ARG002  # Placing
        return self.placed
