"""How busy the servers are, by their own figures: slots, requests that wait, tokens so far.

llama-server's ``/metrics`` counts a request's tokens when it ends, so those of requests under way are added from
``/slots`` (https://github.com/ggml-org/llama.cpp/tree/master/tools/server#get-metrics-prometheus-compatible-metrics-exporter).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from magi_agent.servers.self_reports import Answer, SelfReport, SelfReports

_METRIC: Final = re.compile(r"^llamacpp:(\w+) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerUsage:
    """What a server has to do; ``None`` is what it did not say."""

    slots_total: int | None = None
    slots_busy: int | None = None
    requests_waiting: int | None = None
    prompt_tokens: int | None = None
    """Processed since it started."""
    generated_tokens: int | None = None
    """Since it started, those of requests under way included."""
    problem: str | None = None
    """Why nothing is known, in one sentence."""


@dataclass(frozen=True, slots=True)
class Usages:
    """What all ready servers have to do."""

    at: datetime
    """When they were asked."""
    servers: Mapping[str, ServerUsage]
    """By model."""


class ServersUsage:
    """Reads what the servers say; each answer once, however many want to know."""

    def __init__(self, reports: SelfReports) -> None:
        self._reports = reports
        self._known: dict[str, tuple[SelfReport, ServerUsage]] = {}

    async def all(self) -> Usages:
        """The usage of each server that is ready."""
        reports = await self._reports.all(with_slots=True)
        known = self._known
        self._known = {
            model_id: known[model_id] if model_id in known and known[model_id][0] is report else (report, _read(report))
            for model_id, report in reports.servers.items()
        }
        return Usages(reports.at, {model_id: usage for model_id, (_, usage) in self._known.items()})


def _read(report: SelfReport) -> ServerUsage:
    answers = [answer for answer in (report.slots, report.metrics) if answer is not None]
    for answer in answers:
        if answer.problem is not None:
            why = "it takes too long" if answer.is_late else answer.problem
            return ServerUsage(problem=f"it did not say how busy it is: {why}")
    return usage_of(_text(report.slots), _text(report.metrics))


def _text(answer: Answer | None) -> str | None:
    return answer.body.decode(errors="replace") if answer is not None and answer.body is not None else None


def usage_of(slots: str | None, metrics: str | None) -> ServerUsage:
    """The usage that two answers of a server tell, each ``None`` where there was none."""
    figures = {name: figure for name, text in _METRIC.findall(metrics or "") if (figure := _figure(text)) is not None}
    listed = _slots_in(slots)
    under_way = sum(_decoded(slot) for slot in listed or [])
    busy = sum(slot.get("is_processing") is True for slot in listed) if listed is not None else None
    generated = figures.get("tokens_predicted_total")
    if listed is None and not figures:
        return ServerUsage(problem="this build says neither its slots nor its metrics")
    return ServerUsage(
        slots_total=len(listed) if listed is not None else None,
        slots_busy=busy if busy is not None else figures.get("requests_processing"),
        requests_waiting=figures.get("requests_deferred"),
        prompt_tokens=figures.get("prompt_tokens_total"),
        generated_tokens=generated + under_way if generated is not None else None,
    )


def _slots_in(text: str | None) -> list[Mapping[str, object]] | None:
    try:
        found = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return [slot for slot in found if isinstance(slot, dict)] if isinstance(found, list) else None


def _decoded(slot: Mapping[str, object]) -> int:
    """Tokens of the request that a slot works on; builds differ in where they say it."""
    if slot.get("is_processing") is not True:
        return 0
    told = slot.get("next_token")
    entries = told if isinstance(told, list) else [told]
    counts = [entry.get("n_decoded") for entry in entries if isinstance(entry, dict)]
    return sum(count for count in counts if isinstance(count, int) and count > 0)


def _figure(text: str) -> int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number >= 0 else None
