"""Who may start: each start is decided alone, one after the other, the most wanted first.

What was admitted is a promise until the server has failed or is gone: what it needs without what it uses already is
not there for others. That holds for one that is ready too, as far as its own memory goes: llama-server allocates its
buffers at once, and takes the pages of a large part of them when the first long prompts come. Nothing of it is kept: of
what runs when the agent comes up, it is derived anew.

Of GPUs, the whole of what a server was given is promised until it is ready: what it has taken of it by then is counted
twice so long, and the start that is refused for it is tried again when it is ready.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.host.memory import HostMemory
from magi_agent.host.unit_memory import UnitMemory, mapped_by, unit_memory
from magi_agent.memory.need import Basis
from magi_agent.servers.launch import LaunchSpecification, model_id_of
from magi_agent.servers.llama_server import differences
from magi_agent.servers.placed import Placed, Placing
from magi_agent.servers.shortage import Shortage, arithmetic, insufficient_memory, outstanding, room_of, shortage_of
from magi_agent.servers.start_order import Rank
from magi_agent.systemd.status import UnitStatus

_LOG: Final = logging.getLogger(__name__)
_FRESH: Final = 1.0
"""Seconds that figures of the host hold while nobody has taken any memory since."""
_PAUSE: Final = 0.25
"""Seconds between two looks for memory that is about to come back."""
_HOST_COMES_BACK: Final = 2.0
"""Seconds after the end of a server in which memory of the host may come back yet."""
_GPU_COMES_BACK: Final = 10.0
"""The same of GPUs, whose drivers take their time."""
_LEAVES_WITHIN: Final = 30.0
"""Seconds that a server which is being stopped is waited for."""
_PATIENCE: Final = 10.0
"""Seconds that files and drivers have to tell what a start needs."""
_TURN: Final = 1.0
"""Seconds that a start which is being prepared holds up those that are less wanted."""
_STALE: Final = 1.0
"""Seconds after which a launch that waited is prepared anew: its settings may be others by now."""
_ASK_AGAIN: Final = 5.0
"""Seconds after which it is asked again what a server needs that is ready and was not measured yet."""
_MOST_TOLD: Final = 1000


@dataclass(frozen=True, slots=True)
class Situation:
    """What the reconciler knows of servers that take memory, or give it back."""

    standing: Mapping[str, UnitStatus | None] = field(default_factory=dict)
    """The models that run, or are being started, or are to be: what was promised to them holds. With their units."""
    running: Collection[str] = ()
    """Those of them that have processes."""
    ready: Collection[str] = ()
    """Those of them that are ready."""
    leaving: Collection[str] = ()
    """The models whose servers are being stopped."""


@dataclass(slots=True)
class _Undecided:
    """A start that asks to be admitted."""

    rank: Rank
    since: float
    is_known: bool = False
    """Whether its need is."""
    is_prepared: bool = False
    """Whether it was prepared once, and waits for its turn or for memory."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def least(self) -> Rank:
        """The best rank that it may have."""
        return self.rank if self.is_known else replace(self.rank, need=0)


class Admission:
    """Admits starts, and remembers what was promised."""

    def __init__(
        self,
        placing: Placing,
        launch_of: Callable[[str], LaunchSpecification | None],
        memory: Callable[[float], Awaitable[HostMemory]],
        reserve: int,
    ) -> None:
        """``launch_of`` is how a model would be started as things stand; ``memory`` the host's, so old at most.

        ``reserve`` are bytes that no server gets.
        """
        self._placing = placing
        self._launch_of = launch_of
        self._memory = memory
        self._reserve = reserve
        self._promises: dict[str, Placed] = {}
        self._undecided: dict[str, _Undecided] = {}
        self._turn = asyncio.Lock()
        self._took = True
        """Whether memory was taken or given back since the host's figures were looked at last."""
        self._ended: dict[str, float] = {}
        self._leaving: dict[str, float] = {}
        """Since when each server is known to be leaving."""
        self._asked: dict[str, float] = {}
        """When it was asked last whether it is known more surely what a server needs."""
        self._checked: tuple[float, LaunchSpecification, Placed] | None = None
        """When what launch was checked last, and its place: the start that follows needs no other."""
        self._promised: tuple[float, int] | None = None
        """When it was reckoned for somebody who looks what is promised, and how much that is, while that holds."""
        self._told: set[tuple[str, str]] = set()
        self.look: Callable[[], Situation] = Situation
        """How things are; the reconciler's."""

    def reconfigure(self, reserve: int) -> None:
        """Keep another reserve from now on."""
        self._reserve = reserve
        self._tell()

    @property
    def waiting(self) -> Collection[str]:
        """The models whose start waits for its turn, or for memory."""
        return tuple(model_id for model_id, start in self._undecided.items() if start.is_prepared)

    def note_ready(self) -> None:
        """Take note that a server is ready: less may be promised to it from now on."""
        self._took = True
        self._tell()

    def note_failed(self, model_id: str) -> None:
        """Take note that a server has failed: nothing is promised to it any more."""
        self._promises.pop(model_id, None)
        self._took = True
        self._tell()

    def note_ended(self, model_id: str, *, is_to_start: bool) -> None:
        """Take note that a server has ended: its memory is back, or comes back soon; one that starts anew keeps it."""
        if not is_to_start:
            self._promises.pop(model_id, None)
        self._ended[model_id] = asyncio.get_running_loop().time()
        self._leaving.pop(model_id, None)
        self._took = True
        self._tell()

    async def hold(self, model_id: str) -> None:
        """Promise a server that is about to be restarted what it needs, so that nobody takes it in between."""
        launch = self._launch_of(model_id)
        if launch is not None:
            self._promises[model_id] = await self._derived(launch)

    async def admit(
        self,
        rank: Rank,
        prepare: Callable[[], Awaitable[LaunchSpecification]],
        is_forced: Callable[[], bool],
    ) -> Placed:
        """Wait for the turn of a model, and for memory that is about to come back; promise it what it needs.

        Returns what to launch. Raises ``InsufficientMemory``, and what ``prepare`` and placing raise. It may be
        cancelled.
        """
        loop = asyncio.get_running_loop()
        model_id = rank.model_id
        mine = self._undecided[model_id] = _Undecided(rank, loop.time())
        is_told = False
        try:
            while True:
                mine.is_known, mine.since = False, loop.time()
                launch = await prepare()
                placed = await self._place_first(launch)
                mine.rank = replace(rank, need=_need_bytes(placed, rank.need))
                mine.is_known = mine.is_prepared = True
                self._tell()
                known_at = loop.time()
                while not is_forced() and self._is_another_first(mine):
                    await self._next_look(mine)
                if loop.time() - known_at > _STALE:
                    continue
                async with self._turn:
                    placed, shortage, ceiling = await self._decide(launch, placed, {model_id})
                    if shortage is None or is_forced():
                        placed = replace(placed, overruled=arithmetic(shortage) if shortage else None)
                        self._promises[model_id] = placed
                        self._took = True
                        return placed
                if not self._may_come_back(shortage, ceiling):
                    self._promises.pop(model_id, None)
                    raise insufficient_memory(model_id, shortage)
                if not is_told:
                    is_told = True
                    _LOG.info("the start of %s waits for memory that is coming back", model_id)
                await self._next_look(mine)
        finally:
            del self._undecided[model_id]
            self._tell()

    async def promised(self) -> int:
        """What the servers that were admitted will take yet of the host's memory, in bytes; at most a second old.

        Raises ``TimeoutError`` where files or drivers do not tell in time what one of them needs.
        """
        async with asyncio.timeout(_PATIENCE), self._turn:
            now = asyncio.get_running_loop().time()
            # Who only looks must not hold up starts, however many do.
            if self._promised is None or now - self._promised[0] >= _FRESH:
                host, _ = await self._outstanding(())
                self._promised = now, host
            return self._promised[1]

    async def check(self, launch: LaunchSpecification, running: UnitStatus | None = None) -> None:
        """See that a start would not be refused as things stand; one that would have to wait is none.

        ``running`` is the server that is to be replaced: what it uses counts as free. Raises ``InsufficientMemory``,
        and what placing raises.
        """
        placed = await self._place(launch, {})
        if running is None:
            self._checked = (asyncio.get_running_loop().time(), launch, placed)
        async with self._turn:
            _, shortage, ceiling = await self._decide(launch, placed, {launch.model_id}, [running] if running else ())
        # What the server that runs gives back of GPUs is not known here.
        is_short = shortage is not None and (running is None or shortage.short_by > 0)
        if shortage is not None and is_short and not self._may_come_back(shortage, ceiling):
            raise insufficient_memory(launch.model_id, shortage)

    async def not_fitting(
        self, launches: Sequence[LaunchSpecification], leaving: Sequence[UnitStatus]
    ) -> dict[str, Shortage]:
        """Which of some starts would not fit, one after the other, once some servers are gone. Promises nothing."""
        found: dict[str, Shortage] = {}
        admitted = 0
        gone = {model_id_of(unit.name) for unit in leaving}
        for launch in launches:
            placed = await self._derived(launch)
            async with self._turn:
                _, shortage, _ = await self._decide(
                    launch, placed, {launch.model_id, *gone}, leaving, promised=admitted
                )
            if shortage is not None:
                found[launch.model_id] = shortage
            else:
                admitted += outstanding(placed, None, is_ready=False)
        return found

    async def _decide(
        self,
        launch: LaunchSpecification,
        placed: Placed,
        but: Collection[str],
        returning: Sequence[UnitStatus] = (),
        *,
        promised: int = 0,
    ) -> tuple[Placed, Shortage | None, int]:
        """Whether one start fits beside all but some that were admitted; and the most that any start may need.

        What the units ``returning`` use counts as free, and ``promised`` bytes more as promised.
        """
        model_id = launch.model_id
        host, gpus = await self._outstanding(but)
        if gpus and (placed.gpu_bytes or placed.gpu_shortage):
            placed = await self._place(launch, gpus)
        if placed.unknown:
            self._say_once(model_id, f"what it needs of memory is not known: {placed.unknown}")
        memory = await self._figures(model_id) if placed.need else None
        if memory is None:
            return placed, shortage_of(placed, None), 0
        room = room_of(memory, host + promised, self._reserve)
        if returning:
            used = await asyncio.to_thread(_used_by, {model_id_of(unit.name): unit for unit in returning})
            if len(used) < len(returning):
                self._say_once(model_id, "what the server uses that it takes the place of is not known")
                return placed, shortage_of(placed, None), 0
            own = sum(each.anonymous for each in used.values())
            weights = sum(self._mapped_by(each, used.get(each), placed) for each in used)
            room = replace(room, available=room.available + own + min(weights, memory.mapped))
        ceiling = min((memory.total, *(limit.least for limit in memory.limits))) - self._reserve
        return placed, shortage_of(placed, room), ceiling

    def _mapped_by(self, model_id: str, used: UnitMemory | None, placed: Placed) -> int:
        """What a server that ends has mapped for itself: its weights, but neither programs nor libraries.

        It may not be seen: a control group counts what it has brought in, and processes of others may be hidden.
        """
        promise = self._promises.get(model_id)
        need = promise.need if promise else None
        if need is None and model_id == placed.launch.model_id:
            need = placed.need
        return need.mapped if need else used.mapped if used else 0

    async def _figures(self, model_id: str) -> HostMemory | None:
        """The host's memory; ``None`` where nobody knows."""
        # Uses were looked at before: what moved from there into the host's figures since is counted twice, not never.
        is_quiet = not (self._took or self._promises)
        try:
            memory = await self._memory(_FRESH if is_quiet else 0.0)
        except (TimeoutError, MagiError) as error:
            self._say_once(model_id, f"the host's memory is not known: {str(error) or 'nobody told'}")
            return None
        self._took = bool(self._promises)
        return memory

    async def _outstanding(self, but: Collection[str]) -> tuple[int, dict[str, int]]:
        """What all servers but some will take yet, of the host and of each GPU."""
        situation = self.look()
        for model_id in self._promises.keys() - situation.standing.keys() - set(but):
            del self._promises[model_id]
            self._asked.pop(model_id, None)
            self._took = True
        for model_id in situation.running:
            await self._look_at(model_id, situation.standing[model_id], is_ready=model_id in situation.ready)
        others = {model_id: placed for model_id, placed in self._promises.items() if model_id not in but}
        if not others:
            return 0, {}
        used = await asyncio.to_thread(_used_by, {each: situation.standing.get(each) for each in others})
        gpus: dict[str, int] = {}
        host = 0
        for model_id, placed in others.items():
            is_ready = model_id in situation.ready
            host += outstanding(placed, used.get(model_id), is_ready=is_ready)
            if not is_ready:
                for name, count in placed.gpu_bytes.items():
                    gpus[name] = gpus.get(name, 0) + count
        return host, gpus

    async def _look_at(self, model_id: str, unit: UnitStatus | None, *, is_ready: bool) -> None:
        """See to it that what a running server needs is known, and as surely as it can be."""
        promise = self._promises.get(model_id)
        if promise is None:
            launch = self._launch_of(model_id)
            if launch is None or unit is None:
                return
            self._promises[model_id] = placed = await self._derived(launch)
            is_on_gpus = bool(placed.gpu_bytes or placed.gpu_shortage)
            if is_ready and (is_on_gpus or differences(launch, unit.argv, unit.environment)):
                # Nobody knows any more: it was started by other settings, or when GPUs were free that it has now.
                self._promises[model_id] = replace(placed, need=None)
            return
        now = asyncio.get_running_loop().time()
        is_unsure = is_ready and promise.need is not None and promise.need.basis is not Basis.MEASURED
        is_unsure = is_unsure and not promise.gpu_bytes  # it would be placed elsewhere now
        if is_unsure and now - self._asked.get(model_id, -_ASK_AGAIN) >= _ASK_AGAIN:
            self._asked[model_id] = now
            self._promises[model_id] = replace(promise, need=(await self._derived(promise.launch)).need)

    async def _place(self, launch: LaunchSpecification, promised: Mapping[str, int]) -> Placed:
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._placing.place(launch, promised)
        except TimeoutError:
            return Placed(launch, None, f"nobody told within {_PATIENCE:.0f} seconds", {}, None)

    async def _place_first(self, launch: LaunchSpecification) -> Placed:
        """Place a launch as if nothing were promised; as it was checked a moment ago, where that was the same one."""
        checked, self._checked = self._checked, None
        if checked is not None:
            at, before, placed = checked
            age = asyncio.get_running_loop().time() - at
            if age < _FRESH and replace(before, port=launch.port) == launch:
                return replace(placed, launch=replace(placed.launch, port=launch.port))
        return await self._place(launch, {})

    async def _derived(self, launch: LaunchSpecification) -> Placed:
        """As ``_place``, for what is no start: what cannot be placed needs nothing that is known."""
        try:
            return await self._place(launch, {})
        except MagiError as error:
            return Placed(launch, None, error.message, {}, None)

    def _is_another_first(self, mine: _Undecided) -> bool:
        now = asyncio.get_running_loop().time()
        return any(
            other.least < mine.rank and (other.is_known or now - other.since < _TURN)
            for other in self._undecided.values()
            if other is not mine
        )

    def _may_come_back(self, shortage: Shortage, ceiling: int) -> bool:
        """Whether memory is about to come back that may make up for what is missing."""
        now = asyncio.get_running_loop().time()
        if shortage.short_by and shortage.needed > ceiling:
            return False
        leaving = self.look().leaving
        self._leaving = {model_id: self._leaving.get(model_id, now) for model_id in leaving}
        self._ended = {model_id: at for model_id, at in self._ended.items() if now - at < _GPU_COMES_BACK}
        within = _GPU_COMES_BACK if shortage.gpu else _HOST_COMES_BACK
        return any(now - since < _LEAVES_WITHIN for since in self._leaving.values()) or any(
            now - at < within for at in self._ended.values()
        )

    @staticmethod
    async def _next_look(mine: _Undecided) -> None:
        """Wait for news, and not for long."""
        try:
            async with asyncio.timeout(_PAUSE):
                await mine.news.wait()
        except TimeoutError:
            return
        mine.news.clear()

    def _tell(self) -> None:
        """Have the start that is wanted most look again at once; the others look again soon."""
        self._promised = None
        first = min(self._undecided.values(), key=lambda each: each.least, default=None)
        if first is not None:
            first.news.set()

    def _say_once(self, model_id: str, reason: str) -> None:
        if (model_id, reason) in self._told:
            return
        if len(self._told) >= _MOST_TOLD:
            self._told.clear()
        self._told.add((model_id, reason))
        _LOG.warning("%s is started without knowing whether it fits: %s", model_id, reason)


def _need_bytes(placed: Placed, otherwise: int) -> int:
    return placed.need.host_bytes + placed.need.gpu_bytes if placed.need else otherwise


def _used_by(units: Mapping[str, UnitStatus | None]) -> dict[str, UnitMemory]:
    """What the processes of some units use. Blocks a little."""
    found = {}
    for model_id, unit in units.items():
        if unit is not None and unit.main_pid and (seen := unit_memory(unit.control_group, unit.main_pid)):
            # Its control group counts only what it brought in itself.
            found[model_id] = replace(seen, mapped=max(seen.mapped, mapped_by(unit.main_pid)))
    return found
