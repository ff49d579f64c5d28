"""Which requests may ask their model now, and which wait for it: one lane for each model.

A request enters its model's lane, and is let through at once where the model is ready, and has no more requests than
it may (``maxConcurrent``). Else it waits there, in order, and the lane has the model started, if it is not ready, and
is one that is started for requests. Where that does not fit into memory, others of that kind leave: those that are
idle first, the longest idle for their size before others; then those that are in use, once the requests that they
have been given are answered. What comes for such a one meanwhile waits in its lane for the next turn. Turns are taken
in the order in which lanes asked for room, so whoever waits gets one, and all that wait for one model are served
together before it has to leave again. Where a server turns out to be gone, nobody is let through to it until that is
known everywhere.

Nothing is started or stopped here: ``Servers`` is told what is wanted.
"""

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from magi_agent.errors import InsufficientMemory, MagiError, ServiceUnavailable
from magi_agent.events import EventStream
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.reach import Reach
from magi_agent.servers.reconciler import OUTCOMES
from magi_agent.servers.servers import Servers
from magi_agent.vocabulary import ServerState, StartPolicy

_LOG: Final = logging.getLogger(__name__)
BY: Final = "gateway"
"""Who started a model for a request, or stopped one to make room."""
_STOP_WAIT: Final = 120.0
_TRIES: Final = 5
"""To start a model that should fit, and does not after all: memory is other programs' as well."""
_NOT_THERE: Final = frozenset({ServerState.FAILED, ServerState.COOLDOWN, ServerState.STUCK})
"""States of models that are wanted, and give no memory back."""
_COMING_UP: Final = frozenset({ServerState.STARTING, ServerState.LOADING})
_RETRY_AFTER: Final = 2
_QUEUE_RETRY_AFTER: Final = 10
_FAILED_FOR: Final = 30.0
"""Seconds in which a start for requests that failed says that the next one will too."""
_NOTICED_WITHIN: Final = 5.0
"""Seconds in which it is known that a server has ended; it takes some milliseconds."""
_NOTICED_SOON: Final = 0.5
"""The same where it may have had another reason to end a connection."""


class QueueFull(MagiError):
    """As many requests wait for the model as may."""

    error = "QueueFull"
    status = 429

    def __init__(self, model_id: str, waiting: int) -> None:
        super().__init__(
            f"{waiting} requests wait for {model_id} already, which is the most: ask again later",
            {"modelId": model_id},
        )
        self.retry_after = _QUEUE_RETRY_AFTER


class NotUp(ServiceUnavailable):
    """Somebody looks at a server that is not ready. A monitor is told so again and again, and nothing is wrong."""

    is_trouble = False


@dataclass(slots=True)
class _Lane:
    """The requests for one model."""

    asking: int = 0
    """Those that were let through, and are not answered yet."""
    waiting: "deque[asyncio.Future[Reach]]" = field(default_factory=deque)
    start: "asyncio.Task[None] | None" = None
    """What brings the model up for those that wait."""
    refused: "asyncio.Task[None] | None" = None
    """There while a server that counts as ready seems to have ended, so that nobody is let through."""
    yields: bool = False
    """Whether the model is to leave, so that nobody is let through."""
    owed: int = 0
    """Of those that wait, the first so many have their turn before the model leaves."""
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    """Set each time that nobody asks any more, or is to before the model leaves."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has left."""
    used_at: float = 0.0
    """When somebody asked last, on the event loop's clock."""
    failed_at: float = -math.inf
    """When a start for requests failed last, on that clock."""


class Entry:
    """One request in a model's lane. To be left once, where it was entered."""

    __slots__ = ("_lane", "_lanes", "_model")

    def __init__(self, lanes: "Lanes", model: Model) -> None:
        self._lanes = lanes
        self._model = model
        self._lane: _Lane | None = None

    async def enter(self) -> Reach:
        """Where the model's server is, once the request may ask it, which it does until this is left.

        Raises ``QueueFull``, ``ServiceUnavailable``, and what a start raises.
        """
        self._lane, reach = await self._lanes.enter(self._model)
        return reach

    def leave(self) -> None:
        """Ask no more."""
        assert self._lane is not None  # noqa: S101  # who was not let in has nothing to leave
        self._lanes.leave(self._model.model_id, self._lane)

    async def __aenter__(self) -> Reach:
        return await self.enter()

    async def __aexit__(self, *_: object) -> None:
        self.leave()


class Lanes:
    """The lanes of all models."""

    def __init__(
        self,
        servers: Servers,
        registry: Registry,
        effective: EffectiveSettings,
        events: EventStream,
        *,
        most_waiting: Callable[[], int],
        patience: Callable[[], float],
    ) -> None:
        """``most_waiting`` requests in one lane, for ``patience`` seconds each."""
        self._servers = servers
        self._registry = registry
        self._effective = effective
        self._events = events
        self._most_waiting = most_waiting
        self._patience = patience
        self._lanes: dict[str, _Lane] = {}
        self._room = asyncio.Lock()
        self._turns_away = False

    def turn_away(self) -> None:
        """Tell those that wait, or would from now on, to ask the next agent; the starts that they wait for go on."""
        self._turns_away = True
        for model_id, lane in self._lanes.items():
            self._refuse(lane, _stopping(model_id))

    async def close(self) -> None:
        """Let go of those that wait."""
        tasks = [task for lane in self._lanes.values() for task in (lane.start, lane.refused) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_on_demand(self, model: Model) -> bool:
        """Whether a model is started for requests."""
        return model.choices.enabled and self._effective.start_policy(model) is StartPolicy.ON_DEMAND

    def has_to_wait(self, model: Model) -> bool:
        """Whether a request for the model would wait now. Raises ``QueueFull``."""
        lane = self._lanes.get(model.model_id)
        if self._open(model.model_id, lane) is not None:
            return False
        if not self._comes_up(model) and self._servers.reach_if_ready(model.model_id) is None:
            return False
        if lane is not None:
            self._check_room_to_wait(model.model_id, lane)
        return True

    def entered(self, model: Model) -> "Entry":
        """A request's place among those that the model is given, which it may have to wait for."""
        return Entry(self, model)

    async def enter(self, model: Model) -> tuple[_Lane, Reach]:
        """For an ``Entry``, which raises what this does."""
        model_id = model.model_id
        lane = self._lanes.get(model_id)
        if lane is None:
            lane = self._lanes[model_id] = _Lane()
        reach = self._open(model_id, lane)
        if reach is not None:
            lane.asking += 1
        elif self._comes_up(model) or lane.yields or self._servers.reach_if_ready(model_id) is not None:
            reach = await self._waited(model_id, lane)
        else:
            raise self._not_ready(model_id)
        return lane, reach

    def refused(self, model_id: str, *, may_live: bool = False) -> None:
        """Let nobody through to a server at which nobody takes connections, until it is known that it has ended.

        ``may_live`` is for one that ended a connection without a word, which is soon known or not so. Who comes
        meanwhile, or comes again, waits as for one that is not ready.
        """
        lane = self._lanes.setdefault(model_id, _Lane())
        if lane.refused is None and self._servers.reach_if_ready(model_id) is not None:
            within = _NOTICED_SOON if may_live else _NOTICED_WITHIN
            noticed = self._noticed(model_id, lane, within)
            lane.refused = asyncio.create_task(noticed, name=f"end of the server of {model_id}")

    def looked_at(self, model: Model) -> Reach:
        """Where the model's server is, for who only looks at it: that starts nothing, and is no use of it.

        Raises ``NotUp`` where it is not ready, at once.
        """
        reach = self._servers.reach_if_ready(model.model_id)
        if reach is None:
            raise self._not_ready(model.model_id, NotUp)
        return reach

    def is_open(self, model_id: str) -> bool:
        """Whether a request for the model would be let through at once."""
        return self._open(model_id, self._lanes.get(model_id)) is not None

    def is_up(self, model_id: str) -> bool:
        """Whether the model is ready, and is not to leave."""
        lane = self._lanes.get(model_id)
        return not (lane and (lane.yields or lane.refused)) and self._servers.reach_if_ready(model_id) is not None

    def can_start(self, model: Model) -> bool:
        """Whether a request would have the model started and wait for it, as far as is known without trying."""
        lane = self._lanes.get(model.model_id)
        return (
            self.is_on_demand(model)
            and model.is_usable
            and self._servers.drain is None
            and self._servers.state(model.model_id) not in _NOT_THERE
            and (lane is None or len(lane.waiting) < self._most_waiting())
            # What else keeps it from starting, only a start finds out.
            and (lane is None or asyncio.get_running_loop().time() - lane.failed_at >= _FAILED_FOR)
        )

    def is_awaited(self, model_id: str) -> bool:
        """Whether requests wait for the model."""
        lane = self._lanes.get(model_id)
        return lane is not None and bool(lane.waiting)

    def asking(self, model_id: str) -> int:
        """Requests that were let through to the model, and are not answered yet."""
        lane = self._lanes.get(model_id)
        return lane.asking if lane else 0

    def requests(self, model_id: str) -> int:
        """Requests for the model that are not answered yet, those that wait included."""
        lane = self._lanes.get(model_id)
        return lane.asking + len(lane.waiting) if lane else 0

    def is_idle(self, model_id: str) -> bool:
        """Whether nobody asks the model anything, or waits for it."""
        lane = self._lanes.get(model_id)
        return lane is None or not (lane.asking or lane.waiting or lane.yields)

    def used_at(self, model_id: str) -> float:
        """When a model was asked last, on the event loop's clock; 0 for never."""
        lane = self._lanes.get(model_id)
        return lane.used_at if lane else 0.0

    async def send_away(self, model_id: str, by: str) -> None:
        """Have a model stopped once those are answered that it was given; who comes meanwhile waits."""
        lane = self._lanes.setdefault(model_id, _Lane())
        # Those that it comes up for have their turn before it leaves.
        await self._until_settled(model_id)
        if lane.yields:
            # Somebody else sends it away already.
            await lane.left.wait()
            return
        if reach := self._open_for_all(model_id, lane):
            self._let_through(model_id, lane, reach)
        lane.yields = True
        lane.owed = len(lane.waiting) if lane.asking else 0
        lane.left.clear()
        try:
            while lane.asking or lane.owed:
                lane.emptied.clear()
                await lane.emptied.wait()
            _ = await self._servers.stop(model_id, by=by, wait=_STOP_WAIT)
        finally:
            lane.yields = False
            lane.owed = 0
            lane.left.set()
            if lane.waiting:
                self._bring_up(model_id, lane)
            self._forget(model_id, lane)

    def _open(self, model_id: str, lane: _Lane | None) -> Reach | None:
        """Where the server is, if a request may ask it at once."""
        if lane is not None and (lane.yields or lane.waiting or lane.refused):
            return None
        if lane is not None and lane.asking and lane.asking >= self._most(model_id):
            return None
        return self._servers.reach_if_ready(model_id)

    async def _until_settled(self, model_id: str) -> None:
        """Wait while a model is coming up."""
        with self._events.subscribe() as changes:
            while self._servers.is_wanted(model_id) and self._servers.state(model_id) not in OUTCOMES:
                await changes.next()

    def _open_for_all(self, model_id: str, lane: _Lane) -> Reach | None:
        """Where the server is, if those that wait may ask it, as many at once as may."""
        return None if lane.refused or (lane.yields and not lane.owed) else self._servers.reach_if_ready(model_id)

    def _most(self, model_id: str) -> float:
        """Requests that a model may be given at once."""
        model = self._registry.models.get(model_id)
        most = self._effective.max_concurrent(model) if model is not None else None
        return math.inf if most is None else most

    def _comes_up(self, model: Model) -> bool:
        """Whether it helps to wait for the model: it is started for requests, or on its way already."""
        return self.is_on_demand(model) or (
            self._servers.is_wanted(model.model_id) and self._servers.state(model.model_id) in _COMING_UP
        )

    def _not_ready(self, model_id: str, error: type[ServiceUnavailable] = ServiceUnavailable) -> ServiceUnavailable:
        state = self._servers.state(model_id)
        if state in _COMING_UP:
            advice = "ask again later"
        elif state in _NOT_THERE:
            advice = f"magictl show {model_id} says why"
        else:
            advice = f"magictl start {model_id} starts it"
        return error(model_id, f"model {model_id} is {state}: {advice}", _RETRY_AFTER)

    def _let_through(self, model_id: str, lane: _Lane, reach: Reach) -> None:
        most = self._most(model_id)
        while lane.waiting and lane.asking < most and not (lane.yields and not lane.owed):
            turn = lane.waiting.popleft()
            lane.owed = max(0, lane.owed - 1)
            if not turn.done():
                # Counted now, not when it goes on: until then, somebody might take the model for idle.
                lane.asking += 1
                turn.set_result(reach)

    def _check_room_to_wait(self, model_id: str, lane: _Lane) -> None:
        if len(lane.waiting) >= self._most_waiting():
            raise QueueFull(model_id, len(lane.waiting))

    async def _waited(self, model_id: str, lane: _Lane) -> Reach:
        if self._turns_away:
            # One whose draft was turned away, for one: its second stage would have a model started for nobody.
            raise _stopping(model_id)
        self._check_room_to_wait(model_id, lane)
        turn: asyncio.Future[Reach] = asyncio.get_running_loop().create_future()
        lane.waiting.append(turn)
        if self._servers.reach_if_ready(model_id) is None:
            self._bring_up(model_id, lane)
        try:
            async with asyncio.timeout(self._patience()):
                return await turn
        except BaseException as error:  # who asked may have left, too; all but the end of patience goes on its way
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # It was let through in the moment in which it gave up.
                self.leave(model_id, lane)
            else:
                self._give_up(lane, turn)
                self._forget(model_id, lane)
            if isinstance(error, TimeoutError):
                raise ServiceUnavailable(
                    model_id, f"model {model_id} did not get its turn within {self._patience():g} seconds", _RETRY_AFTER
                ) from None
            raise

    def leave(self, model_id: str, lane: _Lane) -> None:
        """For an ``Entry`` that was let through."""
        lane.asking -= 1
        lane.used_at = asyncio.get_running_loop().time()
        self._see_after(model_id, lane)

    async def _noticed(self, model_id: str, lane: _Lane, within: float) -> None:
        """Wait until a server is no longer ready, so many seconds at most."""
        try:
            with self._events.subscribe() as changes, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within):
                    while self._servers.reach_if_ready(model_id) is not None:
                        await changes.next()
        finally:
            lane.refused = None
        self._see_after(model_id, lane)

    def _see_after(self, model_id: str, lane: _Lane) -> None:
        """See whether something follows for those that wait, now that one thing less holds them up."""
        if lane.waiting and lane.start is None and lane.refused is None:
            self._go_on(model_id, lane)
        if not (lane.asking or lane.owed):
            lane.emptied.set()
        self._forget(model_id, lane)

    def _go_on(self, model_id: str, lane: _Lane) -> None:
        """Give a place that is free to the next that waits."""
        if reach := self._open_for_all(model_id, lane):
            self._let_through(model_id, lane, reach)
        elif lane.yields:
            # Those that are left have the next turn: this one is over where the server is not there any more.
            lane.owed = 0
        elif (model := self._registry.models.get(model_id)) is not None and self._comes_up(model):
            self._bring_up(model_id, lane)
        else:
            self._refuse(lane, self._not_ready(model_id))

    @staticmethod
    def _refuse(lane: _Lane, problem: MagiError) -> None:
        waiting, lane.waiting = lane.waiting, deque()
        for turn in waiting:
            if not turn.done():
                turn.set_exception(problem)

    @staticmethod
    def _give_up(lane: _Lane, turn: "asyncio.Future[Reach]") -> None:
        """Free the place of one that waits no longer."""
        try:
            place = lane.waiting.index(turn)
        except ValueError:
            return
        del lane.waiting[place]
        if place < lane.owed:
            lane.owed -= 1
            if not (lane.asking or lane.owed):
                lane.emptied.set()

    def _forget(self, model_id: str, lane: _Lane) -> None:
        """Keep no lane of a model that there is not any more."""
        if model_id not in self._registry.models and self.is_idle(model_id) and not (lane.start or lane.refused):
            self._lanes.pop(model_id, None)

    def _bring_up(self, model_id: str, lane: _Lane) -> None:
        if lane.start is None and not lane.yields:
            lane.start = asyncio.create_task(self._started(model_id, lane), name=f"start of {model_id} for requests")

    async def _started(self, model_id: str, lane: _Lane) -> None:
        """Have the model started, and let those through that wait; or tell them why not."""
        problem: MagiError = ServiceUnavailable(
            model_id, f"model {model_id} was stopped before it was ready", _RETRY_AFTER
        )
        try:
            model = self._registry.models.get(model_id)
            if model is None or self.is_on_demand(model):
                await self._start(model_id)
                lane.failed_at = -math.inf
            else:
                # Somebody else wants it, whose word this stays.
                await self._until_settled(model_id)
                if self._servers.is_wanted(model_id):
                    problem = self._not_ready(model_id)
        except MagiError as error:
            problem = error
            lane.failed_at = asyncio.get_running_loop().time()
        finally:
            lane.start = None
            if reach := self._open_for_all(model_id, lane):
                self._let_through(model_id, lane, reach)
            elif not lane.yields:
                self._refuse(lane, problem)

    async def _start(self, model_id: str) -> None:
        """Have a model started, and others leave for it where they have to. Raises what a start raises."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience()
        tries = 0
        while True:
            tries += 1
            async with self._room:
                if self._servers.reach_if_ready(model_id) is not None:
                    return
                for other in await self._leaving_for(model_id):
                    _LOG.info("server of %s is stopped to make room for %s", other, model_id)
                    await self.send_away(other, f"{BY}, for {model_id}")
                # From now on its memory is promised to it: the next one decides with that.
                _ = await self._servers.bring_up(model_id, by=BY)
            try:
                _ = await self._servers.bring_up(model_id, by=BY, wait=deadline - loop.time())
            except InsufficientMemory:
                # Nobody else may have it started once something happens to leave: it is not its turn any more.
                _ = await self._servers.stop(model_id, by=BY)
                if tries == _TRIES:
                    raise
            else:
                return

    async def _leaving_for(self, model_id: str) -> list[str]:
        """The models that have to leave for another. Raises ``InsufficientMemory`` where it would not fit even then."""
        leaving: list[str] = []
        refused = await self._refused(model_id, leaving)
        if refused is not None:
            # What one would give back that comes up only shows once it is there.
            for coming in self._candidates(model_id):
                await self._until_settled(coming)
            refused = await self._refused(model_id, leaving)
        candidates = self._candidates(model_id)
        while refused is not None:
            if not candidates:
                raise refused
            leaving.append(candidates.pop(0))
            refused = await self._refused(model_id, leaving)
        for spared in leaving[:-1]:
            # What left first may not be needed beside the last one.
            others = [other for other in leaving if other != spared]
            if await self._refused(model_id, others) is None:
                leaving = others
        return leaving

    async def _refused(self, model_id: str, leaving: Iterable[str]) -> InsufficientMemory | None:
        """Why a model would not fit if others left."""
        runs = {model_id: True, **dict.fromkeys(leaving, False)}
        return (await self._servers.not_fitting(runs, self._effective, {})).get(model_id)

    def _candidates(self, model_id: str) -> list[str]:
        """The models that may leave for another, those first that cost least."""
        now = asyncio.get_running_loop().time()

        def cost(model: Model) -> tuple[bool, float]:
            idle_seconds = now - self.used_at(model.model_id)
            return not self.is_idle(model.model_id), model.facts.size_bytes / max(idle_seconds, 1.0)

        may_leave = [
            model
            for model in self._registry.models.values()
            if self._servers.is_wanted(model.model_id)
            and self._servers.state(model.model_id) not in _NOT_THERE
            and model.model_id != model_id
            and self.is_on_demand(model)
            and not self._effective.of(model).pinned
        ]
        return [model.model_id for model in sorted(may_leave, key=cost)]


def _stopping(model_id: str) -> ServiceUnavailable:
    return ServiceUnavailable(model_id, "the agent is stopping; ask again", _RETRY_AFTER)
