"""An agent that is stopped while models answer: the answers go on to their end, and who comes meanwhile waits."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import locations
import pytest

from magi_agent.systemd.manager import SystemdManager
from tests.agent_process import AgentProcess, remove_units, unit_property, wait_until
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel, PortRanges, SampleModels, SystemdUser

UNIT = "magi-handover"
SERVICE = f"{UNIT}.service"
TALKER, QUICK = "handover-talker", "handover-quick"
STOP_SECONDS = 4
"""``TimeoutStopSec=`` of the service: shorter than what is waited for."""
DONE = b"data: [DONE]"
SHORT = {"prompt": "a", "max_tokens": 2, "temperature": 0}

pytestmark = pytest.mark.timeout(240)


class Handed(AgentProcess):
    """An agent that systemd starts, with a socket that systemd made."""

    @property
    def journal(self) -> str:
        return os.environ["MAGI_JOURNAL_DIRECTORY"]

    @property
    def socket(self) -> Path:
        return self.folder / "systemd.sock"

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["systemctl", "--user", *words], check=False, capture_output=True, timeout=120)

    def restart(self) -> None:
        """Have it restarted, and do not wait for that."""
        self.systemctl("restart", "--no-block", SERVICE)

    def pid(self) -> int:
        return int(unit_property(SERVICE, "MainPID"))

    def run(self, **settings: str) -> None:
        """Start it; its models are ready then."""
        self.settings = {"MAGI_TCP": "off", **settings}
        given = self.environment() | {"MAGI_SOCKET": str(self.folder / "own.sock")}
        kept = [name for name in given if name.startswith(("MAGI_", "XDG_", "DBUS_"))]
        kept += ["MODEL_SCAN_PATH", "REGISTRY_PATH", "PROFILES_PATH", "LLAMA_SERVER_PATH", "ACTIVE_PROFILE", "PATH"]
        subprocess.run(
            ["systemd-run", "--user", "--quiet", f"--unit={UNIT}", "--property=Type=notify", "--property=WatchdogSec=5",
             f"--property=TimeoutStopSec={STOP_SECONDS}", f"--socket-property=ListenStream={self.socket}",
             *(f"--setenv={name}={given[name]}" for name in kept),
             str(locations.VENV / "bin" / "magi-agent")],
            check=True, timeout=30,
        )  # fmt: skip
        wait_until(
            lambda: {TALKER, QUICK} <= self.must("GET", "/api/models/registry")["models"].keys(), "all are found"
        )

    def have_ready(self, model_id: str) -> None:
        self.must("POST", f"/api/models/servers/{model_id}/start?wait=60")
        assert self.must("GET", f"/api/models/{model_id}")["server"]["state"] == "ready"

    def ended(self) -> str:
        """How the last run of the service ended."""
        return unit_property(SERVICE, "Result")


@dataclass
class Talk:
    """One streamed answer, read by a thread of its own."""

    said: bytes = b""
    broke: BaseException | None = None
    status: int = 0
    over: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class Unix(http.client.HTTPConnection):
    """A connection to a unix socket, which is kept open between requests."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect(str(self._path))

    def asked(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any, http.client.HTTPResponse]:
        headers = {"Content-Type": "application/json"} if body else {}
        self.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        response = self.getresponse()
        return response.status, json.loads(response.read()), response


@contextlib.contextmanager
def talking(agent: Handed, tokens: int, model_id: str = TALKER) -> Iterator[Talk]:
    """Have a long answer streamed; the block is entered once it has begun."""
    talk = Talk()
    connection = Unix(agent.socket)

    def listen() -> None:
        body = {"model": model_id, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            talk.status = response.status
            while piece := response.read1(65536):
                talk.said += piece
        except (OSError, http.client.HTTPException) as error:
            talk.broke = error
        talk.over = True

    thread = Thread(target=listen, daemon=True)
    thread.start()
    wait_until(lambda: talk.said or talk.over, "the answer has begun", 60)
    try:
        yield talk
    finally:
        if not talk.over and connection.sock is not None:
            # The thread reads from it still.
            connection.sock.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        connection.close()


@pytest.fixture
def agent(
    systemd_user: SystemdUser,
    tmp_path: Path,
    toy_model: MakeToyModel,
    sample_models: SampleModels,
    unused_ports: PortRanges,
    llama_server: Path,
) -> Iterator[Handed]:
    """An agent that is not started yet, with a model that takes its time and one that does not."""
    models = tmp_path / "models"
    models.mkdir()
    shutil.copyfile(sample_models.smollm2, models / f"{TALKER}.gguf")
    toy_model(models / f"{QUICK}.gguf")
    agent = Handed(tmp_path, models, unused_ports(4), llama_server)
    yield agent
    for verb in ("stop", "reset-failed"):
        agent.systemctl(verb, f"{UNIT}.socket", SERVICE)
    remove_units("magi-llama-handover-*")


def test_an_answer_arrives_whole_and_who_comes_meanwhile_is_answered_by_the_next_agent(agent: Handed) -> None:
    agent.run()
    agent.have_ready(TALKER)
    agent.have_ready(QUICK)
    servers = {name: unit_property(f"magi-llama-{name}.service", "MainPID") for name in (TALKER, QUICK)}
    first = agent.pid()
    idle = Unix(agent.socket)
    assert idle.asked("/v1/completions", {**SHORT, "model": QUICK})[0] == 200

    with talking(agent, 1200) as talk, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        agent.restart()
        wait_until(lambda: unit_property(SERVICE, "ActiveState") == "deactivating", "it stops")
        told = wait_until(
            lambda: (text := unit_property(SERVICE, "StatusText")).startswith("finishing ") and text, "it says so"
        )
        assert told.startswith("finishing 1 request, at most ")
        assert idle.sock.recv(1) == b"", "an idle connection is closed"
        idle.close()
        asked = [pool.submit(agent.ask, "POST", "/v1/completions", {**SHORT, "model": QUICK}) for _ in range(4)]
        asked += [pool.submit(agent.ask, "GET", "/health/live") for _ in range(4)]
        wait_until(lambda: talk.over or time.monotonic() - began > STOP_SECONDS + 3, "longer than TimeoutStopSec=", 30)
        if not talk.over:
            assert agent.pid() == first
            assert not any(each.done() for each in asked)
        wait_until(lambda: talk.over, "the answer ends", 60)
        took = time.monotonic() - began

        assert [each.result().status for each in asked] == [200] * 8

    assert (talk.status, talk.broke) == (200, None)
    assert talk.said.rstrip().endswith(DONE)
    assert talk.said.count(b"data: ") >= 1200
    assert took > STOP_SECONDS, "the answer was too quick to show anything"
    assert agent.pid() != first
    assert agent.ended() == "success"
    assert {name: unit_property(f"magi-llama-{name}.service", "MainPID") for name in servers} == servers


def outcomes_since(agent: Handed, moment: float) -> list[str]:
    """What the journal says became of the requests to the model that takes its time."""
    since = [f"--directory={agent.journal}", f"--since=@{moment:.3f}", "--output=json", f"MAGI_MODEL={TALKER}"]
    lines = subprocess.run(["journalctl", *since], check=True, capture_output=True, timeout=30).stdout.splitlines()
    return [said["MAGI_OUTCOME"] for said in map(json.loads, lines) if "MAGI_OUTCOME" in said]


def test_what_does_not_end_in_time_is_cut_off_and_looks_so(agent: Handed) -> None:
    agent.run(MAGI_GATEWAY_DRAIN="6")
    agent.have_ready(TALKER)
    server = unit_property(f"magi-llama-{TALKER}.service", "MainPID")
    since = time.time()

    with talking(agent, 6000) as talk, ThreadPoolExecutor(1) as pool:
        body = {**SHORT, "model": TALKER, "max_tokens": 6000, "ignore_eos": True}
        plain = pool.submit(agent.ask, "POST", "/v1/completions", body)
        began = time.monotonic()
        agent.restart()
        wait_until(lambda: talk.over, "it is cut off", 30)
        assert 5.5 < time.monotonic() - began < 12
        assert isinstance(plain.exception(), http.client.RemoteDisconnected)
        assert agent.ask("GET", "/health/live").status == 200

    assert DONE not in talk.said
    assert isinstance(talk.broke, (OSError, http.client.IncompleteRead)), "nobody takes it for whole"
    assert agent.ended() == "success"
    assert unit_property(f"magi-llama-{TALKER}.service", "MainPID") == server
    wait_until(lambda: outcomes_since(agent, since) == ["cut_off", "cut_off"], "the journal says so")


def test_another_signal_ends_it_at_once(agent: Handed) -> None:
    agent.run()
    agent.have_ready(TALKER)
    since = time.time()
    pid = agent.pid()
    events = Unix(agent.socket)
    events.request("GET", "/api/events", headers={"Accept": "text/event-stream"})
    told = events.getresponse()
    assert told.readline()

    with talking(agent, 6000) as talk:
        agent.systemctl("stop", "--no-block", SERVICE)
        wait_until(lambda: unit_property(SERVICE, "StatusText").startswith("finishing "), "it waits")
        while told.readline():
            pass  # what has no end of its own ends now
        events.close()
        assert not talk.over
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: talk.over, "the answer is cut off", 10)
        wait_until(lambda: agent.pid() != pid, "it has ended", 10)
        assert time.monotonic() - began < 4

    assert talk.broke is not None
    wait_until(lambda: outcomes_since(agent, since) == ["cut_off"], "the journal says so")


def test_requests_that_wait_for_their_model_have_it_started_and_are_answered(agent: Handed) -> None:
    agent.run()
    agent.must("PUT", f"/api/models/{TALKER}/settings", {"startPolicy": "onDemand"})
    agent.must("PUT", f"/api/models/{TALKER}/enabled", {"enabled": True})
    pid = agent.pid()

    with talking(agent, 20) as talk, ThreadPoolExecutor(1) as pool:
        plain = pool.submit(agent.ask, "POST", "/v1/completions", {**SHORT, "model": TALKER})
        wait_until(lambda: agent.must("GET", f"/api/models/{TALKER}")["server"]["state"] != "ready", "it comes up")
        agent.restart()

        assert plain.result().status == 200
        wait_until(lambda: talk.over, "the answer ends", 60)

    assert talk.said.startswith(b": "), "it was not ready as it was asked"
    assert talk.said.rstrip().endswith(DONE)
    wait_until(lambda: agent.pid() not in (0, pid), "the next one is there")


def test_who_waits_for_a_model_as_time_is_up_is_told_to_ask_again(agent: Handed, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\n[ $# -gt 2 ] || exit 0\nexec sleep 600\n")
    silent.chmod(0o755)
    agent.run(MAGI_GATEWAY_DRAIN="5", LLAMA_SERVER_PATH=str(silent))
    agent.must("PUT", f"/api/models/{QUICK}/settings", {"startPolicy": "onDemand"})
    agent.must("PUT", f"/api/models/{QUICK}/enabled", {"enabled": True})

    with talking(agent, 20, QUICK) as talk, ThreadPoolExecutor(1) as pool:
        plain = pool.submit(agent.ask, "POST", "/v1/completions", {**SHORT, "model": QUICK})
        time.sleep(0.5)
        agent.restart()
        answer = plain.result()
        wait_until(lambda: talk.over, "the stream ends", 20)

    assert answer.status == 503
    assert "retry-after" in answer.headers
    assert answer.body["error"]["message"] == "the agent is stopping; ask again"
    assert talk.broke is None
    assert b"the agent is stopping; ask again" in talk.said
    assert DONE not in talk.said


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_while_the_host_goes_down_nobody_is_waited_for_longer_than_for_others(
    serve: Serve, models: Path, sample_models: SampleModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(sample_models.smollm2, models / f"{TALKER}.gguf")
    api = await serve()
    (await api.ask("POST", f"/api/models/servers/{TALKER}/start?wait=60")).success()

    async def goes_down(_: SystemdManager) -> bool:
        return True

    # The manager that all tests share cannot go down for one.
    monkeypatch.setattr(SystemdManager, "is_stopping", goes_down)
    body = {"model": TALKER, "prompt": "Once", "max_tokens": 6000, "ignore_eos": True, "stream": True}
    async with api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        assert await answer.content.readany()
        began = time.monotonic()

        await api.agent._last_answers.wait()

        assert 4.5 < time.monotonic() - began < 8
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.content.read()


@pytest.mark.parametrize("kept_open", [False, True], ids=["new connections", "kept open"])
def test_no_request_fails_across_restarts(agent: Handed, kept_open: bool) -> None:
    agent.run()
    agent.have_ready(QUICK)
    pids = [agent.pid()]
    connection = Unix(agent.socket)
    closed = 0

    def ask() -> int:
        nonlocal connection, closed
        if not kept_open:
            connection.close()
            connection = Unix(agent.socket)
        try:
            return connection.asked("/v1/completions", {**SHORT, "model": QUICK})[0]
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # One that was idle may have been closed: who keeps connections asks again on another one.
            assert kept_open
            closed += 1
            connection.close()
            connection = Unix(agent.socket)
            return connection.asked("/v1/completions", {**SHORT, "model": QUICK})[0]

    def is_another() -> bool:
        return agent.pid() not in (0, pids[-1])

    for number in range(50):
        if number in (10, 25, 40):
            agent.restart()
        assert ask() == 200
        if number in (20, 35, 49):
            wait_until(is_another, "the next agent is there")
            pids.append(agent.pid())

    assert len(set(pids)) == 4
    assert closed <= 3
    connection.close()


def test_a_request_on_a_connection_that_is_closing_is_answered_and_the_last_one(agent: Handed) -> None:
    agent.run()
    agent.have_ready(TALKER)
    agent.have_ready(QUICK)
    kept = Unix(agent.socket)
    assert kept.asked("/health/live")[2].getheader("Connection") is None
    body = json.dumps({**SHORT, "model": QUICK}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    # It is half there as the agent is told to stop.
    kept.sock.sendall(head.encode())

    with talking(agent, 300) as talk:
        agent.restart()
        wait_until(lambda: unit_property(SERVICE, "StatusText").startswith("finishing "), "it waits")
        kept.sock.sendall(b"\r\n" + body)
        response = http.client.HTTPResponse(kept.sock, method="POST")
        response.begin()
        assert response.status == 200
        assert response.getheader("Connection") == "close"
        assert json.loads(response.read())["choices"]
        assert kept.sock.recv(1) == b""
        response.close()
        kept.close()
        wait_until(lambda: talk.over, "the answer ends", 60)
    assert talk.said.rstrip().endswith(DONE)
