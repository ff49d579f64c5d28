"""How busy the servers are, by their own figures: slots, requests that wait, tokens so far.

llama-server's ``/metrics`` counts a request's tokens when it ends, so those of requests under way are added from
``/slots`` (https://github.com/ggml-org/llama.cpp/tree/master/tools/server#get-metrics-prometheus-compatible-metrics-exporter).
Each of these questions takes its turn in the server's own queue, and one that is asked them all the time does not look
whether its clients are still there: however many want to know, it is asked every two seconds at most.
"""

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import aiohttp

from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import Reach

_FRESH: Final = 2.0
"""Seconds for which an answer is as good as a new one."""
_ANSWER: Final = aiohttp.ClientTimeout(total=2.0)
_AT_ONCE: Final = 16
_MOST_BYTES: Final = 1 << 20
"""Of an answer: some builds show prompts in their slots."""
_PIECE: Final = 64 * 1024
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


class ServersUsage:
    """Asks the servers that are ready, all at once, and keeps the answers for a moment."""

    def __init__(self, connections: ServerConnections, reaches: Callable[[], Mapping[str, Reach]]) -> None:
        """``reaches`` says where each server is that is ready, by its model's id."""
        self._connections = connections
        self._reaches = reaches
        self._known: dict[str, ServerUsage] = {}
        self._asked_at = -math.inf
        self._turn = asyncio.Lock()
        self.at = datetime.now(UTC)
        """When the servers were asked."""

    async def all(self) -> Mapping[str, ServerUsage]:
        """The usage of each server that is ready, by its model's id."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            if loop.time() - self._asked_at >= _FRESH:
                reaches = dict(self._reaches())
                at_once = asyncio.Semaphore(_AT_ONCE)
                answers = await asyncio.gather(*(self._ask(reach, at_once) for reach in reaches.values()))
                self._known = dict(zip(reaches, answers, strict=True))
                self._asked_at, self.at = loop.time(), datetime.now(UTC)
            return self._known

    async def _ask(self, reach: Reach, at_once: asyncio.Semaphore) -> ServerUsage:
        async with at_once:
            try:
                slots, metrics = await asyncio.gather(self._text(reach, "/slots"), self._text(reach, "/metrics"))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                return ServerUsage(problem=f"it did not say how busy it is: {str(error) or 'it takes too long'}")
        return usage_of(slots, metrics)

    async def _text(self, reach: Reach, path: str) -> str | None:
        """What the server answers, within bounds; ``None`` where it does not have this."""
        async with self._connections.request(reach, "GET", path, timeout=_ANSWER) as response:
            if response.status != 200:
                return None
            content = bytearray()
            while piece := await response.content.read(_PIECE):
                content += piece
                if len(content) > _MOST_BYTES:
                    raise ValueError(f"its {path} is larger than {_MOST_BYTES} bytes")
            return content.decode(errors="replace")


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
