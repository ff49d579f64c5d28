"""Proving a server ready: an HTTP server here plays a llama-server that loads, hangs, or is somebody else's."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import locations
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import AtPort
from magi_agent.servers.readiness import Patience, Verdict, wait_until_ready
from tests.conftest import PortRanges

SHORT = Patience(stillness=0.4, longest_pause=0.05)


@dataclass(slots=True)
class Health:
    """Answers on ``/health`` as ``answer`` says, and counts how often it was asked."""

    answer: Callable[[int], Awaitable[web.StreamResponse]]
    asked: int = 0
    keys: set[str | None] = field(default_factory=set)
    server: TestServer = field(init=False)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        self.keys.add(request.headers.get("Authorization"))
        return await self.answer(self.asked)

    @property
    def reach(self) -> AtPort:
        assert self.server.port is not None
        return AtPort("127.0.0.1", self.server.port)


MakeHealth = Callable[[Callable[[int], Awaitable[web.StreamResponse]]], Awaitable[Health]]


@pytest.fixture
async def connections() -> AsyncIterator[ServerConnections]:
    connections = ServerConnections()
    yield connections
    connections.close()


@pytest.fixture
async def make_health() -> AsyncIterator[MakeHealth]:
    servers: list[TestServer] = []

    async def make(answer: Callable[[int], Awaitable[web.StreamResponse]]) -> Health:
        health = Health(answer)
        application = web.Application()
        application.router.add_get("/health", health.handle)
        health.server = TestServer(application)
        await health.server.start_server()
        servers.append(health.server)
        return health

    yield make
    for server in servers:
        await server.close()


def status(code: int) -> Callable[[int], Awaitable[web.StreamResponse]]:
    async def answer(_: int) -> web.StreamResponse:
        return web.json_response({}, status=code)

    return answer


async def ours() -> bool | None:
    return True


async def somebody_elses() -> bool | None:
    return False


async def nobody_knows() -> bool | None:
    return None


async def still() -> object:
    return "the same"


async def getting_on() -> object:
    return time.monotonic()


async def test_a_server_is_ready_when_its_health_says_so(
    connections: ServerConnections, make_health: MakeHealth
) -> None:
    async def answer(asked: int) -> web.StreamResponse:
        return web.json_response({}, status=200 if asked > 5 else 503)

    health = await make_health(answer)
    verdict = await wait_until_ready(connections, health.reach, is_its_own=ours, progress=still, patience=SHORT)

    assert verdict is Verdict.READY
    assert health.asked == 6


@pytest.mark.parametrize("code", [204, 302, 404, 500, 503])
async def test_no_other_answer_than_200_is_ready(
    connections: ServerConnections, make_health: MakeHealth, code: int
) -> None:
    health = await make_health(status(code))

    verdict = await wait_until_ready(connections, health.reach, is_its_own=ours, progress=still, patience=SHORT)

    assert verdict is Verdict.TIMEOUT
    assert health.asked > 1


async def test_a_redirect_is_not_followed(connections: ServerConnections, make_health: MakeHealth) -> None:
    elsewhere = await make_health(status(200))

    async def answer(_: int) -> web.StreamResponse:
        raise web.HTTPFound(f"{elsewhere.reach.url}/health")

    health = await make_health(answer)
    verdict = await wait_until_ready(connections, health.reach, is_its_own=ours, progress=still, patience=SHORT)

    assert verdict is Verdict.TIMEOUT
    assert elsewhere.asked == 0


async def test_nobody_listening_is_no_error_but_time_that_passes(
    connections: ServerConnections, unused_ports: PortRanges
) -> None:
    began = time.monotonic()
    verdict = await wait_until_ready(
        connections, AtPort("127.0.0.1", unused_ports()[0]), is_its_own=ours, progress=still, patience=SHORT
    )

    assert verdict is Verdict.TIMEOUT
    assert time.monotonic() - began >= SHORT.stillness


async def test_a_connection_that_is_cut_is_no_answer(connections: ServerConnections) -> None:
    async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        verdict = await wait_until_ready(
            connections, AtPort("127.0.0.1", port), is_its_own=ours, progress=still, patience=SHORT
        )

    assert verdict is Verdict.TIMEOUT


async def test_an_answer_from_a_port_of_somebody_else_is_no_proof(
    connections: ServerConnections, make_health: MakeHealth
) -> None:
    health = await make_health(status(200))
    began = time.monotonic()
    patience = Patience(stillness=30, longest_pause=0.05)

    verdict = await wait_until_ready(
        connections, health.reach, is_its_own=somebody_elses, progress=still, patience=patience
    )

    assert verdict is Verdict.STRANGER
    assert health.asked > 1
    assert time.monotonic() - began >= 0.5


async def test_a_stranger_who_leaves_in_time_is_forgotten(
    connections: ServerConnections, make_health: MakeHealth
) -> None:
    health = await make_health(status(200))

    async def soon_ours() -> bool | None:
        return health.asked > 5

    verdict = await wait_until_ready(connections, health.reach, is_its_own=soon_ours, progress=still, patience=SHORT)

    assert verdict is Verdict.READY


async def test_where_the_kernel_does_not_tell_the_answer_counts(
    connections: ServerConnections, make_health: MakeHealth
) -> None:
    health = await make_health(status(200))

    verdict = await wait_until_ready(connections, health.reach, is_its_own=nobody_knows, progress=still, patience=SHORT)

    assert verdict is Verdict.READY


async def test_progress_gives_more_time(connections: ServerConnections, make_health: MakeHealth) -> None:
    began = time.monotonic()

    async def answer(_: int) -> web.StreamResponse:
        ready = time.monotonic() - began > 3 * SHORT.stillness
        return web.json_response({}, status=200 if ready else 503)

    health = await make_health(answer)
    verdict = await wait_until_ready(connections, health.reach, is_its_own=ours, progress=getting_on, patience=SHORT)

    assert verdict is Verdict.READY


async def test_however_much_progress_there_is_at_ten_times_the_patience_it_ends(
    connections: ServerConnections, make_health: MakeHealth
) -> None:
    health = await make_health(status(503))
    began = time.monotonic()
    verdict = await wait_until_ready(
        connections, health.reach, is_its_own=ours, progress=getting_on, patience=Patience(0.1, 0.02)
    )

    assert verdict is Verdict.TIMEOUT
    assert time.monotonic() - began >= 1.0


async def test_checks_begin_far_shorter_than_the_longest_pause_and_grow_up_to_it(
    connections: ServerConnections, make_health: MakeHealth
) -> None:
    times: list[float] = []

    async def answer(_: int) -> web.StreamResponse:
        times.append(time.monotonic())
        return web.json_response({}, status=503)

    health = await make_health(answer)
    await wait_until_ready(connections, health.reach, is_its_own=ours, progress=still, patience=Patience(1.0, 10.0))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]

    assert min(pauses) < 0.1
    assert 10 < len(times) <= 100


async def test_it_can_be_called_off(connections: ServerConnections, make_health: MakeHealth) -> None:
    asked = asyncio.Event()

    async def answer(_: int) -> web.StreamResponse:
        asked.set()
        await asyncio.sleep(30)
        return web.json_response({})

    health = await make_health(answer)
    waiting = asyncio.create_task(
        wait_until_ready(connections, health.reach, is_its_own=ours, progress=still, patience=SHORT)
    )
    await asked.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_nobody_is_shown_the_key_before_it_is_known_who_answers(
    connections: ServerConnections, make_health: MakeHealth, tmp_path: Path
) -> None:
    health = await make_health(status(200))
    key = tmp_path / "key"
    key.write_text("secret")
    reach = replace(health.reach, key_file=key)

    verdict = await wait_until_ready(connections, reach, is_its_own=somebody_elses, progress=still, patience=SHORT)

    assert verdict is not Verdict.READY
    assert health.keys == {None}


WAITS = f"""
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {str(locations.CHECKOUT)!r})
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.reach import AtSocket
from magi_agent.servers.readiness import Patience, wait_until_ready
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)

async def answer():
    return None

async def main():
    connections = ServerConnections()
    reach = AtSocket(Path(sys.argv[1]))
    patience = Patience(float(sys.argv[2]), 0.05)
    print(await wait_until_ready(connections, reach, is_its_own=answer, progress=answer, patience=patience))
    connections.close()

asyncio.run(main())
"""


def test_a_closed_door_is_told_from_a_server_that_is_not_there_yet() -> None:
    # Not below tmp_path: each run of pytest that begins closes the folder above it to other users.
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o711)
        _see_both_doors(folder)


def _see_both_doors(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)

    def verdict(path: Path, stillness: float) -> str:
        command = [sys.executable, "-c", WAITS, str(path), str(stillness)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    assert verdict(closed / "x.sock", 30) == "forbidden"
    assert verdict(folder / "x.sock", 1) == "timeout"
