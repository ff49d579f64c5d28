"""Actions on several models at once, which a client may look after by their id."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from magi_agent.errors import OperationNotFound

_REMEMBERED: Final = 200


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

    @property
    def status(self) -> OperationStatus:
        """The whole's, from its parts'."""
        if self.finished_at is None:
            return OperationStatus.RUNNING
        failed = any(part.status is not OperationStatus.SUCCEEDED for part in self.parts.values())
        return OperationStatus.FAILED if failed else OperationStatus.SUCCEEDED


class Operations:
    """The operations of this agent's life; the oldest are forgotten."""

    def __init__(self) -> None:
        self._operations: OrderedDict[str, Operation] = OrderedDict()

    def add(self, operation: Operation) -> None:
        """Keep an operation for whoever asks for it."""
        self._operations[operation.operation_id] = operation
        while len(self._operations) > _REMEMBERED:
            self._operations.popitem(last=False)

    def operation(self, operation_id: str) -> Operation:
        """The operation of this id. Raises ``OperationNotFound``."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise OperationNotFound(operation_id) from None
