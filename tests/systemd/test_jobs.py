"""Waiting for jobs, in whatever order systemd's words about them come."""

from __future__ import annotations

import pytest

from magi_agent.systemd.errors import BusDisconnected
from magi_agent.systemd.jobs import JobResult, Jobs

PATH = "/org/freedesktop/systemd1/job/7"
OTHER = "/org/freedesktop/systemd1/job/8"


async def test_the_end_may_come_after_the_answer_that_names_the_job() -> None:
    jobs = Jobs()
    ended = jobs.expect(PATH)

    jobs.removed(OTHER, "failed")
    assert not ended.done()
    jobs.removed(PATH, "done")

    assert await ended is JobResult.DONE


async def test_the_end_may_come_before_the_answer_that_names_the_job() -> None:
    jobs = Jobs()

    jobs.removed(PATH, "timeout")

    assert await jobs.expect(PATH) is JobResult.TIMEOUT


async def test_the_end_may_be_told_twice() -> None:
    jobs = Jobs()
    ended = jobs.expect(PATH)

    jobs.removed(PATH, "done")
    jobs.removed(PATH, "done")

    assert await ended is JobResult.DONE


async def test_who_gave_up_is_told_nothing() -> None:
    jobs = Jobs()
    ended = jobs.expect(PATH)
    ended.cancel()

    jobs.removed(PATH, "done")
    given_up = jobs.expect(OTHER)
    jobs.forget(OTHER)
    jobs.forget(OTHER)

    assert ended.cancelled()
    assert not given_up.done()
    assert not jobs._waiting


async def test_a_lost_connection_ends_the_waiting_and_the_memory() -> None:
    jobs = Jobs()
    ended = jobs.expect(PATH)
    jobs.removed(OTHER, "done")

    jobs.fail_all(lambda: BusDisconnected("gone"))

    with pytest.raises(BusDisconnected, match="gone"):
        await ended
    # Another systemd numbers its jobs anew.
    assert not jobs.expect(OTHER).done()


async def test_other_peoples_jobs_are_remembered_within_a_bound() -> None:
    jobs = Jobs()

    for number in range(10_000):
        jobs.removed(f"/org/freedesktop/systemd1/job/{number}", "done")

    assert len(jobs._ended) <= 256
    assert await jobs.expect("/org/freedesktop/systemd1/job/9999") is JobResult.DONE
