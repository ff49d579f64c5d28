"""What ready servers say of themselves: the one place that asks them for their metrics and their slots.

Each question takes its turn in llama-server's own queue, and one that is asked all the time does not look whether its
clients are still there. So however many want to know, for whatever, all servers are asked together, every two seconds
at most. Who wants to know of one server alone has an answer of that time where there is one, else only that server is
asked.

Slots are asked for only where somebody wants them, and in the same moment as the metrics: the tokens of a request stand
in its slot until it ends, and in the metrics from then on. While somebody goes on wanting them, they are asked for
whoever comes first, so that two who want different things do not have the servers asked twice.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.http_exchange import ExchangeError
from magi_agent.servers.reach import Reach

_METRICS: Final = "/metrics"
_SLOTS: Final = "/slots"
_FRESH: Final = 2.0
"""Seconds for which an answer is as good as a new one."""
_SLOTS_WANTED: Final = 10.0
"""Seconds for which somebody who wanted slots is expected to come again."""
_AT_ONCE: Final = 8
_PATIENCE: Final = 2.0
"""Seconds that one server has to answer."""
_PATIENCE_WITH_ALL: Final = 6.0
"""Seconds after which no further server is asked; Prometheus waits ten for the agent unless told otherwise."""
_MOST_BYTES: Final = 1 << 20
"""Of an answer: some builds show prompts in their slots."""
_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """A server that can be asked."""

    reach: Reach
    invocation_id: str
    """Of its run: what an earlier one said is not its own."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question."""

    seconds: float
    """That it took."""
    body: bytes | None = None
    """What was asked for."""
    status: int | None = None
    """``None`` where there was no whole answer."""
    problem: str | None = None
    """Why there was none, in one sentence."""
    is_late: bool = False
    """Whether that is all: it takes too long."""


@dataclass(frozen=True, slots=True)
class SelfReport:
    """What one server says of itself."""

    metrics: Answer
    slots: Answer | None
    """``None`` where nobody wanted them."""


@dataclass(frozen=True, slots=True)
class Reports:
    """What all ready servers say."""

    at: datetime
    """When they were asked."""
    servers: Mapping[str, SelfReport]
    """By model."""


@dataclass(frozen=True, slots=True)
class _Round:
    """The servers that were asked together, and those that became ready soon after."""

    at: datetime
    began: float
    with_slots: bool
    asked: dict[str, tuple[ReadyServer, asyncio.Task[SelfReport]]]


@dataclass(frozen=True, slots=True)
class _Question:
    """A server that was asked by itself."""

    server: ReadyServer
    began: float
    task: asyncio.Task[SelfReport]


class SelfReports:
    """Asks, within bounds, and keeps the answers for a moment; one that is dead or slow holds up no other."""

    def __init__(self, connections: ServerConnections, ready: Callable[[], Mapping[str, ReadyServer]]) -> None:
        """``ready`` says which servers are ready, by model."""
        self._connections = connections
        self._ready = ready
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._round: _Round | None = None
        self._alone: dict[str, _Question] = {}
        self._slots_wanted = -math.inf
        self._tasks: set[asyncio.Task[SelfReport]] = set()

    async def close(self) -> None:
        """End the questions that are under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def all(self, *, with_slots: bool = False) -> Reports:
        """What each server that is ready says, as of at most two seconds ago."""
        now = asyncio.get_running_loop().time()
        if with_slots:
            self._slots_wanted = now
        current = self._round
        if current is None or now - current.began >= _FRESH or (with_slots and not current.with_slots):
            current = self._next_round(now)
        asked = {model_id: self._asked(current, model_id, server) for model_id, server in self._ready().items()}
        # Whoever leaves does not take the answers away from the others.
        answers = await asyncio.gather(*map(asyncio.shield, asked.values()))
        return Reports(current.at, dict(zip(asked, answers, strict=True)))

    async def of(self, model_id: str) -> SelfReport | None:
        """What one server says now; ``None`` where it is not ready. For who asks now and then."""
        server = self._ready().get(model_id)
        if server is None:
            return None
        return await self._ask(server.reach, False, asyncio.get_running_loop().time() + _PATIENCE_WITH_ALL)

    async def metrics_of(self, model_id: str) -> Answer | None:
        """What one server answers of its metrics, as of at most two seconds ago; ``None`` where it is not ready.

        For who asks as often as they like. No other server is asked.
        """
        server = self._ready().get(model_id)
        if server is None:
            return None
        task = self._under_way_or_fresh(model_id, server) or self._ask_alone(model_id, server)
        return (await asyncio.shield(task)).metrics

    def _under_way_or_fresh(self, model_id: str, server: ReadyServer) -> asyncio.Task[SelfReport] | None:
        now = asyncio.get_running_loop().time()
        questions = [self._alone.get(model_id)]
        if self._round is not None and model_id in self._round.asked:
            asked, task = self._round.asked[model_id]
            questions.append(_Question(asked, self._round.began, task))
        for each in questions:
            if each and each.server == server and (not each.task.done() or now - each.began < _FRESH):
                return each.task
        return None

    def _ask_alone(self, model_id: str, server: ReadyServer) -> asyncio.Task[SelfReport]:
        loop = asyncio.get_running_loop()
        task = self._begin(model_id, server, with_slots=False)
        question = self._alone[model_id] = _Question(server, loop.time(), task)

        def forget() -> None:
            if self._alone.get(model_id) is question:
                del self._alone[model_id]

        task.add_done_callback(lambda _: loop.call_later(_FRESH, forget))
        return task

    def _next_round(self, now: float) -> _Round:
        with_slots = now - self._slots_wanted < _SLOTS_WANTED
        before = self._round
        # A question that is not answered yet is not asked again.
        open_questions = {
            model_id: (server, task)
            for model_id, (server, task) in (before.asked if before else {}).items()
            if before and before.with_slots >= with_slots and not task.done()
        }
        self._round = made = _Round(datetime.now(UTC), now, with_slots, open_questions)
        asyncio.get_running_loop().call_later(_FRESH, self._forget, made)
        return made

    def _forget(self, old: _Round) -> None:
        """Keep no answers that nobody will be given."""
        if self._round is old and all(task.done() for _, task in old.asked.values()):
            self._round = None

    def _asked(self, current: _Round, model_id: str, server: ReadyServer) -> asyncio.Task[SelfReport]:
        known = current.asked.get(model_id)
        if known is not None and known[0] == server:
            return known[1]
        task = self._begin(model_id, server, current.with_slots)
        current.asked[model_id] = (server, task)
        return task

    def _begin(self, model_id: str, server: ReadyServer, with_slots: bool) -> asyncio.Task[SelfReport]:
        deadline = asyncio.get_running_loop().time() + _PATIENCE_WITH_ALL
        asking = self._ask(server.reach, with_slots, deadline)
        task = asyncio.create_task(asking, name=f"what {model_id} says of itself")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, reach: Reach, with_slots: bool, deadline: float) -> SelfReport:
        async with self._gate:
            if not with_slots:
                return SelfReport(await self._answer(reach, _METRICS, deadline), None)
            metrics, slots = await asyncio.gather(
                self._answer(reach, _METRICS, deadline), self._answer(reach, _SLOTS, deadline)
            )
            return SelfReport(metrics, slots)

    async def _answer(self, reach: Reach, path: str, deadline: float) -> Answer:
        loop = asyncio.get_running_loop()
        began = loop.time()
        if began >= deadline:
            return Answer(0.0, problem="it was not asked: the servers before it took too long", is_late=True)
        try:
            async with asyncio.timeout(min(_PATIENCE, deadline - began)):
                status, body = await self._fetch(reach, path)
        except TimeoutError:
            problem = f"it did not answer within {_PATIENCE:g} seconds"
            return Answer(loop.time() - began, problem=problem, is_late=True)
        except _TooLarge:
            return Answer(loop.time() - began, problem=f"its answer is larger than {_MOST_BYTES} bytes")
        except (ExchangeError, OSError) as error:
            return Answer(loop.time() - began, problem=f"it cannot be asked: {error}")
        return Answer(loop.time() - began, body, status)

    async def _fetch(self, reach: Reach, path: str) -> tuple[int, bytes | None]:
        """The status of a server's answer, and its body where it is what was asked for.

        Raises ``_TooLarge`` and what ``ServerConnections.ask`` does.
        """
        with await self._connections.ask(reach, "GET", path, silence=_PATIENCE) as answer:
            if answer.status != 200 or "Content-Encoding" in answer.headers:
                return answer.status, None
            if (body := await answer.read(_MOST_BYTES)) is None:
                raise _TooLarge
            return answer.status, body


class _TooLarge(Exception):
    """An answer is larger than any that is expected."""
