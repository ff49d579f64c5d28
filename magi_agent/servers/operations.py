"""Actions on several models at once, which a client may look after by their id.

What is done for one model is somebody else's (``Servers``); here is what becomes of it for all of them together.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Final, Protocol, TypeVar

from magi_agent.errors import MagiError, OperationNotFound
from magi_agent.events import EventStream, OperationFinished

_LOG: Final = logging.getLogger(__name__)
_REMEMBERED: Final = 200
_LONGEST: Final = 3600.0
"""Seconds that what is done for one model may take."""
_Done = TypeVar("_Done")


class Result(Protocol):
    """What an action on one model came to."""

    @property
    def message(self) -> str:
        """It in a sentence."""

    @property
    def settled(self) -> bool:
        """Whether it is done."""


Act = Callable[[str, float], Awaitable[Result]]
"""What is done for one model of several, with the seconds it may take."""


class OperationStatus(StrEnum):
    """How far an operation, or its part for one model, has come."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not begun, since another part failed before it."""


@dataclass(slots=True)
class Part:
    """What an operation does for one model."""

    status: OperationStatus = OperationStatus.PENDING
    message: str = ""


@dataclass(slots=True)
class Operation:
    """One action on several models."""

    kind: str
    parts: dict[str, Part]
    operation_id: str = field(default_factory=lambda: secrets.token_hex(8))
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished_at: datetime | None = None

    @classmethod
    def on(cls, kind: str, model_ids: Iterable[str]) -> "Operation":
        """One that is to be done for these models, in this order."""
        return cls(kind, {model_id: Part() for model_id in model_ids})

    @property
    def status(self) -> OperationStatus:
        """The whole's, from its parts'."""
        if self.finished_at is None:
            return OperationStatus.RUNNING
        failed = any(part.status is not OperationStatus.SUCCEEDED for part in self.parts.values())
        return OperationStatus.FAILED if failed else OperationStatus.SUCCEEDED

    async def all_at_once(self, act: Act, model_ids: Iterable[str] | None = None) -> None:
        """Do it for all models, or for some of them, at the same time."""
        await asyncio.gather(*(self._carry_out(each, act) for each in (self.parts if model_ids is None else model_ids)))

    async def one_by_one(self, act: Act) -> None:
        """Do it for one model after the other, and for none any more after the first that fails."""
        failed = ""
        for model_id, part in self.parts.items():
            if failed:
                part.status, part.message = OperationStatus.SKIPPED, f"left as it runs, since {failed} failed"
                continue
            await self._carry_out(model_id, act)
            if part.status is OperationStatus.FAILED:
                failed = model_id

    async def attempt(self, model_id: str, work: Awaitable[_Done]) -> _Done | None:
        """What comes of something that is done for one model; ``None`` where its part has failed by it."""
        part = self.parts[model_id]
        try:
            return await work
        except MagiError as error:
            part.status, part.message = OperationStatus.FAILED, error.message
        except Exception as error:  # noqa: BLE001  # see below
            # A defect in what is done for one model must not cost the others theirs.
            _LOG.exception("%s of %s ended with a defect", self.kind, model_id)
            part.status, part.message = OperationStatus.FAILED, f"a defect of the agent: {error!r}"
        return None

    async def _carry_out(self, model_id: str, act: Act) -> None:
        part = self.parts[model_id]
        part.status = OperationStatus.RUNNING
        result = await self.attempt(model_id, act(model_id, _LONGEST))
        if result is not None:
            part.status = OperationStatus.SUCCEEDED if result.settled else OperationStatus.FAILED
            part.message = result.message


class Operations:
    """The operations of this agent's life; the oldest are forgotten."""

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._operations: OrderedDict[str, Operation] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End those that are under way; what they wished for stays wished for."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def under_way(self) -> int:
        """How many have not ended."""
        return len(self._tasks)

    def begin(self, operation: Operation, work: Coroutine[object, object, None]) -> Operation:
        """Have ``work`` done, which is all of the operation."""
        self._operations[operation.operation_id] = operation
        while len(self._operations) > _REMEMBERED:
            self._operations.popitem(last=False)
        if not operation.parts:
            operation.finished_at = datetime.now(UTC)
            work.close()
            return operation
        task = asyncio.create_task(work, name=f"{operation.kind} {operation.operation_id}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, operation))
        return operation

    def operation(self, operation_id: str) -> Operation:
        """The operation of this id. Raises ``OperationNotFound``."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise OperationNotFound(operation_id) from None

    async def finished(self, operation: Operation, wait: float) -> bool:
        """Wait up to ``wait`` seconds for an operation to end."""
        deadline = asyncio.get_running_loop().time() + wait
        with self._events.subscribe() as changes:
            while operation.finished_at is None and (left := deadline - asyncio.get_running_loop().time()) > 0:
                try:
                    async with asyncio.timeout(left):
                        await changes.next()
                except TimeoutError:
                    break
        return operation.finished_at is not None

    def _ended(self, operation: Operation, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        operation.finished_at = datetime.now(UTC)
        self._events.publish(
            OperationFinished(
                operation_id=operation.operation_id,
                kind=operation.kind,
                succeeded=operation.status is OperationStatus.SUCCEEDED,
                model_ids=tuple(operation.parts),
            )
        )
