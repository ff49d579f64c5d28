"""Asking servers what they say of themselves: once for all who want to know, and not too often."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from magi_agent.servers import self_reports as module
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.self_reports import ReadyServer, SelfReports
from tests.servers.played_servers import Serve, playing


class Asked:
    """Counts what a server is asked, and holds its answers back while told to."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.go = asyncio.Event()
        self.go.set()

    async def answer(self, request: web.Request) -> web.Response:
        self.counts[request.path] += 1
        number = self.counts[request.path]
        await self.go.wait()
        return web.Response(text=f"{request.path} {number}")


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with playing() as play:
        yield play


@pytest.fixture
async def ready() -> dict[str, ReadyServer]:
    """The servers that are ready."""
    return {}


@pytest.fixture
async def reports(ready: dict[str, ReadyServer]) -> AsyncIterator[SelfReports]:
    connections = ServerConnections()
    asking = SelfReports(connections, lambda: ready)
    yield asking
    await asking.close()
    connections.close()


@pytest.fixture
async def one(serve: Serve, ready: dict[str, ReadyServer]) -> Asked:
    """A server that is ready."""
    asked = Asked()
    ready["one"] = ReadyServer(await serve(asked.answer), "first")
    return asked


@pytest.fixture
def soon_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FRESH", 0.2)


async def told(reports: SelfReports, *, with_slots: bool = False) -> tuple[bytes | None, bytes | None]:
    report = (await reports.all(with_slots=with_slots)).servers["one"]
    return report.metrics.body, report.slots.body if report.slots else None


async def alone(reports: SelfReports) -> bytes | None:
    answer = await reports.metrics_of("one")
    assert answer is not None
    return answer.body


async def test_slots_are_asked_for_where_somebody_wants_them(reports: SelfReports, one: Asked) -> None:
    assert await told(reports) == (b"/metrics 1", None)
    assert one.counts == {"/metrics": 1}


async def test_who_wants_less_is_told_what_the_other_was(reports: SelfReports, one: Asked) -> None:
    assert await told(reports, with_slots=True) == (b"/metrics 1", b"/slots 1")
    assert (await told(reports))[0] == b"/metrics 1"
    assert one.counts == {"/metrics": 1, "/slots": 1}


async def test_slots_are_never_of_another_moment_than_the_metrics(reports: SelfReports, one: Asked) -> None:
    await told(reports)
    assert await told(reports, with_slots=True) == (b"/metrics 2", b"/slots 1")


async def test_while_slots_are_wanted_whoever_comes_first_asks_for_all(
    reports: SelfReports, one: Asked, soon_stale: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await told(reports, with_slots=True)
    await asyncio.sleep(0.25)
    assert await told(reports) == (b"/metrics 2", b"/slots 2")
    assert await told(reports, with_slots=True) == (b"/metrics 2", b"/slots 2")

    monkeypatch.setattr(module, "_SLOTS_WANTED", 0.0)
    await asyncio.sleep(0.25)
    assert await told(reports) == (b"/metrics 3", None)


async def test_many_who_want_to_know_are_one_question(reports: SelfReports, one: Asked) -> None:
    found = await asyncio.gather(
        *(reports.all(with_slots=True) for _ in range(20)), *(reports.all() for _ in range(20))
    )

    assert one.counts == {"/metrics": 1, "/slots": 1}
    assert len({each.at for each in found}) == 1


async def test_what_is_no_longer_fresh_is_asked_again(reports: SelfReports, one: Asked, soon_stale: None) -> None:
    first = await reports.all()
    assert (await reports.all()).at == first.at
    await asyncio.sleep(0.25)
    assert (await reports.all()).at > first.at
    assert one.counts == {"/metrics": 2}


async def test_one_that_has_become_ready_is_asked_and_no_other(
    serve: Serve, ready: dict[str, ReadyServer], reports: SelfReports, one: Asked
) -> None:
    await reports.all()
    other = Asked()
    ready["other"] = ReadyServer(await serve(other.answer), "first")

    assert set((await reports.all()).servers) == {"one", "other"}
    assert (one.counts["/metrics"], other.counts["/metrics"]) == (1, 1)


async def test_what_an_earlier_run_said_is_not_told_of_a_later_one(
    ready: dict[str, ReadyServer], reports: SelfReports, one: Asked
) -> None:
    await reports.all()
    ready["one"] = ReadyServer(ready["one"].reach, "second")
    assert (await told(reports))[0] == b"/metrics 2"


async def test_one_that_is_ready_no_more_is_told_of_no_more(
    ready: dict[str, ReadyServer], reports: SelfReports, one: Asked
) -> None:
    await reports.all()
    del ready["one"]
    assert (await reports.all()).servers == {}


async def test_who_leaves_does_not_take_the_answers_away_from_the_others(reports: SelfReports, one: Asked) -> None:
    one.go.clear()
    first, second = asyncio.create_task(reports.all()), asyncio.create_task(told(reports))
    await asyncio.sleep(0.05)
    first.cancel()
    one.go.set()
    assert await second == (b"/metrics 1", None)
    assert one.counts == {"/metrics": 1}


async def test_a_question_that_is_not_answered_yet_is_not_asked_again(
    reports: SelfReports, one: Asked, soon_stale: None
) -> None:
    one.go.clear()
    first = asyncio.create_task(told(reports))
    await asyncio.sleep(0.25)
    second = asyncio.create_task(told(reports))
    await asyncio.sleep(0.05)
    one.go.set()
    assert await first == await second == (b"/metrics 1", None)
    assert one.counts == {"/metrics": 1}
    await asyncio.sleep(0.25)
    assert await told(reports) == (b"/metrics 2", None)


async def test_one_that_is_wanted_by_itself_is_asked_and_no_other(
    serve: Serve, ready: dict[str, ReadyServer], reports: SelfReports, one: Asked, soon_stale: None
) -> None:
    other = Asked()
    ready["other"] = ReadyServer(await serve(other.answer), "first")

    answers = await asyncio.gather(*(reports.metrics_of("one") for _ in range(20)))

    assert {answer.body for answer in answers if answer} == {b"/metrics 1"}
    assert (one.counts, other.counts) == ({"/metrics": 1}, {})
    await asyncio.sleep(0.25)
    assert await alone(reports) == b"/metrics 2"
    assert await reports.metrics_of("nobody") is None


async def test_who_asks_for_one_all_the_time_has_it_asked_no_more_often_than_is_good_for_it(
    reports: SelfReports, one: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FRESH", 0.5)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() - began < 1.3:
        await alone(reports)
        await asyncio.sleep(0.01)
    assert 2 <= one.counts["/metrics"] <= 3


async def test_what_all_were_asked_for_is_told_of_one(reports: SelfReports, one: Asked) -> None:
    await told(reports, with_slots=True)
    assert await alone(reports) == b"/metrics 1"


async def test_what_one_said_by_itself_is_not_told_among_all_who_are_of_one_moment(
    reports: SelfReports, one: Asked
) -> None:
    assert await alone(reports) == b"/metrics 1"
    assert await told(reports) == (b"/metrics 2", None)


async def test_one_by_itself_that_is_still_asked_is_not_asked_again(
    reports: SelfReports, one: Asked, soon_stale: None
) -> None:
    one.go.clear()
    first = asyncio.create_task(alone(reports))
    await asyncio.sleep(0.25)
    second = asyncio.create_task(alone(reports))
    await asyncio.sleep(0.05)
    first.cancel()
    one.go.set()
    assert await second == b"/metrics 1"
    assert one.counts == {"/metrics": 1}


async def test_one_by_itself_of_a_later_run_is_asked_at_once(
    ready: dict[str, ReadyServer], reports: SelfReports, one: Asked
) -> None:
    await alone(reports)
    ready["one"] = ReadyServer(ready["one"].reach, "second")
    assert await alone(reports) == b"/metrics 2"
    await told(reports)
    ready["one"] = ReadyServer(ready["one"].reach, "third")
    assert await alone(reports) == b"/metrics 4"


async def test_one_that_is_silent_costs_the_others_nothing(
    serve: Serve, ready: dict[str, ReadyServer], reports: SelfReports, one: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 2.0)
    silent = Asked()
    silent.go.clear()
    ready["silent"] = ReadyServer(await serve(silent.answer), "first")

    found = (await reports.all(with_slots=True)).servers
    silent.go.set()

    assert found["one"].metrics.body == b"/metrics 1"
    assert found["silent"].slots is not None
    assert (found["silent"].metrics.is_late, found["silent"].slots.is_late) == (True, True)
    assert found["silent"].metrics.problem == "it did not answer within 2 seconds"


async def test_a_build_without_slots_tells_its_metrics(
    serve: Serve, ready: dict[str, ReadyServer], reports: SelfReports
) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/slots":
            return web.json_response({"error": {"code": 501}}, status=501)
        return web.Response(text="figures")

    ready["one"] = ReadyServer(await serve(answer), "first")
    report = (await reports.all(with_slots=True)).servers["one"]

    assert report.metrics.body == b"figures"
    assert report.slots is not None
    assert (report.slots.body, report.slots.status, report.slots.problem) == (None, 501, None)


async def test_answers_are_kept_no_longer_than_they_are_told(
    reports: SelfReports, one: Asked, soon_stale: None
) -> None:
    await reports.metrics_of("one")
    await reports.all()
    assert reports._round is not None
    assert set(reports._alone) == {"one"}
    await asyncio.sleep(0.3)
    assert reports._round is None
    assert reports._alone == {}


async def test_nothing_is_under_way_once_it_is_closed(reports: SelfReports, one: Asked) -> None:
    one.go.clear()
    asking = asyncio.create_task(reports.all())
    await asyncio.sleep(0.05)
    await reports.close()
    one.go.set()
    assert reports._tasks == set()
    with pytest.raises(asyncio.CancelledError):
        await asking
