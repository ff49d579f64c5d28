"""One agent ends and the next begins while models are asked: answers are finished, and nobody is refused."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import locations
import pytest

from tests.agent_process import AgentProcess, ended, unit_property, wait_until
from tests.conftest import MakeToyModel, PortRanges, SampleModels, SystemdUser

QUICK = "hand-quick"
SLOW = "hand-slow"
UNIT = "hand-agent"
STOP_SECONDS = 4
"""That the unit gives the agent: it has to ask for more."""


@pytest.fixture
def agent(
    systemd_user: SystemdUser,
    tmp_path: Path,
    toy_model: MakeToyModel,
    unused_ports: PortRanges,
    llama_server: Path,
    sample_models: SampleModels,
) -> Iterator[AgentProcess]:
    """An agent that is not started yet, with a model that is through at once and one that takes its time."""
    toy_model(tmp_path / "models" / f"{QUICK}.gguf", name="Quick")
    shutil.copyfile(sample_models.smollm2, tmp_path / "models" / f"{SLOW}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server)
    with ended(agent, "magi-llama-hand-*"):
        try:
            yield agent
        finally:
            for unit in (f"{UNIT}.socket", f"{UNIT}.service"):
                subprocess.run(["systemctl", "--user", "stop", unit], capture_output=True, timeout=60, check=False)
                subprocess.run(["systemctl", "--user", "reset-failed", unit], capture_output=True, check=False)


def run_by_systemd(agent: AgentProcess) -> None:
    """Have systemd make the socket, and start the agent by it and again and again."""
    settings = {name: value for name, value in agent.environment().items() if name.startswith(("MAGI_", "MODEL_"))}
    for name in ("REGISTRY_PATH", "PROFILES_PATH", "LLAMA_SERVER_PATH", "ACTIVE_PROFILE"):
        settings[name] = agent.environment()[name]
    subprocess.run(
        [
            *("systemd-run", "--user", "--quiet", f"--unit={UNIT}"),
            *("--property=Type=notify", f"--property=TimeoutStopSec={STOP_SECONDS}", "--property=WatchdogSec=10"),
            f"--property=StandardError=append:{agent.log}",
            f"--socket-property=ListenStream={agent.socket}",
            *(f"--setenv={name}={value}" for name, value in settings.items()),
            str(locations.VENV / "bin" / "magi-agent"),
        ],
        timeout=30,
        check=True,
    )
    wait_until(lambda: agent.ask("GET", "/health/live").status == 200, "the agent answers")


def ready(agent: AgentProcess, *models: str) -> None:
    wait_until(lambda: models[-1] in agent.must("GET", "/api/models/registry")["models"], "the models are there")
    for model in models:
        agent.must("POST", f"/api/models/servers/{model}/start?wait=60")


class Stream:
    """A completion that is streamed, read by a thread of its own."""

    def __init__(self, agent: AgentProcess, tokens: int) -> None:
        self.text = ""
        self.error: Exception | None = None
        self._body = json.dumps({
            "model": SLOW, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True,
        })  # fmt: skip
        self._socket = agent.socket
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_until(lambda: self.text.count("data:") > 3 or self.error, "the answer has begun")

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.text.endswith("data: [DONE]\n\n")

    def until_its_end(self, seconds: float) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the stream still goes on after {seconds:g} s"

    def _read(self) -> None:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(str(self._socket))
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            while piece := answer.read1():
                self.text += piece.decode()
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            connection.close()


def systemctl(verb: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["systemctl", "--user", verb, f"{UNIT}.service"])


def ask_quick(agent: AgentProcess) -> Any:
    return agent.must("POST", "/v1/completions", {"model": QUICK, "prompt": "a", "max_tokens": 2})


def test_an_answer_under_way_is_finished_and_who_comes_meanwhile_is_answered_by_the_next_agent(
    agent: AgentProcess,
) -> None:
    # A busy machine takes its time.
    agent.settings["MAGI_GATEWAY_DRAIN"] = "200"
    run_by_systemd(agent)
    ready(agent, QUICK, SLOW)
    old = unit_property(f"{UNIT}.service", "MainPID")
    server = unit_property(f"magi-llama-{SLOW}.service", "MainPID")
    stream = Stream(agent, 1500)
    began = time.monotonic()

    with systemctl("restart") as restart, ThreadPoolExecutor(8) as clients:
        wait_until(lambda: unit_property(f"{UNIT}.service", "ActiveState") == "deactivating", "the agent stops")
        waiting = [clients.submit(ask_quick, agent) for _ in range(8)]
        wait_until(
            lambda: "finishing 1 requests to models" in unit_property(f"{UNIT}.service", "StatusText"),
            "it says what it waits for",
        )
        stream.until_its_end(150)
        drained = time.monotonic() - began
        assert all(each.result(timeout=30)["model"] == QUICK for each in waiting)

    assert restart.returncode == 0
    assert stream.is_whole, stream.error or stream.text[-300:]
    assert drained > STOP_SECONDS
    assert unit_property(f"{UNIT}.service", "MainPID") != old
    assert unit_property(f"magi-llama-{SLOW}.service", "MainPID") == server


def test_short_requests_are_all_answered_over_three_restarts(agent: AgentProcess) -> None:
    run_by_systemd(agent)
    ready(agent, QUICK)
    done = threading.Event()

    def asked() -> int:
        count = 0
        while not done.is_set():
            ask_quick(agent)
            count += 1
        return count

    with ThreadPoolExecutor(4) as clients:
        counts = [clients.submit(asked) for _ in range(4)]
        try:
            for _ in range(3):
                with systemctl("restart") as restart:
                    assert restart.wait(30) == 0
                time.sleep(0.5)
        finally:
            done.set()
        assert sum(count.result(timeout=30) for count in counts) > 12


@pytest.mark.parametrize("end", ["time", "signal"])
def test_an_answer_that_takes_too_long_is_broken_off_and_not_taken_for_whole(agent: AgentProcess, end: str) -> None:
    agent.settings["MAGI_GATEWAY_DRAIN"] = "1" if end == "time" else "300"
    agent.start()
    ready(agent, SLOW)
    stream = Stream(agent, 7000)
    process = agent.process
    assert process is not None

    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    wait_until(lambda: "finishing 1 requests" in agent.log.read_text(), "it says what it waits for")
    if end == "signal":
        process.send_signal(signal.SIGTERM)

    assert process.wait(20) == 0
    assert time.monotonic() - began < 12
    stream.until_its_end(5)
    assert not stream.is_whole
    assert "1 requests to models are broken off" in agent.log.read_text()
    assert unit_property(f"magi-llama-{SLOW}.service", "ActiveState") == "active"


def test_who_waits_for_a_model_when_the_agent_ends_gets_an_answer(agent: AgentProcess) -> None:
    agent.start()
    wait_until(lambda: SLOW in agent.must("GET", "/api/models/registry")["models"], "the model is there")
    agent.must("PUT", f"/api/models/{SLOW}/settings", {"startPolicy": "onDemand"})
    agent.must("PUT", f"/api/models/{SLOW}/enabled", {"enabled": True})
    process = agent.process
    assert process is not None

    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(agent.must, "POST", "/v1/completions", {"model": SLOW, "prompt": "a", "max_tokens": 4})
        wait_until(lambda: agent.ask("GET", f"/api/models/{SLOW}").body["server"]["isRunning"], "it comes up")
        process.send_signal(signal.SIGTERM)

        assert waiting.result(timeout=60)["model"] == SLOW
    assert process.wait(20) == 0
