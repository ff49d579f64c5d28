"""The table of ``magictl top``: from two looks at the servers' counts to what they do in a second."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from magi_agent.cli.answers import records, text
from magi_agent.cli.grid import Cell, Column, Grid
from magi_agent.cli.phrasing import NOTHING, counted, number, size, span
from magi_agent.cli.tables import state_cell

_COLUMNS = (
    Column("MODEL"),
    Column("STATE"),
    Column("UPTIME", 5, "right"),
    Column("MEMORY", 1, "right"),
    Column("CPU %", 2, "right"),
    Column("TOKENS/S", 1, "right"),
    Column("PROMPT/S", 6, "right"),
    Column("SLOTS", 1, "right"),
    Column("WAITING", 4, "right"),
)
_MEANINGFUL = 0.5
"""Seconds; over less, a rate says nothing."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at all servers."""

    at: float
    """When their tokens were counted, in seconds since the epoch."""
    taken: float
    """When memory and processor time were looked at, on the clock of the caller."""
    servers: Mapping[str, Mapping[str, object]]
    """By model id, as the API has them."""


def sample_of(usage: Mapping[str, object], taken: float) -> Sample:
    """Return the sample in an answer of GET /api/usage that came at ``taken``."""
    try:
        at = datetime.fromisoformat(text(usage.get("at"))).timestamp()
    except ValueError:
        at = 0.0
    return Sample(at, taken, {text(server.get("modelId")): server for server in records(usage.get("servers"))})


def usage_grid(before: Sample, after: Sample) -> Grid:
    """Return the table of ``after``; what happened since ``before`` is in its rates."""
    rows = []
    for model_id, server in after.servers.items():
        earlier = before.servers.get(model_id, {})
        if _has_begun_anew(earlier, server):
            earlier = {}
        asked, looked = after.at - before.at, after.taken - before.taken
        cpu = _rate(earlier, server, "cpuSeconds", looked)
        rows.append(
            (
                Cell(model_id, "bold"),
                state_cell(server.get("state")),
                Cell(span(server.get("uptimeSeconds")) if number(server.get("uptimeSeconds")) else NOTHING),
                Cell(size(server.get("memoryBytes"))),
                _rate_cell(None if cpu is None else cpu * 100),
                _rate_cell(_rate(earlier, server, "generatedTokens", asked)),
                _rate_cell(_rate(earlier, server, "promptTokens", asked)),
                _slots(server),
                _waiting(server),
            )
        )
    return Grid(_COLUMNS, tuple(rows))


def summary_of(sample: Sample) -> str:
    """Return all servers in one line."""
    ready = sum(text(server.get("state")) in ("ready", "degraded") for server in sample.servers.values())
    memory = sum(number(server.get("memoryBytes")) or 0 for server in sample.servers.values())
    return f"{counted(len(sample.servers), 'server')}, {ready} ready, {size(memory)} in memory"


def problems_of(sample: Sample) -> list[str]:
    """Return what servers that are ready did not say, and why."""
    return [
        f"{model_id}: {text(server.get('problem'))}"
        for model_id, server in sample.servers.items()
        if text(server.get("problem"))
    ]


def _has_begun_anew(before: Mapping[str, object], after: Mapping[str, object]) -> bool:
    earlier, later = number(before.get("uptimeSeconds")), number(after.get("uptimeSeconds"))
    return earlier is None or later is None or later < earlier


def _rate(before: Mapping[str, object], after: Mapping[str, object], key: str, seconds: float) -> float | None:
    """What a count has grown in a second; ``None`` where that cannot be told."""
    earlier, later = number(before.get(key)), number(after.get(key))
    if earlier is None or later is None or seconds < _MEANINGFUL:
        return None
    # A request that ends between two questions is counted twice, or not at all, for a moment.
    return max(0.0, later - earlier) / seconds


def _rate_cell(rate: float | None) -> Cell:
    if rate is None:
        return Cell(NOTHING, "dim")
    return Cell(f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}", "" if rate else "dim")


def _slots(server: Mapping[str, object]) -> Cell:
    busy, total = number(server.get("slotsBusy")), number(server.get("slotsTotal"))
    if busy is None:
        return Cell(NOTHING, "dim")
    return Cell(f"{busy:.0f}" + ("" if total is None else f"/{total:.0f}"), "cyan" if busy else "")


def _waiting(server: Mapping[str, object]) -> Cell:
    waiting = number(server.get("requestsWaiting"))
    return Cell(NOTHING, "dim") if waiting is None else Cell(f"{waiting:.0f}", "yellow" if waiting else "dim")
