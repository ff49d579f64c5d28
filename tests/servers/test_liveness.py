"""A server that does nothing any more is noticed and replaced; one that works is left alone, however long it takes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import locations
import pytest
from aiohttp import web

from magi_agent.servers import record
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.liveness import Rhythm, wait_until_hung
from magi_agent.vocabulary import ServerState
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.played_servers import playing
from tests.servers.system import HELP, complete, script

QUICK = Rhythm(interval=0.2, answer=0.3, again=0.1, misses=3)
BUSY = """
import http.server, os, sys, threading, time

if sys.argv[1:] == ["--help"]:
    print({help!r})
    sys.exit()

class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        threading.Thread(target=work).start()

def work():
    while True:
        {work}

host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
server = http.server.HTTPServer((host, int(port)), Once)
server.handle_request()
time.sleep(1000)
"""


def busy_once_ready(path: Path, work: str) -> Path:
    """A program that answers once, and never again; ``work`` is what it does from then on, in Python."""
    return script(path, BUSY.format(help=HELP, work=work), interpreter=str(locations.PYTHON))


async def test_one_that_stands_still_is_replaced_and_that_is_told(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy_model(models / "srv-hangs.gguf")
    monkeypatch.setattr(record, "_FIRST_COOLDOWN", 0.2)
    async with make_agent() as agent:
        agent.reconciler._watch.rhythm = QUICK
        before = await agent.ready("srv-hangs")
        assert before.pid is not None

        os.kill(before.pid, signal.SIGSTOP)

        await agent.until(lambda: "cooldown" in agent.told("srv-hangs"), "it is found out")
        after = await agent.until_state("srv-hangs", ServerState.READY)
        assert after.pid != before.pid
        assert len(await complete(after.url or "")) == 4
        agent.check_transitions()
    [said] = [each for each in caplog.records if getattr(each, "magi_result", None) == "hung"]
    assert re.search(r"srv-hangs failed: it has not answered for \d+ seconds, and did nothing", said.getMessage())
    assert "magictl logs srv-hangs --run previous" in said.getMessage()


async def test_one_that_answers_is_left_alone_whatever_it_does(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-writes.gguf")
    async with make_agent() as agent:
        agent.reconciler._watch.rhythm = QUICK
        before = await agent.ready("srv-writes")
        deadline = asyncio.get_running_loop().time() + 3
        while asyncio.get_running_loop().time() < deadline:
            await complete(before.url or "", tokens=200)
        after = await agent.servers.server("srv-writes")
        assert (after.state, after.pid) == (ServerState.READY, before.pid)


async def test_what_one_does_is_looked_at_only_where_it_does_not_answer() -> None:
    looks = 0

    async def progress() -> int:
        nonlocal looks
        looks += 1
        return 0

    answers = True

    async def health(_: web.Request) -> web.Response:
        if not answers:
            await asyncio.sleep(30)
        return web.Response()

    connections = ServerConnections()
    async with playing() as play:
        hanging = asyncio.create_task(wait_until_hung(connections, await play(health), progress, QUICK))
        await asyncio.sleep(1)
        assert (looks, hanging.done()) == (0, False)
        answers = False
        assert await asyncio.wait_for(hanging, 5) >= 3 * QUICK.answer + 2 * QUICK.again
        assert looks == QUICK.misses
    connections.close()


@pytest.mark.parametrize(("work", "hangs"), [("time.sleep(1)", True), ("sum(range(100000))", False)])
async def test_one_that_works_and_does_not_answer_is_left_alone(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path, work: str, hangs: bool
) -> None:
    toy_model(models / "srv-busy.gguf")
    program = busy_once_ready(tmp_path / "program", work)
    async with make_agent(llama_server_path=str(program)) as agent:
        agent.reconciler._watch.rhythm = QUICK
        await agent.ready("srv-busy")
        if hangs:
            await agent.until_state("srv-busy", ServerState.COOLDOWN)
        else:
            await asyncio.sleep(4)
            assert agent.told("srv-busy")[-1] == "ready"


async def test_a_new_agent_looks_after_what_it_found(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-adopted.gguf")
    async with make_agent() as agent:
        before = await agent.ready("srv-adopted")
    async with make_agent() as agent:
        agent.reconciler._watch.rhythm = QUICK
        await agent.until_state("srv-adopted", ServerState.READY)
        os.kill(before.pid or 0, signal.SIGSTOP)
        await agent.until(lambda: "cooldown" in agent.told("srv-adopted"), "it is found out")
