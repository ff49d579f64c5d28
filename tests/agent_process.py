"""A real agent in a process of its own, beside the private systemd manager: start it, ask it, kill it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import locations

_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
_ASK_SECONDS = 60.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the API."""

    status: int
    headers: Mapping[str, str]
    body: Any


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_ASK_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.sock.close()
            raise


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Return what ``condition`` gives once that is true; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(_POLL_SECONDS)


@dataclass
class AgentProcess:
    """One agent's settings and, while it runs, its process. Its state folder outlives the process."""

    folder: Path
    models: Path
    port_range: tuple[int, int]
    llama_server: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "api.sock"

    @property
    def log(self) -> Path:
        return self.folder / "agent.log"

    def environment(self) -> dict[str, str]:
        """The variables by which it is set up."""
        config = self.folder / "agent.toml"
        config.touch()
        return {
            **os.environ,
            "MAGI_CONFIG": str(config),
            "MODEL_SCAN_PATH": str(self.models),
            "REGISTRY_PATH": str(self.folder / "state" / "model_registry.json"),
            "PROFILES_PATH": str(self.folder / "profiles"),
            "LLAMA_SERVER_PATH": str(self.llama_server),
            "MAGI_PORT_RANGE": "{}-{}".format(*self.port_range),
            "MAGI_SOCKET": str(self.socket),
            "MAGI_TCP": "off",
            "MAGI_TOKENS_PATH": str(self.folder / "tokens"),
            "ACTIVE_PROFILE": "",
            **self.settings,
        }

    def spawn(self) -> None:
        """Start the process, and do not wait for anything."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(locations.VENV / "bin" / "magi-agent")],
                env=self.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
            )

    def start(self) -> None:
        """Start the process and return when its API answers."""
        self.spawn()
        wait_until(self.answers, "the agent answers", _START_SECONDS)

    def answers(self) -> bool:
        """Whether the API answers; fails when the process has ended."""
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended: {self.log.read_text()[-3000:]}"
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/health/live").status == 200
        return False

    def settled(self) -> bool:
        """Whether the first scan is through and each wanted server is ready."""
        health = self.ask("GET", "/health/ready").body
        return not health["scanning"] and health["status"] == "ready"

    def wait_settled(self, seconds: float = 60.0) -> None:
        """Wait until the first scan is through and each wanted server is ready."""
        wait_until(self.settled, f"the agent settles; it said: {self.log.read_text()[-3000:]}", seconds)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(_STOP_SECONDS)
        self.process = None

    def stop(self) -> int:
        """Ask the process to stop and return its exit status; 0 where none runs."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        return process.wait(_STOP_SECONDS)

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """Ask the API over the unix socket. Raises ``OSError`` and ``HTTPException`` where it does not answer."""
        connection = _UnixConnection(self.socket)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        headers = {name.lower(): value for name, value in response.getheaders()}
        if content and "json" not in headers.get("content-type", "json"):
            return Answer(response.status, headers, content.decode())
        return Answer(response.status, headers, json.loads(content) if content else None)

    def text(self, path: str) -> str:
        """What is answered that is no JSON."""
        connection = _UnixConnection(self.socket)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def must(self, method: str, path: str, body: Any = None) -> Any:
        """Ask, and fail for anything but success."""
        answer = self.ask(method, path, body)
        assert answer.status < 400, f"{method} {path}: {answer.status} {answer.body}"
        return answer.body


def units(pattern: str = "magi-llama-*.service") -> dict[str, str]:
    """The units that the manager has loaded, by name, with their active state."""
    listed = subprocess.run(
        ["systemctl", "--user", "list-units", "--all", "--plain", "--no-legend", pattern],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout  # fmt: skip
    return {line.split()[0]: line.split()[2] for line in listed.splitlines() if line.strip()}


def unit_property(unit: str, name: str) -> str:
    """One property of a unit, as ``systemctl show`` prints it."""
    return subprocess.run(
        ["systemctl", "--user", "show", f"--property={name}", "--value", unit],
        capture_output=True, text=True, timeout=30, check=True,
    ).stdout.strip()  # fmt: skip


def remove_units(pattern: str) -> None:
    """Stop and forget every unit that matches; for the end of a test."""
    for verb in ("stop", "reset-failed"):
        subprocess.run(["systemctl", "--user", verb, pattern], capture_output=True, timeout=60, check=False)


@contextlib.contextmanager
def ended(agent: AgentProcess, pattern: str) -> Iterator[AgentProcess]:
    """Have the agent's process and the units that match ended when the block is left."""
    try:
        yield agent
    finally:
        if agent.process is not None:
            agent.process.kill()
            agent.process.wait(_STOP_SECONDS)
        remove_units(pattern)
