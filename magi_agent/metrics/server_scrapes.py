"""Asking every ready server for its own metrics, within bounds; one that is dead or slow holds up no other."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp

from magi_agent.metrics.server_answers import ServerSample, UnreadableAnswer, samples_of
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import Reach

_LOG: Final = logging.getLogger(__name__)
_PATH: Final = "/metrics"
_AT_ONCE: Final = 8
_PATIENCE: Final = 2.0
"""Seconds that one server has to answer."""
_PATIENCE_WITH_ALL: Final = 6.0
"""Seconds after which no further server is asked; Prometheus waits ten for the agent unless told otherwise."""
_MOST_BYTES: Final = 1 << 20
_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class ServerScrape:
    """What came of asking one server."""

    seconds: float
    samples: tuple[ServerSample, ...] = ()
    problem: str | None = None
    """Why there are no figures, in words."""


class ServerScrapes:
    """Asks servers, and says once of each what is wrong with it."""

    def __init__(self, connections: ServerConnections) -> None:
        self._connections = connections
        # Several threads that read at once would each have their turn before the event loop has its own.
        self._one_reads = asyncio.Lock()
        self._said: dict[str, str] = {}

    async def ask(self, servers: Mapping[str, Reach]) -> dict[str, ServerScrape]:
        """Ask servers that are ready, by model."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE_WITH_ALL
        gate = asyncio.Semaphore(_AT_ONCE)
        scrapes = await asyncio.gather(*(self._ask(reach, gate, deadline) for reach in servers.values()))
        answers = dict(zip(servers, scrapes, strict=True))
        self._say(answers)
        return answers

    async def _ask(self, reach: Reach, gate: asyncio.Semaphore, deadline: float) -> ServerScrape:
        loop = asyncio.get_running_loop()
        async with gate:
            began = loop.time()
            if began >= deadline:
                return ServerScrape(0.0, problem="it was not asked: the servers before it took too long")
            try:
                async with asyncio.timeout(min(_PATIENCE, deadline - began)):
                    answer = await self._fetch(reach)
                async with self._one_reads:
                    samples = await asyncio.to_thread(samples_of, answer)
            except TimeoutError:
                return ServerScrape(loop.time() - began, problem=f"it did not answer within {_PATIENCE:g} seconds")
            except UnreadableAnswer as error:
                return ServerScrape(loop.time() - began, problem=str(error))
            except (aiohttp.ClientError, OSError) as error:
                return ServerScrape(loop.time() - began, problem=f"it cannot be asked: {error}")
            return ServerScrape(loop.time() - began, samples)

    async def _fetch(self, reach: Reach) -> bytes:
        """The body of a server's answer. Raises ``UnreadableAnswer`` and what ``ServerConnections.request`` does."""
        timeout = aiohttp.ClientTimeout(total=_PATIENCE)
        async with self._connections.request(reach, "GET", _PATH, timeout=timeout) as response:
            if response.status != 200 or "Content-Encoding" in response.headers:
                raise UnreadableAnswer(f"it answered with status {response.status}, and not with its metrics")
            body = bytearray()
            async for piece in response.content.iter_chunked(_PIECE):
                body += piece
                if len(body) > _MOST_BYTES:
                    raise UnreadableAnswer(f"its answer is larger than {_MOST_BYTES} bytes")
            return bytes(body)

    def _say(self, answers: Mapping[str, ServerScrape]) -> None:
        for model_id, scrape in answers.items():
            if scrape.problem is not None and self._said.get(model_id) is None:
                _LOG.warning("the metrics of %s cannot be had: %s", model_id, scrape.problem)
        self._said = {model_id: scrape.problem for model_id, scrape in answers.items() if scrape.problem}
