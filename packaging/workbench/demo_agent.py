"""The demonstration's agent: a transient unit with its state in a temporary folder, and ways to talk to it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from locations import BUILD, CHECKOUT, LLAMA_SERVER, SAMPLE_MODELS, VENV
from surroundings import environment_of_manager, inside_private_systemd

_FIRST_PORT = 8000
_REQUEST_SECONDS = 30.0
_COMMAND_SECONDS = 60.0


class DemoError(Exception):
    """Something did not go as the demonstration shows it; the text is a sentence."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("magi", timeout=timeout)
        self._path = path
        self._seconds = timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._seconds)
        self.sock.connect(str(self._path))


class DemoAgent:
    """One agent in a unit of its own. `start` it once, `stop` it always: also when the start failed."""

    unit = "magi-demo-agent.service"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "api.sock"
        self.tcp = f"127.0.0.1:{_free_port()}"
        private = inside_private_systemd()
        self.scope = "system" if os.geteuid() == 0 and not private else "user"
        self.manager = "private systemd manager" if private else f"machine's own systemd ({self.scope} manager)"
        self.shell = (BUILD / "demo" / "shell").relative_to(CHECKOUT) if private else None
        self._environment = dict(os.environ)
        if self.scope == "user" and not private:
            runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
            self._environment |= environment_of_manager(runtime)

    def start(self) -> None:
        """Start the agent and return when it says that it is ready. Raises DemoError with what went wrong."""
        units = self._systemctl("list-units", "--all", "--plain", "--no-legend", "magi-*").stdout.split("\n")
        others = [line.split()[0] for line in units if line.startswith(("magi-llama-", "magi-demo-"))]
        if others:
            raise DemoError(f"this manager runs MAGI's units already ({', '.join(others)}); stop them first")
        if self.shell is not None:
            self._write_shell(CHECKOUT / self.shell)
        (self.folder / "agent.toml").touch()
        shipped = [CHECKOUT / "etc" / "profiles"] if (CHECKOUT / "etc" / "profiles").is_dir() else []
        variables = {
            "MAGI_CONFIG": self.folder / "agent.toml",
            "MODEL_SCAN_PATH": SAMPLE_MODELS,
            "REGISTRY_PATH": self.folder / "model_registry.json",
            "PROFILES_PATH": ":".join(str(path) for path in (*shipped, self.folder / "profiles")),
            "LLAMA_SERVER_PATH": LLAMA_SERVER.resolve(),
            "MAGI_TCP": self.tcp,
            "MAGI_SOCKET": self.socket,
            "MAGI_SYSTEMD_SCOPE": self.scope,
        }
        bus = {name: self._environment[name] for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
               if self.scope == "user"}  # fmt: skip
        started = self._run(
            "systemd-run", *self._to_manager(), "--quiet", "--collect", f"--unit={self.unit}",
            "--property=Type=notify", "--property=WatchdogSec=30", "--property=TimeoutStartSec=30",
            "--property=Restart=on-failure", f"--property=WorkingDirectory={self.folder}",
            *(f"--setenv={name}={value}" for name, value in (variables | bus).items()),
            str(VENV / "bin" / "magi-agent"),
        )  # fmt: skip
        if started.returncode != 0:
            raise DemoError(f"the agent did not start: {started.stderr.strip()}")

    def stop(self) -> None:
        """Stop the models, then the agent; quietly, whatever of it runs."""
        self._systemctl("stop", self.unit)
        self._systemctl("stop", "magi-llama-*.service", "magi-llama.slice", "magi.slice")
        self._systemctl("reset-failed", "magi-llama-*.service", self.unit)
        if self.shell is not None:
            shutil.rmtree(CHECKOUT / self.shell.parent, ignore_errors=True)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the agent over its unix socket and return its answer. Raises DemoError for anything but success."""
        connection = _UnixConnection(self.socket, _REQUEST_SECONDS)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            answer: dict[str, Any] = json.load(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DemoError(f"{method} {path}: {error}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise DemoError(f"{method} {path}: {response.status} {answer.get('message')}")
        return answer

    def ask_url(self, url: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Post JSON to a server and return its answer. Raises DemoError for anything but success."""
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                answer: dict[str, Any] = json.load(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DemoError(f"POST {url}: {error}") from error
        return answer

    def run_magictl(self, *arguments: str) -> int:
        """Run `magictl` against this agent, its output going where ours goes; return its exit status."""
        command = [str(VENV / "bin" / "magictl"), "--socket", str(self.socket), *arguments]
        return subprocess.run(command, check=False, timeout=_COMMAND_SECONDS * 2).returncode

    def last_log_lines(self) -> str:
        """Return the end of the agent's log, for a person who has to find out why."""
        scope = ["--user"] if self.scope == "user" and not inside_private_systemd() else []
        return self._run("journalctl", *scope, "-t", "magi-agent", "-n", "30", "-o", "cat").stdout

    def _write_shell(self, path: Path) -> None:
        """Write the script that runs a command (or a shell) where the private manager is to be seen."""
        path.parent.mkdir(parents=True, exist_ok=True)
        variables = {name: self._environment[name] for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")}
        assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        path.write_text(f"""#!/bin/sh
# Runs a command, or a shell, where the demonstration's private systemd manager is to be seen.
[ $# -gt 0 ] || set -- "${{SHELL:-/bin/sh}}"
exec nsenter --target {self._environment["MAGI_PRIVATE_SYSTEMD_PID"]} --mount --pid --wdns="$PWD" \\
    env {assignments} MAGI_SOCKET={shlex.quote(str(self.socket))} "$@"
""")
        path.chmod(0o755)

    def _to_manager(self) -> list[str]:
        return [] if self.scope == "system" else ["--user"]

    def _systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run("systemctl", *self._to_manager(), *arguments)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )


def _free_port() -> int:
    for port in range(_FIRST_PORT, _FIRST_PORT + 80):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise DemoError(f"no free TCP port from {_FIRST_PORT} on")
