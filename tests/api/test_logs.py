"""Logs over the API: what real units wrote to a real journal, in pages and as it comes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import psutil
import pytest

from magi_agent.api import log_routes
from magi_agent.api.streaming import Share
from magi_agent.systemd import journalctl
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.api.speakers import Speaker
from tests.conftest import SystemdUser

SPOKEN = "api-log-spoken"
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


@pytest.fixture
def speaker(systemd_user: SystemdUser, tmp_path: Path) -> Callable[[str], Speaker]:
    return lambda model_id: Speaker(model_id, systemd_user.journal, tmp_path)


def log_of(model_id: str, **query: object) -> str:
    words = "&".join(f"{key}={quote(str(value), safe='')}" for key, value in query.items())
    return f"/api/models/servers/{model_id}/logs?{words}"


def messages(page: Any) -> list[str]:
    return [entry["message"] for entry in page["entries"]]


def journalctls() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "journalctl"]


@dataclass
class Following:
    """A stream that is read by a client of server-sent events, or of lines of JSON."""

    answer: aiohttp.ClientResponse

    async def next(self) -> dict[str, Any]:
        """The next entry; of an event its id is among the keys, as ``id``."""
        found: dict[str, Any] = {}
        async with asyncio.timeout(30):
            while line := await self.answer.content.readline():
                text = line.decode().rstrip("\n")
                if text.startswith("{"):
                    return dict(json.loads(text))
                if text.startswith("id: "):
                    found["id"] = text.removeprefix("id: ")
                if text.startswith("data: "):
                    found |= json.loads(text.removeprefix("data: "))
                if not text and "message" in found:
                    return found
        raise AssertionError("the stream ended")

    async def messages(self, count: int) -> list[str]:
        return [str((await self.next())["message"]) for _ in range(count)]


@asynccontextmanager
async def following(
    api: Api, model_id: str, headers: dict[str, str] | None = None, **query: object
) -> AsyncIterator[Following]:
    async with api.session.get(api.base + log_of(model_id, follow="true", **query), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        yield Following(answer)


@ONE_LISTENER
async def test_a_real_servers_log_by_run_across_restarts(serve: Serve) -> None:
    api = await serve("api-log-real")
    await api.ask("POST", "/api/models/servers/api-log-real/start?wait=60")
    everything = await api.get(log_of("api-log-real"))

    assert everything["modelId"] == "api-log-real"
    assert not everything["truncated"]
    assert everything["cursor"] == everything["entries"][-1]["cursor"]
    assert any("model loaded" in message for message in messages(everything)), messages(everything)
    entry = everything["entries"][0]
    assert list(entry) == ["at", "message", "priority", "pid", "invocationId", "source", "cursor"]
    assert (entry["priority"], entry["source"]) == (6, "server")
    assert entry["pid"] == (await api.get("/api/models/servers/api-log-real"))["pid"]
    assert abs(datetime.now(UTC).timestamp() - datetime.fromisoformat(entry["at"]).timestamp()) < 120
    [first] = {entry["invocationId"] for entry in everything["entries"]}

    await api.ask("POST", "/api/models/servers/api-log-real/restart?wait=60")
    now, earlier = [await api.get(log_of("api-log-real", run=run)) for run in ("current", "previous")]
    [second] = {entry["invocationId"] for entry in now["entries"]}
    assert {entry["invocationId"] for entry in earlier["entries"]} == {first}
    assert first != second
    by_id = await api.get(log_of("api-log-real", run=first))
    assert by_id == earlier
    both = await api.get(log_of("api-log-real", run="all", lines=10_000))
    assert len(both["entries"]) == len(now["entries"]) + len(earlier["entries"])

    # What has been stopped has a last run still.
    await api.ask("POST", "/api/models/servers/api-log-real/stop?wait=60")
    assert {entry["invocationId"] for entry in (await api.get(log_of("api-log-real", run="current")))["entries"]} == {
        second
    }
    assert {entry["invocationId"] for entry in (await api.get(log_of("api-log-real", run="previous")))["entries"]} == {
        first
    }


@ONE_LISTENER
async def test_the_next_agent_reads_what_servers_of_the_last_one_wrote(serve: Serve) -> None:
    api = await serve("api-log-kept")
    await api.ask("POST", "/api/models/servers/api-log-kept/start?wait=60")
    before = await api.get(log_of("api-log-kept"))
    await api.agent.stop()

    after = await (await serve("api-log-kept")).get(log_of("api-log-kept", run="current"))

    assert messages(after)[: len(before["entries"])] == messages(before)


@ONE_LISTENER
async def test_pages_forward_and_back_lose_and_double_nothing(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve(SPOKEN)
    await speaker(SPOKEN).say("for i in {1..250}; do echo line $i; done")
    lines = [f"line {number}" for number in range(1, 251)]
    run = (await api.get(log_of(SPOKEN, lines=1)))["entries"][0]["invocationId"]

    last = await api.get(log_of(SPOKEN, run=run))
    assert len(last["entries"]) == 100
    assert last["truncated"]
    back, page = messages(last), last
    while page["truncated"]:
        page = await api.get(log_of(SPOKEN, run=run, lines=70, before=page["entries"][0]["cursor"]))
        back = messages(page) + back
    assert back[:-1] == lines

    forward, cursor, pages = messages(page)[:1], page["entries"][0]["cursor"], 0
    truncated = True
    while truncated:
        page = await api.get(log_of(SPOKEN, run=run, lines=70, cursor=cursor))
        forward += messages(page)
        cursor, truncated, pages = page["cursor"], page["truncated"], pages + 1
    assert forward[:-1] == lines
    assert pages == 4

    nothing = await api.get(log_of(SPOKEN, run=run, cursor=cursor))
    assert nothing == {"modelId": SPOKEN, "entries": [], "cursor": cursor, "truncated": False}
    exact = await api.get(log_of(SPOKEN, run=run, lines=251))
    assert not exact["truncated"]
    assert (await api.get(log_of(SPOKEN, run=run, lines=0)))["truncated"]


@ONE_LISTENER
async def test_a_cursor_of_another_unit_is_a_place_like_any_other(
    serve: Serve, speaker: Callable[[str], Speaker]
) -> None:
    """journalctl --after-cursor=, up to systemd 252, would leave out the first line that comes after it."""
    api = await serve("api-log-one", "api-log-two")
    await speaker("api-log-one").say("echo one")
    place = (await api.get(log_of("api-log-one")))["cursor"]
    await speaker("api-log-two").say("echo first; echo second")

    assert messages(await api.get(log_of("api-log-two", cursor=place)))[:2] == ["first", "second"]
    assert messages(await api.get(log_of("api-log-two", before=place))) == []


@ONE_LISTENER
async def test_by_time_and_by_priority(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-when")
    await speaker("api-log-when").say(
        "echo '<3>bad'; echo '<4>odd'; sleep 0.3; echo '<6>usual'; echo '<7>detail'; sleep 0.3; echo later; sleep 0.1"
    )
    page = await api.get(log_of("api-log-when"))
    assert messages(page)[:5] == ["bad", "odd", "usual", "detail", "later"]
    later = page["entries"][4]["at"]

    assert messages(await api.get(log_of("api-log-when", since=later)))[0] == "later"
    assert messages(await api.get(log_of("api-log-when", until=page["entries"][1]["at"]))) == ["bad", "odd"]
    assert messages(await api.get(log_of("api-log-when", since="-1h", lines=1)))[0].startswith("said ")
    assert messages(await api.get(log_of("api-log-when", until="1 h ago"))) == []
    assert messages(await api.get(log_of("api-log-when", since=later, before=page["cursor"]))) == ["later"]
    assert messages(await api.get(log_of("api-log-when", until=page["entries"][1]["at"], before=page["cursor"]))) == [
        "bad",
        "odd",
    ]
    assert (
        messages(await api.get(log_of("api-log-when", until=later, cursor=page["entries"][0]["cursor"])))[-1] == "later"
    )
    for priority in ("err", "3", "error"):
        assert messages(await api.get(log_of("api-log-when", priority=priority))) == ["bad"]
    assert messages(await api.get(log_of("api-log-when", priority="warning"))) == ["bad", "odd"]
    assert [entry["priority"] for entry in page["entries"]][:4] == [3, 4, 6, 7]


@ONE_LISTENER
async def test_what_llama_server_itself_calls_an_error_is_one(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-letters")
    await speaker("api-log-letters").say(
        "echo '0.00.003.837 I srv  one'; echo '0.00.004.321 W srv  two'; echo '100.15.004.321 E srv  three'; "
        "echo '0.00.004.322 D srv  four'; echo 'E srv  five'; echo '<4>0.00.004.322 E srv  six'; sleep 0.1"
    )

    page = await api.get(log_of("api-log-letters"))
    assert [entry["priority"] for entry in page["entries"]][:6] == [6, 4, 3, 7, 6, 4]
    errors = messages(await api.get(log_of("api-log-letters", priority="err")))
    assert errors == ["100.15.004.321 E srv  three"]
    cursor = page["entries"][0]["cursor"]
    assert messages(await api.get(log_of("api-log-letters", priority="err", cursor=cursor))) == errors
    assert len(messages(await api.get(log_of("api-log-letters", priority="warning")))) == 3


@ONE_LISTENER
async def test_bytes_that_are_no_text_and_lines_without_an_end(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-odd")
    await speaker("api-log-odd").say(
        r"printf 'bad \377 byte\n'; printf 'escape \033[31m\n'; echo 'größe 模型'; printf 'nul \0 byte\n';"
        "head -c 200000 /dev/zero | tr '\\0' x; echo"
    )

    page = await api.get(log_of("api-log-odd"))

    told = messages(page)
    assert told[:3] == ["bad � byte", "escape \x1b[31m", "größe 模型"]
    assert told[3].strip() == "nul"  # at which journald ends a line
    long = [message for message in told if "xxx" in message]
    # journald breaks what goes on for more than 48 KiB.
    assert len(long) > 1
    assert sum(map(len, long)) == 200_000
    assert told[-1].startswith("said ")


@ONE_LISTENER
async def test_an_answer_has_a_bound_and_says_that_there_is_more(
    serve: Serve, speaker: Callable[[str], Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_routes, "_MOST_BYTES", 20_000)
    api = await serve("api-log-much")
    await speaker("api-log-much").say("for i in {1..100}; do printf \"$i \"; printf 'x%.0s' {1..1000}; echo; done")

    page = await api.get(log_of("api-log-much", lines=10_000))

    assert page["truncated"]
    numbers = [int(message.split()[0]) for message in messages(page)[:-1]]
    assert 10 < len(numbers) < 20
    assert numbers == list(range(101 - len(numbers), 101))
    older = await api.get(log_of("api-log-much", lines=1, before=page["entries"][0]["cursor"]))
    assert messages(older)[0].startswith(f"{numbers[0] - 1} ")


@ONE_LISTENER
async def test_what_never_ran_has_an_empty_log(serve: Serve) -> None:
    api = await serve("api-log-never")

    for run in ("all", "current", "previous", "0" * 32):
        page = await api.get(log_of("api-log-never", run=run))
        assert page == {"modelId": "api-log-never", "entries": [], "cursor": None, "truncated": False}


async def test_bad_questions(serve: Serve) -> None:
    api = await serve("api-log-asked")
    cursor = f"s={'0' * 32};i=1;b={'0' * 32};m=1;t=1;x=1"

    assert (await api.ask("GET", log_of("no-such-model"))).failure(404, "ModelNotFound") == {"modelId": "no-such-model"}
    assert (await api.ask("GET", log_of("no-such-model", follow="true"))).failure(404, "ModelNotFound")
    for key, value in (
        ("cursor", "x"),
        ("cursor", f"{cursor};y=1"),
        ("cursor", f"{cursor}\n"),
        ("cursor", "--vacuum-size=1"),
        ("before", ""),
        ("lines", "10001"),
        ("lines", "-1"),
        ("lines", "many"),
        ("since", "whenever"),
        ("until", "--help"),
        ("priority", "8"),
        ("priority", "loud"),
        ("run", "last"),
        ("run", "0" * 31),
        ("run", "+"),
        ("follow", "perhaps"),
    ):
        details = (await api.ask("GET", log_of("api-log-asked", **{key: value}))).failure(422, "ValidationError")
        assert [error["field"] for error in details["errors"]] == [key], value
        assert "Value error" not in str(details)
    for together in (
        {"cursor": cursor, "before": cursor},
        {"since": "now", "until": "-1h"},
        {"follow": "true", "until": "now"},
        {"follow": 1, "before": cursor},
    ):
        (await api.ask("GET", log_of("api-log-asked", **together))).failure(422, "ValidationError")
    bad_id = await api.ask("GET", log_of("api-log-asked", follow="true"), headers={"Last-Event-ID": "7"})
    assert [error["field"] for error in bad_id.failure(422, "ValidationError")["errors"]] == ["Last-Event-ID"]


@ONE_LISTENER
async def test_a_run_of_another_unit_shows_nothing(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    """An invocation id alone would show the log of any service of the host."""
    api = await serve("api-log-mine", "api-log-theirs")
    run = await speaker("api-log-theirs").say("echo secret")

    assert messages(await api.get(log_of("api-log-theirs", run=run)))[0] == "secret"
    assert messages(await api.get(log_of("api-log-mine", run=run))) == []


@ONE_LISTENER
async def test_only_journalds_own_fields_count(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-true", "api-log-liar")
    await speaker("api-log-true").say("echo true words")
    # It stays until journald has looked who it is: of one that is gone by then, a user's journal has only its own word.
    claim = "systemd-cat --identifier=magi-llama-api-log-true bash -c 'echo false words; sleep 0.5'"
    await speaker("api-log-liar").say(claim)

    told = messages(await api.get(log_of("api-log-true")))
    assert "true words" in told
    assert "false words" not in told


async def test_following_goes_on_from_the_last_lines(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-live")
    await speaker("api-log-live").say("for i in {1..5}; do echo before $i; done")

    async with following(api, "api-log-live", lines=3) as stream:
        assert stream.answer.headers["Content-Type"].startswith("text/event-stream")
        entry = await stream.next()
        assert (entry["message"], entry["id"]) == ("before 4", entry["cursor"])
        assert (await stream.messages(2))[0] == "before 5"
        await speaker("api-log-live").say("for i in {1..3}; do echo meanwhile $i; done")
        assert await stream.messages(3) == [f"meanwhile {number}" for number in (1, 2, 3)]

    async with following(api, "api-log-live", {"Accept": "application/x-ndjson"}, lines=0) as stream:
        assert stream.answer.headers["Content-Type"].startswith("application/x-ndjson")
        await speaker("api-log-live").say("echo again")
        assert await stream.messages(1) == ["again"]


@ONE_LISTENER
async def test_who_comes_back_misses_nothing_and_sees_nothing_twice(
    serve: Serve, speaker: Callable[[str], Speaker]
) -> None:
    api = await serve("api-log-again")
    async with following(api, "api-log-again") as stream:
        await speaker("api-log-again").say("echo one; echo two")
        assert await stream.messages(1) == ["one"]
        seen = (await stream.next())["id"]
    await speaker("api-log-again").say("echo three")

    async with following(api, "api-log-again", {"Last-Event-ID": seen}, lines=50) as stream:
        told = await stream.messages(2)
        assert told[0].startswith("said ")
        assert told[1] == "three"
    async with following(api, "api-log-again", cursor=seen) as stream:
        assert (await stream.messages(2))[1] == "three"


@ONE_LISTENER
async def test_who_comes_back_before_anything_came_misses_nothing_either(
    serve: Serve, speaker: Callable[[str], Speaker]
) -> None:
    api = await serve("api-log-early")
    async with following(api, "api-log-early", lines=0) as stream:
        place = ""
        while not place.startswith("id: "):
            place = (await stream.answer.content.readline()).decode()
    await speaker("api-log-early").say("echo meanwhile")

    async with following(api, "api-log-early", {"Last-Event-ID": place[4:].strip()}, lines=0) as stream:
        assert await stream.messages(1) == ["meanwhile"]


@ONE_LISTENER
async def test_what_is_followed_can_be_chosen(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-some")
    first = await speaker("api-log-some").say("echo '<4>old'")
    async with (
        following(api, "api-log-some", priority="warning") as warnings,
        following(api, "api-log-some", run=first) as run,
        following(api, "api-log-some", since="-1h", lines=1) as recent,
    ):
        assert await warnings.messages(1) == ["old"]
        assert (await run.messages(2))[0] == "old"
        assert (await recent.messages(1))[0].startswith("said ")
        await speaker("api-log-some").say("echo usual; echo '<3>new'")
        assert await warnings.messages(1) == ["new"]
        assert await recent.messages(1) == ["usual"]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await run.next()


@ONE_LISTENER
async def test_nothing_is_left_of_a_client_that_left(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-left")
    await speaker("api-log-left").say("echo here")
    for _ in range(3):
        async with following(api, "api-log-left") as stream, following(api, "api-log-left", lines=0):
            await stream.next()
            await until(lambda: _is(len(journalctls()) == 2), "two are followed")

    await until(lambda: _is(journalctls() == []), "no journalctl is left")

    # A client that leaves in the middle of an answer that is not streamed.
    for _ in range(5):
        asking = asyncio.create_task(api.get(log_of("api-log-left", lines=10_000)))
        await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.wait([asking])
    await until(lambda: _is(journalctls() == []), "no journalctl is left")


@ONE_LISTENER
async def test_so_many_may_follow_and_no_more(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, speaker: Callable[[str], Speaker]
) -> None:
    monkeypatch.setattr(journalctl, "_FOLLOWING", 2)
    api = await serve("api-log-full")
    await speaker("api-log-full").say("echo here")

    async with following(api, "api-log-full") as one, following(api, "api-log-full") as two:
        await one.next()
        await two.next()
        await until(lambda: _is(len(journalctls()) == 2), "two are followed")
        full = await api.ask("GET", log_of("api-log-full", follow="true"))
        assert full.failure(503, "ServiceUnavailable") == {"service": "journal"}
        assert full.headers["Retry-After"] == "5"
        assert messages(await api.get(log_of("api-log-full")))[0] == "here"
    await until(lambda: _is(journalctls() == []), "both ended")
    async with following(api, "api-log-full") as stream:
        await stream.next()


@ONE_LISTENER
async def test_one_reader_does_not_follow_all(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, speaker: Callable[[str], Speaker]
) -> None:
    monkeypatch.setattr(log_routes, "_FOLLOWED", Share("followed logs", 1))
    api = await serve("api-log-share")
    await speaker("api-log-share").say("echo here")

    async with following(api, "api-log-share") as one:
        await one.next()
        refused = await api.ask("GET", log_of("api-log-share", follow="true"))
        assert refused.failure(429, "TooManyStreams") == {"most": 1, "of": f"uid {os.geteuid()}"}
        assert len(journalctls()) == 1
        async with api.session.get(f"{api.base}/api/events") as answer:
            assert answer.status == 200, "another kind has a share of its own"


@ONE_LISTENER
async def test_the_agent_stops_while_a_log_is_followed(serve: Serve, speaker: Callable[[str], Speaker]) -> None:
    api = await serve("api-log-stop")
    await speaker("api-log-stop").say("echo here")
    async with following(api, "api-log-stop") as stream:
        await stream.next()
        before = time.monotonic()
        await api.agent.stop()
        assert time.monotonic() - before < 4
    assert journalctls() == []


@ONE_LISTENER
async def test_a_journal_that_cannot_be_read(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-log-none", journal_directory=str(tmp_path / "none"))

    answer = await api.ask("GET", log_of("api-log-none"))

    assert answer.failure(503, "ServiceUnavailable") == {"service": "journal"}
    assert answer.body["message"].startswith("the journal cannot be read: ")
    for path in (log_of("api-log-none", follow="true"), "/api/models/api-log-none/history"):
        (await api.ask("GET", path)).failure(503, "ServiceUnavailable")
    (tmp_path / "none").mkdir()
    empty = await api.ask("GET", log_of("api-log-none"))
    assert empty.failure(503, "ServiceUnavailable") == {"service": "journal"}
    assert "there is nothing in this host's journal" in empty.body["message"]


async def _is(condition: bool) -> bool:
    return condition
