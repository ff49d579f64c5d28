"""Actions on several models."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from magi_agent.errors import OperationNotFound
from magi_agent.events import EventStream
from magi_agent.servers.operations import Operation, Operations, OperationStatus


def test_the_whole_is_told_from_its_parts() -> None:
    operation = Operation.on("start-all", "ab")
    assert operation.status is OperationStatus.RUNNING
    operation.parts["a"].status = operation.parts["b"].status = OperationStatus.SUCCEEDED
    assert str(operation.status) == "running"
    operation.finished_at = datetime.now(UTC)
    assert str(operation.status) == "succeeded"
    for worse in (OperationStatus.FAILED, OperationStatus.RUNNING, OperationStatus.PENDING):
        operation.parts["b"].status = worse
        assert str(operation.status) == "failed"


def test_an_operation_on_nothing_succeeds() -> None:
    assert Operation("stop-all", {}, finished_at=datetime.now(UTC)).status is OperationStatus.SUCCEEDED


async def nothing() -> None:
    """What an operation without parts does."""


async def test_operations_are_found_by_their_ids_and_the_oldest_are_forgotten() -> None:
    operations = Operations(EventStream())
    added = [operations.begin(Operation.on("start-all", ()), nothing()) for _ in range(1000)]

    assert len({operation.operation_id for operation in added}) == 1000
    assert operations.operation(added[-1].operation_id) is added[-1]
    assert operations.operation(added[-200].operation_id) is added[-200]
    with pytest.raises(OperationNotFound) as refused:
        operations.operation(added[-201].operation_id)
    assert refused.value.details == {"operationId": added[-201].operation_id}
