"""What is counted as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from magi_agent.metrics import loop_lag
from magi_agent.metrics.loop_lag import LoopLag
from magi_agent.metrics.request_counts import RequestCounts, RequestKey
from magi_agent.metrics.unit_usage import UnitUsage, read_usage


def test_requests() -> None:
    counts = RequestCounts()
    counts.under_way = 5
    counts.ended("GET", "/", 200, 0.5)
    counts.ended("GET", "/", 200, 0.25)
    counts.ended("BREW", "none", 405, 0.0)
    counts.ended("BOIL", "none", 405, 0.0)
    taken = counts.taken()
    counts.ended("GET", "/", None, 1.0)

    assert taken == {RequestKey("GET", "/", "200"): (2, 0.75), RequestKey("other", "none", "405"): (2, 0.0)}
    assert counts.taken()[RequestKey("GET", "/", "aborted")] == (1, 1.0)
    assert counts.under_way == 0


async def test_a_loop_that_was_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "_PAUSE", 0.05)
    lag = LoopLag()
    lag.taken()
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0.01)
    time.sleep(0.3)  # noqa: ASYNC251
    await asyncio.sleep(0.08)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    taken = lag.taken()
    assert sum(taken.buckets[4:]) == 1
    assert 0.2 < taken.total < 2


async def test_a_loop_is_looked_at_for_as_long_as_somebody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "_PAUSE", 0.01)
    monkeypatch.setattr(loop_lag, "_READ_FOR", 0.3)
    lag = LoopLag()

    def looks() -> int:
        return sum(lag._buckets)

    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0.1)
    assert looks() == 0
    for _ in range(2):
        before = looks()
        lag.taken()
        await asyncio.sleep(0.2)
        assert looks() > before
        # Whoever reads it in time has no gap.
        lag.taken()
        await asyncio.sleep(0.2)
        before = looks()
        await asyncio.sleep(0.05)
        assert looks() > before
        await asyncio.sleep(0.5)
        before = looks()
        await asyncio.sleep(0.1)
        assert looks() == before
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_on_the_bound_is_below_it() -> None:
    lag = LoopLag()
    for late in (0.0, 0.001, 0.0011, 2.0, 2.1):
        lag.note(late)

    assert lag.taken().buckets == (2, 1, 0, 0, 0, 1, 1)


def group(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_control_group_with_all_controllers(tmp_path: Path) -> None:
    folder = group(
        tmp_path,
        memory__current="900\n",
        memory__stat="anon 300\nfile 600\nfile_mapped 500\nodd\n",
        memory__high="max\n",
        memory__max="2000\n",
        memory__events="low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 0\n",
        cpu__stat="usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n",
        io__stat="8:0 rbytes=4096 wbytes=512 rios=1 wios=1 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2\n8:32 \n",
        pids__current="9\n",
    )

    assert read_usage(folder) == UnitUsage(900, 300, 500, None, 2000, 1.5, 4097, 514, 1, 9)


def test_a_control_group_with_none(tmp_path: Path) -> None:
    assert read_usage(group(tmp_path, cpu__stat="usage_usec 5\n")) == UnitUsage(cpu_seconds=5e-06)
    assert read_usage(tmp_path / "gone") == UnitUsage()
