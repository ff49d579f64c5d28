"""The metrics that each ready server tells of itself, read from what it answered."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.metrics.server_samples import ServerSample, UnreadableAnswer
from magi_agent.servers.self_reports import Answer, SelfReports

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerScrape:
    """What came of asking one server."""

    seconds: float
    samples: tuple[ServerSample, ...] = ()
    problem: str | None = None
    """Why there are no figures, in words."""


class ServerScrapes:
    """Reads servers' answers, and says once of each what is wrong with it."""

    def __init__(self, reports: SelfReports) -> None:
        self._reports = reports
        self._said: dict[str, str] = {}

    async def all(self) -> dict[str, ServerScrape]:
        """What came of asking each server that is ready, by model."""
        reports = (await self._reports.all()).servers
        # One after the other: threads that read at once would each have their turn before the event loop has its own.
        scrapes = {model_id: await self._read(report.metrics) for model_id, report in reports.items()}
        self._say(scrapes)
        return scrapes

    async def _read(self, answer: Answer) -> ServerScrape:
        if answer.body is None:
            refused = f"it answered with status {answer.status}, and not with its metrics"
            return ServerScrape(answer.seconds, problem=answer.problem or refused)
        try:
            return ServerScrape(answer.seconds, await asyncio.to_thread(_samples_of, answer.body))
        except UnreadableAnswer as error:
            return ServerScrape(answer.seconds, problem=str(error))

    def _say(self, scrapes: Mapping[str, ServerScrape]) -> None:
        for model_id, scrape in scrapes.items():
            if scrape.problem is not None and self._said.get(model_id) is None:
                _LOG.warning("the metrics of %s cannot be had: %s", model_id, scrape.problem)
        self._said = {model_id: scrape.problem for model_id, scrape in scrapes.items() if scrape.problem}


def _samples_of(answer: bytes) -> tuple[ServerSample, ...]:
    # Imported by the first scrape, and in its thread: that takes a while.
    from magi_agent.metrics.server_answers import samples_of

    return samples_of(answer)
