"""Who can reach a server, and how: real llama-servers of a real systemd, at ports, at sockets and with keys."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from magi_agent.errors import StartFailed
from magi_agent.host.unix_listeners import unix_listener
from magi_agent.launcher.client import RemoteLauncher
from magi_agent.launcher.service import LauncherService
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.launcher import DirectLauncher, service_of
from magi_agent.servers.llama_server import reach_of
from magi_agent.servers.reach import AtPort, AtSocket, Reach, short_name
from magi_agent.systemd.errors import UnitExists
from magi_agent.systemd.jobs import JobResult
from magi_agent.vocabulary import Scope, ServerAccess, ServerState
from tests.conftest import MakeToyModel, SystemdUser
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import is_free, properties, script, systemctl

SECONDS = 30.0
NOBODY = 65534

LISTENS = """
import socket, sys, time
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
time.sleep(60)
"""

ATTEMPTS = """
import json, socket, sys
def outcome(attempt):
    try:
        attempt()
        return "ok"
    except OSError as error:
        return type(error).__name__
def connect(path):
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(path)
print(json.dumps({
    path: outcome(lambda: connect(path) if path.endswith(".sock") else open(path).read()) for path in sys.argv[1:]
}))
"""
"""What another user tries: to connect to sockets, and to read files."""


def as_another_user(*paths: Path, groups: tuple[int, ...] = ()) -> list[str]:
    """What comes of another user's attempts on sockets and files."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ATTEMPTS, *map(str, paths)],
        user=NOBODY, group=NOBODY, extra_groups=groups, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return list(json.loads(done.stdout).values())


@pytest.fixture
def open_runtime_folder(systemd_user: SystemdUser) -> Iterator[Path]:
    """The manager's own folder is no hindrance to others, as /run is none in the system scope."""
    before = stat.S_IMODE(systemd_user.runtime.stat().st_mode)
    systemd_user.runtime.chmod(0o755)
    yield systemd_user.runtime
    systemd_user.runtime.chmod(before)


def journal(user: SystemdUser) -> str:
    """All that was logged, with all fields."""
    command = ["journalctl", "-D", str(user.journal), "--output=export"]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def keys(user: SystemdUser, model_id: str) -> list[Path]:
    """The key files of a model."""
    return list((user.runtime / "magi-llama-keys").glob(f"{short_name(model_id)}.*"))


def reach(agent: ServingAgent, model_id: str) -> Reach:
    unit = agent.unit(model_id)
    found = reach_of(unit.argv, unit.environment)
    assert found is not None
    return found


def key_file(agent: ServingAgent, model_id: str) -> Path:
    found = reach(agent, model_id)
    assert isinstance(found, AtPort)
    assert found.key_file is not None
    return found.key_file


async def ask(agent: ServingAgent, where: Reach, path: str = "/props", *, with_key: bool = True) -> tuple[int, Any]:
    with await agent.connections.ask(where, "GET", path, silence=SECONDS, with_key=with_key) as answer:
        return answer.status, json.loads(await answer.read(1 << 20) or b"")


async def check_answers(agent: ServingAgent, model_id: str) -> None:
    """The server answers through the agent's own connections, and it is the right one."""
    status, props = await ask(agent, reach(agent, model_id))
    assert (status, props["model_path"]) == (200, str(agent.models / f"{model_id}.gguf"))


@pytest.mark.parametrize("access", list(ServerAccess))
async def test_each_access_gets_ready_answers_is_adopted_and_is_given_up_by_choice_alone(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, access: ServerAccess
) -> None:
    toy_model(models / "srv-access.gguf")
    async with make_agent(server_access=access) as agent:
        before = await agent.ready("srv-access")
        assert before.restart_reasons == ()
        await check_answers(agent, "srv-access")
        url = reach(agent, "srv-access").url
        assert before.url == url
        assert url.startswith("unix:/" if access is ServerAccess.SOCKET else "http://127.0.0.1:")

    async with make_agent(server_access=access) as agent:
        after = await agent.until_state("srv-access", ServerState.READY)
        assert (after.pid, after.url, after.restart_reasons) == (before.pid, before.url, ())
        await check_answers(agent, "srv-access")

    for other in ServerAccess:
        if other is not access:
            async with make_agent(server_access=other) as agent:
                after = await agent.until_state("srv-access", ServerState.READY)
                reason = f"server access: runs with {access}, should be {other}"
                assert (after.pid, after.url, after.restart_reasons) == (before.pid, before.url, (reason,))
                await check_answers(agent, "srv-access")
                outcome = await agent.servers.restart("srv-access", by="test", wait=PATIENCE_OF_TESTS)
                assert (outcome.settled, outcome.server.restart_reasons) == (True, ())
                assert outcome.server.pid != before.pid
                await check_answers(agent, "srv-access")
                agent.check_transitions()
                await agent.servers.stop("srv-access", by="test", wait=PATIENCE_OF_TESTS)
            async with make_agent(server_access=access) as agent:
                before = await agent.ready("srv-access")


async def test_a_socket_is_for_the_agent_alone_and_no_port_is_open(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, open_runtime_folder: Path
) -> None:
    toy_model(models / "srv-sock.gguf")
    async with make_agent(server_access="socket") as agent:
        server = await agent.ready("srv-sock")
        where = reach(agent, "srv-sock")
        assert isinstance(where, AtSocket)
        assert where.path.parent.parent == open_runtime_folder / "magi-llama"
        assert stat.S_IMODE(where.path.parent.stat().st_mode) == 0o700
        assert as_another_user(where.path) == ["PermissionError"]
        # It keeps the port that was given to it, for the day when it listens on ports again.
        assert server.port is not None
        assert is_free(server.port)

        # As with systemd's own restart after a crash, and after a daemon-reload.
        await systemctl("daemon-reload")
        await systemctl("kill", "--signal=KILL", server.unit)
        await agent.until(lambda: agent.told("srv-sock")[-1] != "ready", "the crash is seen")
        await agent.until_state("srv-sock", ServerState.READY)
        await check_answers(agent, "srv-sock")
        assert as_another_user(where.path) == ["PermissionError"]

        await agent.servers.stop("srv-sock", by="test", wait=PATIENCE_OF_TESTS)
        assert not where.path.parent.exists()


async def test_a_key_is_asked_for_and_nobody_else_can_read_it(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, open_runtime_folder: Path, systemd_user: SystemdUser
) -> None:
    toy_model(models / "srv-key.gguf")
    async with make_agent(server_access="key") as agent:
        server = await agent.ready("srv-key")
        where, source = reach(agent, "srv-key"), key_file(agent, "srv-key")
        copy = open_runtime_folder / "credentials" / server.unit / "api-key"
        assert copy.read_text() == source.read_text()
        assert [stat.S_IMODE(path.stat().st_mode) for path in (source.parent, source)] == [0o700, 0o400]
        assert stat.S_IMODE(copy.stat().st_mode) == 0o400
        assert as_another_user(source, copy) == ["PermissionError", "PermissionError"]

        assert (await ask(agent, where, with_key=False))[0] == 401
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {'0' * 64}"}) as session:
            assert (await session.get(f"{where.url}/props")).status == 401
        await check_answers(agent, "srv-key")

        key = source.read_text().strip()
        shown = await systemctl("show", server.unit) + await systemctl("cat", server.unit)
        process = Path("/proc", str(server.pid))
        shown += (process / "environ").read_bytes().decode() + (process / "cmdline").read_bytes().decode()
        shown += journal(systemd_user)
        assert str(source) in shown
        assert key not in shown
        assert key not in repr(server)


async def test_a_key_lives_as_long_as_the_unit(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, systemd_user: SystemdUser
) -> None:
    toy_model(models / "srv-keylife.gguf")
    async with make_agent(server_access="key") as agent:
        server = await agent.ready("srv-keylife")
        first = key_file(agent, "srv-keylife")
        await systemctl("daemon-reload")
        await systemctl("kill", "--signal=KILL", server.unit)
        await agent.until(lambda: agent.told("srv-keylife")[-1] != "ready", "the crash is seen")
        await agent.until_state("srv-keylife", ServerState.READY)
        assert keys(systemd_user, "srv-keylife") == [first]
        await check_answers(agent, "srv-keylife")

        await agent.servers.restart("srv-keylife", by="test", wait=PATIENCE_OF_TESTS)
        second = key_file(agent, "srv-keylife")
        assert keys(systemd_user, "srv-keylife") == [second]
        assert second != first
        await check_answers(agent, "srv-keylife")

        await agent.servers.stop("srv-keylife", by="test", wait=PATIENCE_OF_TESTS)
        # The unit is seen to be gone a moment before the launcher is told that its job is done.
        await agent.until(lambda: keys(systemd_user, "srv-keylife") == [], "the key is gone")

        await agent.ready("srv-keylife")
        await systemctl("stop", server.unit)
        await agent.until_state("srv-keylife", ServerState.STOPPED)
        await agent.ready("srv-keylife")
        assert keys(systemd_user, "srv-keylife") == [key_file(agent, "srv-keylife")]


async def test_a_start_that_comes_twice_leaves_the_running_server_its_key(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, systemd_user: SystemdUser
) -> None:
    toy_model(models / "srv-keytwice.gguf")
    async with make_agent(server_access="key") as agent:
        server = await agent.ready("srv-keytwice")
        model = agent.registry.model("srv-keytwice")
        with pytest.raises(UnitExists):
            await agent.launcher.start(agent.preparation.launch_of(model, server.port or 0))
        assert keys(systemd_user, "srv-keytwice") == [key_file(agent, "srv-keytwice")]
        await check_answers(agent, "srv-keytwice")


async def test_a_key_that_is_lost_is_told_of(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, caplog: pytest.LogCaptureFixture
) -> None:
    toy_model(models / "srv-keyless.gguf")
    async with make_agent(server_access="key") as agent:
        await agent.ready("srv-keyless")
        lost = key_file(agent, "srv-keyless")
        lost.unlink()
    async with make_agent(server_access="key") as agent:
        await agent.until_state("srv-keyless", ServerState.READY)
        await agent.until(lambda: f"cannot be read from {lost}" in caplog.text, "it is told of")


@pytest.mark.parametrize("access", [ServerAccess.SOCKET, ServerAccess.KEY])
async def test_the_longest_id_that_there_is(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, access: ServerAccess
) -> None:
    longest = "srv-" + "x" * 176
    other = longest[:-1] + "y"
    for model_id in (longest, other):
        toy_model(models / f"{model_id}.gguf")
    async with make_agent(server_access=access) as agent:
        for model_id in (longest, other):
            await agent.ready(model_id)
        for model_id in (longest, other):
            await check_answers(agent, model_id)
        assert reach(agent, longest) != reach(agent, other)


@asynccontextmanager
async def healthy_at(path: Path) -> AsyncIterator[None]:
    """Somebody who listens at a path, and says that all is well."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    application = web.Application()
    application.router.add_get("/health", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    path.parent.mkdir(parents=True, exist_ok=True)
    await web.UnixSite(runner, str(path)).start()
    try:
        yield
    finally:
        await runner.cleanup()


class FirstComer(DirectLauncher):
    """Has a stranger listen where the server will want to, before it is started."""

    async def start(self, launch: LaunchSpecification) -> JobResult:
        self.stranger = healthy_at(Path(launch.runtime_root, self.folder_of(launch), "server.sock"))
        await self.stranger.__aenter__()
        return await super().start(launch)

    @staticmethod
    def folder_of(launch: LaunchSpecification) -> str:
        folder = service_of(launch, Scope.USER).runtime_directory
        assert folder is not None
        return folder


async def test_a_stranger_who_listens_in_a_servers_place_is_never_taken_for_it_and_named(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-upstaged-sock.gguf")
    sleeps = str(script(tmp_path / "sleeps", "exec sleep 600"))
    async with make_agent(make_launcher=FirstComer, server_access="socket", llama_server_path=sleeps) as agent:
        assert isinstance(agent.launcher, FirstComer)
        try:
            with pytest.raises(StartFailed, match=rf"server\.sock is held by \S+ \(process {os.getpid()}") as failed:
                await agent.servers.start("srv-upstaged-sock", by="test", wait=PATIENCE_OF_TESTS)
        finally:
            await agent.launcher.stranger.__aexit__(None, None, None)
        assert failed.value.details["result"] == "port-in-use"
        await agent.until(lambda: not agent.manager.units, "the unit is gone")
        assert agent.told("srv-upstaged-sock") == ["starting", "loading", "stopping", "cooldown"]


async def test_a_stranger_who_listens_first_is_gone_with_the_folder_when_systemd_tries_again(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, quick_retries: None
) -> None:
    toy_model(models / "srv-robbed-sock.gguf")
    async with make_agent(make_launcher=FirstComer, server_access="socket") as agent:
        assert isinstance(agent.launcher, FirstComer)
        server = await agent.ready("srv-robbed-sock")
        assert server.restarts > 0
        await check_answers(agent, "srv-robbed-sock")
        await agent.launcher.stranger.__aexit__(None, None, None)


async def test_a_port_that_is_taken_hinders_no_server_at_a_socket(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel
) -> None:
    toy_model(models / "srv-noport.gguf")
    async with make_agent(server_access="socket") as agent:
        model = await agent.preparation.give_port("srv-noport")
        with socket.create_server(("127.0.0.1", model.choices.port or 0)):
            await agent.ready("srv-noport")


async def test_a_server_of_another_user_is_for_its_group_and_nobody_else(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, open_runtime_folder: Path, no_units_left: None
) -> None:
    """As in the system scope: the server runs as a user whose group the agent belongs to."""
    toy_model(models / "srv-group.gguf")
    agent = make_agent(server_access="socket", llama_server_user="daemon")
    async with agent:
        launch = agent.preparation.launch_of(agent.registry.model("srv-group"), 1)
    service = service_of(launch, Scope.SYSTEM)
    [path] = [Path(argument) for argument in service.argv if argument.endswith(".sock")]
    options = {
        "User": service.user,
        "RuntimeDirectory": service.runtime_directory,
        "RuntimeDirectoryMode": f"{service.runtime_directory_mode:o}",
        "UMask": f"{service.umask:o}",
    }
    process = await asyncio.create_subprocess_exec(
        "systemd-run", "--user", "--quiet", f"--unit={service.name}",
        *(f"--property={name}={value}" for name, value in options.items()), "/usr/bin/python3", "-c", LISTENS, path,
    )  # fmt: skip
    assert await process.wait() == 0
    await agent.until(lambda: unix_listener(path) is not None, "it listens")
    group = path.stat().st_gid
    assert group == path.parent.stat().st_gid
    assert as_another_user(path) == ["PermissionError"]
    assert as_another_user(path, groups=(group,)) == ["ok"]
    assert (await properties(service.name, "RuntimeDirectoryMode"))["RuntimeDirectoryMode"] == "0750"


@pytest.mark.parametrize("access", [ServerAccess.SOCKET, ServerAccess.KEY])
async def test_the_launcher_makes_it_so_by_its_own_configuration(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    tmp_path: Path,
    systemd_user: SystemdUser,
    access: ServerAccess,
) -> None:
    toy_model(models / "srv-remote.gguf")
    path = tmp_path / "launcher.sock"
    agent = make_agent(make_launcher=lambda manager, _: RemoteLauncher(manager, path), server_access=access)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        service = LauncherService(
            listener, lambda: agent.settings, Scope.USER, {os.geteuid()}, tmp_path / "launcher", 60
        )
        serving = asyncio.create_task(service.run())
        async with agent:
            await agent.ready("srv-remote")
            await check_answers(agent, "srv-remote")
            assert (keys(systemd_user, "srv-remote") != []) is (access is ServerAccess.KEY)
            await agent.servers.stop("srv-remote", by="test", wait=PATIENCE_OF_TESTS)
            await agent.until(lambda: keys(systemd_user, "srv-remote") == [], "the key is gone")
        service.end.set()
        await serving
