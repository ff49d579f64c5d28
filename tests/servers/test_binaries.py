"""The binaries: each asked once what it can do, in a unit with the servers' sandbox; a new one is seen, and asked."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from magi_agent.errors import ProbeFailed, SettingsNotUsable, StartFailed
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers import launcher as launcher_module
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.launcher import DirectLauncher, Launcher, probe_of
from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import Scope, ServerState
from tests.conftest import MakeToyModel
from tests.servers.conftest import MakeAgent
from tests.servers.serving_agent import PATIENCE_OF_TESTS, ServingAgent
from tests.servers.system import HELP, SCRIPT_MODE, complete, properties, script, systemctl

PROBE = "magi-probe.service"


@dataclass
class Watched:
    """Launchers that take note of what they are asked, over all agents of a test."""

    asked: list[Path] = field(default_factory=list)

    def launcher(self, manager: SystemdManager, state: Path) -> Launcher:
        return _NotingLauncher(manager, state, self.asked)


class _NotingLauncher(DirectLauncher):
    def __init__(self, manager: SystemdManager, state: Path, asked: list[Path]) -> None:
        super().__init__(manager, state)
        self._asked = asked

    async def probe(self, binary: Path) -> str:
        self._asked.append(binary)
        return await super().probe(binary)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def copied(llama_server: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of the real llama-server with what it needs; the libraries are links, as they are large."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in llama_server.parent.iterdir():
            if path.name == llama_server.name:
                shutil.copy2(path, folder / path.name)
            else:
                (folder / path.name).symlink_to(path)
        return folder / llama_server.name

    return copy


async def left_behind(agent: ServingAgent) -> list[str]:
    """What a probe must not leave: its unit, and files in the state folder."""
    units = await systemctl("list-units", "--all", "--plain", "--no-legend", PROBE)
    return [*units.splitlines(), *(path.name for path in agent.state.iterdir() if path.name.startswith(".probe"))]


async def reasons(agent: ServingAgent, model_id: str) -> tuple[str, ...]:
    return (await agent.servers.server(model_id)).restart_reasons


async def until_reasons(agent: ServingAgent, model_id: str, *begin: str) -> None:
    """Wait until the reasons begin like this."""
    async with asyncio.timeout(PATIENCE_OF_TESTS):
        while True:
            said = await reasons(agent, model_id)
            if len(said) == len(begin) and all(map(str.startswith, said, begin)):
                return
            await asyncio.sleep(0.05)


async def asked_until_known(agent: ServingAgent, binary: Path) -> None:
    async with asyncio.timeout(PATIENCE_OF_TESTS):
        while True:
            if await agent.binaries.ask(binary) is not None:
                return
            await asyncio.sleep(0.05)


async def test_a_binary_is_asked_once_and_the_next_agent_remembers(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, watched: Watched, llama_server: Path
) -> None:
    toy_model(models / "srv-once.gguf")
    async with make_agent(make_launcher=watched.launcher) as agent:
        known = agent.binaries.options(llama_server)
        assert known is not None
        assert known["--ctx-size"] is not None
        await agent.ready("srv-once")
        assert await agent.binaries.ask(llama_server) is known
        assert watched.asked == [llama_server]
        assert await left_behind(agent) == []
    async with make_agent(make_launcher=watched.launcher) as agent:
        assert agent.binaries.options(llama_server) == known
        assert watched.asked == [llama_server]
        assert await reasons(agent, "srv-once") == ()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"x": 5}', "null", "[" * 100_000, "\udcff"])
async def test_what_was_remembered_and_cannot_be_read_is_asked_again(
    make_agent: MakeAgent, watched: Watched, llama_server: Path, damage: str
) -> None:
    async with make_agent(make_launcher=watched.launcher) as agent:
        kept = agent.state / "binaries.json"
        kept.write_bytes(damage.encode(errors="surrogateescape"))
    async with make_agent(make_launcher=watched.launcher) as agent:
        assert agent.binaries.options(llama_server) is not None
        assert watched.asked == [llama_server, llama_server]
        assert json.loads(kept.read_text())


async def test_those_asked_at_the_same_time_are_asked_once(
    make_agent: MakeAgent, watched: Watched, copied: Callable[[str], Path]
) -> None:
    first, second = copied("first"), copied("second")
    async with make_agent(make_launcher=watched.launcher) as agent:
        watched.asked.clear()
        answers = await asyncio.gather(*(agent.binaries.ask(binary) for binary in (first, second, first, second)))
        assert all(answers)
        assert sorted(watched.asked) == [first, second]
        assert await left_behind(agent) == []


def replaced(binary: Path) -> None:
    """Put another file in a binary's place, as a package manager does: written beside, then renamed."""
    beside = binary.with_name("llama-server.new")
    shutil.copy2(binary, beside)
    os.utime(beside)
    beside.rename(binary)


async def test_a_new_binary_is_a_reason_to_restart_and_is_asked_anew(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, watched: Watched, copied: Callable[[str], Path]
) -> None:
    toy_model(models / "srv-renewed.gguf")
    binary = copied("renewed")
    async with make_agent(make_launcher=watched.launcher, llama_server_path=str(binary)) as agent:
        before = await agent.ready("srv-renewed")
        assert before.restart_reasons == ()
        replaced(binary)
        # At once: whoever replaces a binary restarts what is due right after it.
        assert await reasons(agent, "srv-renewed") == (f"binary: {binary} is another file than the one that runs",)
        assert (await agent.servers.server("srv-renewed")).pid == before.pid, "it is left running"
        outcome = await agent.servers.restart("srv-renewed", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.server.restart_reasons == ()
        assert watched.asked == [binary, binary]
        # And once more: what counts is the file, not how often.
        replaced(binary)
        await until_reasons(agent, "srv-renewed", "binary: ")
    async with make_agent(make_launcher=watched.launcher, llama_server_path=str(binary)) as agent:
        await until_reasons(agent, "srv-renewed", "binary: ")


async def test_a_restart_of_systemds_brings_the_new_binary_too(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, copied: Callable[[str], Path]
) -> None:
    toy_model(models / "srv-crashed.gguf")
    binary = copied("crashed")
    async with make_agent(llama_server_path=str(binary)) as agent:
        server = await agent.ready("srv-crashed")
        replaced(binary)
        await until_reasons(agent, "srv-crashed", "binary: ")
        os.kill(server.pid or 0, signal.SIGKILL)
        await agent.until(lambda: agent.unit("srv-crashed").n_restarts == 1, "systemd restarts it")
        await agent.until_state("srv-crashed", ServerState.READY)
        await until_reasons(agent, "srv-crashed")
        replaced(binary)
        await until_reasons(agent, "srv-crashed", "binary: ")


@pytest.mark.parametrize("link", ["file", "folder", "outer"])
async def test_a_link_that_leads_elsewhere_now_is_a_new_binary(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    copied: Callable[[str], Path],
    tmp_path: Path,
    link: str,
) -> None:
    toy_model(models / "srv-linked.gguf")
    # The new one has lain there since long before the server was started.
    old, new = copied("old"), copied("new")
    current = tmp_path / "current"
    targets = {"file": (old, new), "folder": (old.parent, new.parent), "outer": (old.parent, new.parent)}[link]
    current.symlink_to(targets[0])
    path = current if link == "file" else current / old.name
    if link == "outer":
        (tmp_path / "outer").symlink_to("current")
        path = tmp_path / "outer" / old.name
    async with make_agent(llama_server_path=str(path)) as agent:
        server = await agent.ready("srv-linked")
        assert server.restart_reasons == ()
        (tmp_path / "next").symlink_to(targets[1])
        (tmp_path / "next").rename(current)
        await until_reasons(agent, "srv-linked", f"binary: {path} is another file")
        outcome = await agent.servers.restart("srv-linked", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.server.restart_reasons == ()


async def test_another_build_runs_the_models_that_choose_it(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, copied: Callable[[str], Path], watched: Watched
) -> None:
    for name in ("srv-tried", "srv-usual"):
        toy_model(models / f"{name}.gguf")
    canary = copied("canary")
    options = {"llama_server_alternatives": f"canary={canary}"}
    async with make_agent(make_launcher=watched.launcher, **options) as agent:
        usual = agent.settings.llama_server_path
        assert watched.asked == [usual, canary]
        await agent.ready("srv-usual")
        before = await agent.ready("srv-tried")
        await agent.choose("srv-tried", RuntimeSettings(binary="canary"))
        assert await reasons(agent, "srv-tried") == (f"binary: runs with {usual}, should be {canary}",)
        outcome = await agent.servers.restart("srv-tried", by="test", wait=PATIENCE_OF_TESTS)
        assert outcome.server.restart_reasons == ()
        assert outcome.server.pid != before.pid
        assert _program_of(outcome.server.pid) == canary
        assert agent.unit("srv-usual").argv[0] == str(usual)
        assert len(await complete(outcome.server.url or "")) == 4
        # A new build of the one is nothing to the other.
        replaced(canary)
        await until_reasons(agent, "srv-tried", f"binary: {canary} is another file")
        assert await reasons(agent, "srv-usual") == ()


def _program_of(pid: int | None) -> Path:
    return Path(f"/proc/{pid}/exe").readlink()


async def test_nothing_is_stopped_for_a_build_that_is_not_there(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-stays.gguf")
    gone = tmp_path / "gone"
    async with make_agent(llama_server_alternatives=f"gone={gone}") as agent:
        await agent.ready("srv-stays")
        before = await agent.servers.server("srv-stays")
        await agent.choose("srv-stays", RuntimeSettings(binary="gone"))

        with pytest.raises(SettingsNotUsable, match=f"there is no {gone} .*; what runs is left as it is"):
            await agent.servers.restart("srv-stays", by="test", wait=PATIENCE_OF_TESTS)

        after = await agent.servers.server("srv-stays")
        assert (after.pid, after.is_ready) == (before.pid, True)


async def test_a_build_that_does_not_know_a_setting_is_not_started_with_it(
    make_agent: MakeAgent, models: Path, toy_model: MakeToyModel, tmp_path: Path
) -> None:
    toy_model(models / "srv-old-build.gguf")
    old = script(tmp_path / "old-build", "exit 1")
    async with make_agent(llama_server_alternatives=f"old={old}") as agent:
        await agent.choose("srv-old-build", RuntimeSettings(binary="old", ctx_size=256))
        with pytest.raises(SettingsNotUsable, match="knows no --ctx-size, which ctx_size = 256 needs"):
            await agent.servers.start("srv-old-build", by="test")
        assert not agent.manager.units
        await agent.choose("srv-old-build", RuntimeSettings(ctx_size=256))
        await agent.ready("srv-old-build")


async def test_a_binary_that_is_not_there_is_not_asked_until_it_is(
    make_agent: MakeAgent,
    models: Path,
    toy_model: MakeToyModel,
    watched: Watched,
    copied: Callable[[str], Path],
    quick_retries: None,
) -> None:
    toy_model(models / "srv-arriving.gguf")
    binary = copied("arriving")
    away = binary.with_name("away")
    binary.rename(away)
    async with make_agent(make_launcher=watched.launcher, llama_server_path=str(binary)) as agent:
        assert watched.asked == []
        with pytest.raises(StartFailed, match="systemd could not execute"):
            await agent.servers.start("srv-arriving", by="test", wait=PATIENCE_OF_TESTS)
        away.rename(binary)
        server = await agent.ready("srv-arriving")
        assert server.restart_reasons == ()
        await until_reasons(agent, "srv-arriving")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["echo I am no llama-server"], "lists no options; is it a llama-server?"),
        (["echo out of order >&2", "exit 3"], "--help failed: out of order"),
        (["kill -9 $$"], "--help failed; can it be executed?"),
        (["head -c 300000 /dev/urandom"], "lists no options"),
    ],
)
async def test_a_binary_that_does_not_say_what_it_can_do_is_told_of_once_and_used_all_the_same(
    make_agent: MakeAgent,
    watched: Watched,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lines: list[str],
    says: str,
) -> None:
    program = tmp_path / "program"
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(SCRIPT_MODE)
    async with make_agent(make_launcher=watched.launcher, llama_server_path=str(program)) as agent:
        assert says in caplog.text
        assert agent.binaries.options(program) is None
        assert await agent.binaries.ask(program) is None
        assert watched.asked == [program], "it is not asked again at once"
        assert await agent.preparation.faults_of(RuntimeSettings(ctx_size=5)) == ()
        assert await left_behind(agent) == []
        script(program, "exit 0")
        await asked_until_known(agent, program)
        assert len(watched.asked) == 2, "another file is another binary"


async def test_a_binary_that_cannot_be_executed_is_told_of(
    make_agent: MakeAgent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "program"
    program.write_text("not a program")
    async with make_agent(llama_server_path=str(program)) as agent:
        assert f"{program} --help failed; can it be executed?" in caplog.text
        assert await left_behind(agent) == []


@pytest.mark.parametrize("lines", [["exec sleep 600"], ["trap '' TERM", "while :; do sleep 1; done"]])
async def test_a_binary_that_hangs_is_given_up_and_ended(
    make_agent: MakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(launcher_module, "_PROBE_TIMEOUT", 1.0)
    monkeypatch.setattr(launcher_module, "_PROBE_STOP_TIMEOUT", 0.5)
    program = tmp_path / "program"
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(SCRIPT_MODE)
    async with make_agent() as agent:
        with pytest.raises(ProbeFailed, match="--help failed"):
            await agent.launcher.probe(program)
        assert await left_behind(agent) == []
        # Nothing of it is in the way of the next.
        assert "--ctx-size" in await agent.launcher.probe(agent.settings.llama_server_path)


async def test_a_probe_has_the_sandbox_of_the_servers(make_agent: MakeAgent, tmp_path: Path) -> None:
    report = tmp_path / "report"
    lines = ["grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status", "ls /tmp", "touch /usr/x || echo read-only"]
    report.write_text("\n".join(["#!/bin/sh", *lines, "sleep 600", ""]))
    report.chmod(SCRIPT_MODE)
    async with make_agent() as agent:
        asking = asyncio.create_task(agent.launcher.probe(report))
        group = ""
        async with asyncio.timeout(PATIENCE_OF_TESTS):
            while not group:
                group = (await properties(PROBE, "ControlGroup"))["ControlGroup"]
                await asyncio.sleep(0.02)
            names = ("Slice", "NoNewPrivileges", "ProtectSystem", "PrivateTmp", "CollectMode", "Type")
            held = await properties(PROBE, *names)
        [output] = agent.state.glob(".probe-*/output")
        await agent.until(lambda: "read-only" in output.read_text(), "it has said it all")
        said = output.read_text().splitlines()
        await systemctl("stop", PROBE)
        with pytest.raises(ProbeFailed):
            await asking
        assert held == {
            "Slice": "magi-llama.slice",
            "NoNewPrivileges": "yes",
            "ProtectSystem": "strict",
            "PrivateTmp": "yes",
            "CollectMode": "inactive-or-failed",
            "Type": "oneshot",
        }
        assert {"NoNewPrivs:\t1", "Seccomp:\t2", "read-only"} <= set(said)
        assert agent.state.name not in said
        assert await left_behind(agent) == []


async def test_what_a_killed_agent_left_of_a_probe_is_cleared_away(make_agent: MakeAgent) -> None:
    async with make_agent() as agent:
        left = agent.state / ".probe-left"
        left.mkdir()
        (left / "output").write_text("half of it")
        await agent.launcher.probe(agent.settings.llama_server_path)
        assert await left_behind(agent) == []


async def test_a_probe_that_a_killed_agent_left_running_gives_way(make_agent: MakeAgent, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(SCRIPT_MODE)
    async with make_agent() as agent:
        asking = asyncio.create_task(agent.launcher.probe(program))
        async with asyncio.timeout(PATIENCE_OF_TESTS):
            while True:
                if (await properties(PROBE, "MainPID"))["MainPID"] != "0":
                    break
                await asyncio.sleep(0.02)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with make_agent() as agent:
        assert "--ctx-size" in await agent.launcher.probe(agent.settings.llama_server_path)
        assert await left_behind(agent) == []


async def test_a_binary_in_a_folder_that_systemd_cannot_show_to_it_is_told_of(
    make_agent: MakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory(prefix="magi probe ", dir="/tmp") as folder:
        program = script(Path(folder, "program"), "exit 1")
        async with make_agent(llama_server_path=str(program)) as agent:
            assert f"{program} cannot be run by systemd: " in caplog.text
            assert await left_behind(agent) == []


async def test_a_folder_that_cannot_be_written_to_is_named(make_agent: MakeAgent, tmp_path: Path) -> None:
    async with make_agent() as agent:
        (tmp_path / "file").touch()
        launcher = DirectLauncher(agent.manager, tmp_path / "file")
        with pytest.raises(ProbeFailed, match=f"nothing can be written to {tmp_path / 'file'}"):
            await launcher.probe(agent.settings.llama_server_path)


def test_whom_a_probe_runs_as() -> None:
    binary, output = Path("/opt/llama-server"), Path("/state/output")

    for user in (None, "llama"):
        unit = probe_of(binary, output, user, Scope.SYSTEM)
        assert (unit.user, unit.dynamic_user) == (user, user is None)
        own = probe_of(binary, output, user, Scope.USER)
        assert (own.user, own.dynamic_user) == (None, False)
        assert own.argv == ("/opt/llama-server", "--help")


class _CountedProber:
    """Says the same of every binary; for a thing that takes more binaries than one wants to run."""

    def __init__(self) -> None:
        self.asked: list[Path] = []

    async def probe(self, binary: Path) -> str:
        self.asked.append(binary)
        return HELP


async def test_what_a_killed_agent_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".binaries.json.x1y2.tmp").write_bytes(b"half")
    await Binaries(_CountedProber(), tmp_path / "binaries.json").load()
    assert not (tmp_path / ".binaries.json.x1y2.tmp").exists()


async def test_only_so_many_that_are_gone_are_remembered(tmp_path: Path) -> None:
    prober = _CountedProber()
    binaries = Binaries(prober, tmp_path / "state" / "binaries.json")
    await binaries.load()
    binary = tmp_path / "binary"
    for number in range(12):
        binary.write_text("x" * number)
        assert await binaries.ask(binary) is not None
    again = Binaries(prober, tmp_path / "state" / "binaries.json")
    await again.load()
    assert len(json.loads((tmp_path / "state" / "binaries.json").read_text())) == 8
    await again.look([binary])
    assert again.options(binary) is not None
    assert len(prober.asked) == 12


async def test_all_binaries_in_use_are_remembered_however_many_they_are(tmp_path: Path) -> None:
    prober = _CountedProber()
    binaries = Binaries(prober, tmp_path / "binaries.json")
    await binaries.load()
    files = [tmp_path / f"binary-{number}" for number in range(12)]
    for number, file in enumerate(files):
        file.write_text("x" * number)
    for _ in range(2):
        for file in files:
            assert await binaries.ask(file) is not None
    again = Binaries(prober, tmp_path / "binaries.json")
    await again.load()
    await again.look(files)
    files[0].write_text("another")
    assert await again.ask(files[0]) is not None
    assert all(again.options(file) is not None for file in files)
    assert prober.asked == [*files, files[0]]


class _HangingProber(_CountedProber):
    """Does not come back from one binary until it is let go; a real one would hold the machine up for a minute."""

    def __init__(self, canary: Path) -> None:
        super().__init__()
        self.canary = canary
        self.hangs = asyncio.Event()
        self.let_go = asyncio.Event()

    async def probe(self, binary: Path) -> str:
        if binary == self.canary:
            self.hangs.set()
            await self.let_go.wait()
        return await super().probe(binary)


async def test_a_binary_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    canary, known, unknown = (tmp_path / name for name in ("canary", "known", "unknown"))
    for number, file in enumerate((canary, known, unknown)):
        file.write_text("x" * number)
    prober = _HangingProber(canary)
    binaries = Binaries(prober, tmp_path / "binaries.json")
    await binaries.load()
    assert await binaries.ask(known) is not None
    async with asyncio.timeout(PATIENCE_OF_TESTS), asyncio.TaskGroup() as group:
        waiting = [group.create_task(binaries.ask(canary)) for _ in range(3)]
        await prober.hangs.wait()
        for file in (known, unknown):
            assert await asyncio.wait_for(binaries.ask(file), PATIENCE_OF_TESTS / 4) is not None
        prober.let_go.set()
    assert all(task.result() is not None for task in waiting)
    assert prober.asked == [known, unknown, canary], "whoever asks for the same one waits for the one answer"


async def test_what_cannot_be_kept_is_known_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").touch()
    (tmp_path / "binary").touch()
    binaries = Binaries(_CountedProber(), tmp_path / "state" / "binaries.json")
    await binaries.load()
    assert await binaries.ask(tmp_path / "binary") is not None
    assert binaries.options(tmp_path / "binary") is not None
    assert "cannot be written, so binaries are asked again by the next agent" in caplog.text


@pytest.mark.parametrize("links", [["a"], ["b", "a"]])
async def test_links_that_lead_nowhere_are_no_binary(tmp_path: Path, links: list[str]) -> None:
    (tmp_path / "a").symlink_to(links[0])
    (tmp_path / "b").symlink_to("a")
    binaries = Binaries(_CountedProber(), tmp_path / "binaries.json")
    assert await binaries.ask(tmp_path / "a") is None
    assert binaries.file(tmp_path / "a") is None
