"""`magictl events` against a real agent, also one that is restarted meanwhile, and how each event is put in words."""

from __future__ import annotations

import itertools
import json
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from magi_agent.cli.event_source import EventSource, Message
from magi_agent.cli.events import line_of
from magi_agent.cli.grid import Cell
from magi_agent.vocabulary import EventType
from tests.agent_process import AgentProcess, ended, wait_until
from tests.cli.terminal import MAGICTL, on_terminal, piped, surroundings
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

ONE, TWO = "evt-one", "evt-two"
PATTERN = "magi-llama-evt-*.service"


@pytest.fixture
def agent(
    tmp_path: Path, toy_model: MakeToyModel, llama_server: Path, unused_ports: PortRanges, systemd_user: SystemdUser
) -> Iterator[AgentProcess]:
    for name in (ONE, TWO):
        toy_model(tmp_path / "models" / f"{name}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(3), llama_server)
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        yield agent


class Running:
    """`magictl` in pipes, whose lines come as they are written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.out: queue.Queue[str] = queue.Queue()
        self.err: queue.Queue[str] = queue.Queue()
        for stream, lines in ((process.stdout, self.out), (process.stderr, self.err)):
            assert stream is not None
            threading.Thread(target=self._read, args=(stream, lines), daemon=True).start()

    def _read(self, stream: IO[str], lines: queue.Queue[str]) -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))

    def line(self, *words: str, of: str = "out") -> str:
        """The next line in which all of these words are."""
        lines = self.out if of == "out" else self.err
        while True:
            line = lines.get(timeout=40)
            if all(word in line for word in words):
                return line


@contextmanager
def running(agent: AgentProcess, *words: str) -> Iterator[Running]:
    """Have `magictl events` run, from when the agent has its connection."""
    environment = surroundings(MAGI_SOCKET=str(agent.socket), TZ="UTC")
    with subprocess.Popen(
        [MAGICTL, "events", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            run = Running(process)
            # Nothing is printed before something happens, so something is made to happen until it is.
            tiers = itertools.cycle(["fast", "balanced"])
            wait_until(lambda: choose(agent, ONE, next(tiers)) and not run.out.empty(), "it listens", 40.0)
            yield run
        finally:
            process.kill()


def choose(agent: AgentProcess, model_id: str, tier: str) -> bool:
    return bool(agent.must("PUT", f"/api/models/{model_id}/tier", {"tier": tier}))


def test_what_happens_is_shown_in_words(agent: AgentProcess) -> None:
    with running(agent) as run:
        agent.must("POST", f"/api/models/servers/{TWO}/start?wait=60")
        assert run.line(TWO, "starting -> loading")
        assert run.line(TWO, "loading -> ready")
        agent.must("POST", f"/api/models/servers/{TWO}/stop?wait=60")
        assert run.line(TWO, "-> stopped")


def test_what_happens_is_shown_as_json_where_asked_for(agent: AgentProcess) -> None:
    with running(agent, "--json", "--type", "choicesChanged", ONE, TWO) as run:
        agent.must("PUT", f"/api/models/{TWO}/tier", {"tier": "powerful"})
        event = json.loads(run.line(TWO))
    assert (event["type"], event["modelId"]) == ("choicesChanged", TWO)


def test_a_restart_of_the_agent_is_lived_through_and_said(agent: AgentProcess) -> None:
    with running(agent) as run:
        assert agent.stop() == 0
        assert run.line("trying again", of="err")
        agent.start()
        assert run.line("the agent is there again", of="err")
        assert run.line("gap", "was started anew")
        agent.must("PUT", f"/api/models/{TWO}/tier", {"tier": "powerful"})
        assert run.line(TWO, "chosen")
        agent.kill()
        assert run.line("trying again", of="err")
        agent.start()
        assert run.line("gap", "was started anew")


def test_it_ends_after_as_many_events_as_asked_for(agent: AgentProcess) -> None:
    with running(agent, "-n", "2") as run:
        agent.must("PUT", f"/api/models/{TWO}/tier", {"tier": "powerful"})
        assert run.process.wait(40) == 0


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_ctrl_c_ends_it(agent: AgentProcess, number: signal.Signals) -> None:
    with running(agent) as run:
        run.process.send_signal(number)
        assert run.process.wait(40) == 0
        assert run.err.empty()


def test_on_a_terminal(agent: AgentProcess) -> None:
    environment = surroundings(MAGI_SOCKET=str(agent.socket))
    with on_terminal("events", TWO, environment=environment) as terminal:
        tiers = itertools.cycle(["fast", "balanced"])
        terminal.wait_for(lambda output: choose(agent, TWO, next(tiers)) and "chosen" in output, "an event is shown")
        terminal.type("\x03")
        assert terminal.end() == 0


def test_no_agent_and_no_such_kind(agent: AgentProcess) -> None:
    assert piped("events", environment=surroundings(MAGI_SOCKET="/nonexistent")).returncode == 3
    wrong = piped("events", "--type", "nothing", environment=surroundings(MAGI_SOCKET=str(agent.socket)))
    assert wrong.returncode == 2
    assert "serverChanged" in wrong.stderr


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            {"type": "serverChanged", "modelId": "m", "before": "ready", "after": "cooldown",
             "failure": {"result": "signal", "message": "it was ended by SIGKILL"}},
            "m  ready -> cooldown: it was ended by SIGKILL",
        ),
        (
            {"type": "serverChanged", "modelId": "m", "before": "stopped", "after": "starting", "failure": None,
             "forced": True},
            "m  stopped -> starting (by force)",
        ),
        (
            {"type": "serverProgress", "modelId": "m", "elapsedSeconds": 12.25, "memoryBytes": 1_200_000_000,
             "readBytes": 800_000_000, "modelBytes": 4_700_000_000},
            "m  not ready yet, 12.2 s, 1.2 GB in memory, 800 MB of 4.7 GB read",
        ),
        ({"type": "serverProgress", "modelId": "m", "elapsedSeconds": 1.0, "memoryBytes": None, "readBytes": None},
         "m  not ready yet, 1.0 s"),
        ({"type": "modelsChanged", "added": ["a", "b"], "changed": [], "removed": ["c"], "unlisted": 7},
         "models  new: a, b; gone: c; and 7 more"),
        ({"type": "serverTroubled", "modelId": "m", "message": "it cannot be stopped"}, "m  it cannot be stopped"),
        ({"type": "choicesChanged", "modelId": "m"}, "m  what is chosen for it has changed"),
        ({"type": "profilesChanged", "name": "day"}, "profile day  was made, replaced or deleted"),
        ({"type": "profileActivated", "name": "day", "by": "uid 0"}, "profile day  is active (by uid 0)"),
        ({"type": "configurationReloaded", "changed": [], "awaitingRestart": []},
         "configuration  was read again; nothing has changed"),
        ({"type": "configurationReloaded", "changed": ["a.b"], "awaitingRestart": ["c.d"]},
         "configuration  was read again; changed: a.b; waits for a restart of the agent: c.d"),
        ({"type": "operationFinished", "kind": "start-all", "succeeded": False}, "start-all  failed"),
        ({"type": "drainChanged", "draining": True, "by": "x"}, "drain  nothing is started any more (by x)"),
        ({"type": "drainChanged", "draining": False, "by": "x"}, "drain  servers are started again (by x)"),
        ({"type": "gap", "message": "more happened than was read"}, "gap  more happened than was read"),
        ({"type": "newKind", "a": 1}, 'newKind  {"type": "newKind", "a": 1}'),
        ({}, "event  {}"),
    ],
)  # fmt: skip
def test_an_event_in_words(event: dict[str, Any], words: str) -> None:
    cells = line_of(event)
    assert "".join(cell.text if isinstance(cell, Cell) else cell for cell in cells) == f"--:--:--  {words}"


def test_every_kind_has_words_of_its_own() -> None:
    for kind in EventType:
        cells = line_of({"type": kind.value})
        assert '{"type"' not in "".join(cell.text if isinstance(cell, Cell) else cell for cell in cells)


def test_the_form_of_server_sent_events_is_read() -> None:
    source = EventSource(None, "/", on_loss=print, on_return=print)  # type: ignore[arg-type]
    lines = [
        "retry: 2000", "", ": a comment", "id: a-1", "", "event: x", "data: 1", "data:2", "id: a-2", "", "data: 3", "",
        "event: unfinished", "data: 4",
    ]  # fmt: skip
    assert list(source._messages(lines)) == [Message("x", "1\n2"), Message("message", "3")]
    assert source._last_id == "a-2"
