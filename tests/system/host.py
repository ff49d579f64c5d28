"""A host as its operator and its users have it: commands, users, the API, the models' units."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.system.machine import Machine

SOCKET = "/run/magi-agent/api.sock"
TCP = "http://127.0.0.1:8000"
MEMBER = "alice"
"""A user who is in group magi."""
STRANGER = "bob"
"""A user who is not."""

_INSIDE = Path(__file__).with_name("inside")
_POLL_SECONDS = 0.05
_STATUS = "\nHTTP status "

Wanted = TypeVar("Wanted")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API said; ``status`` is 0 and ``body`` curl's own words where there was no answer."""

    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class Parts:
    """What is at hand on the host, by the paths there."""

    package: Path
    newer: Path
    """The same package in a higher version."""
    newer_configuration: Path
    """A higher version yet, with another agent.toml."""
    broken: Path
    """A higher version yet, whose agent ends at once."""
    llama_server: Path
    samples: Path
    """A folder with `toy.gguf`, `other.gguf` and `talker.gguf`; the last is slow and says much."""


class Background:
    """A program of `inside/` that runs on the host until it is told to stop; its lines are kept."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self._process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def until_lines(self, count: int, within: float = 20.0) -> None:
        """Wait until it has printed so many lines."""
        deadline = time.monotonic() + within
        while len(self.lines) < count:
            assert time.monotonic() < deadline, f"not within {within:g} s: {count} lines; there are {self.lines}"
            time.sleep(_POLL_SECONDS)

    def stop(self, within: float = 30.0) -> list[str]:
        """Tell it to stop, and return all its lines."""
        self._tell(within)
        assert not self._reader.is_alive(), f"did not stop within {within:g} s; its last lines: {self.lines[-3:]}"
        assert self._process.stderr is not None
        errors = self._process.stderr.read()
        assert self._process.wait(within) == 0, errors
        return self.lines

    def end(self, within: float = 30.0) -> None:
        """Have it ended, whatever has become of it."""
        self._tell(within)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None and not self._reader.is_alive():
                stream.close()

    def _tell(self, within: float) -> None:
        # What runs is a child, in a namespace, of the process that is known here: no signal would reach it.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join(within)

    def count(self, word: str) -> int:
        """How many of the lines so far begin with ``word``."""
        return sum(line.startswith(word) for line in list(self.lines))


class Host:
    """One machine under test."""

    def __init__(self, machine: Machine, parts: Parts) -> None:
        self._machine = machine
        self.parts = parts

    def run(
        self, *command: str | Path, user: str = "root", stdin: str = "", within: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as a user; fails when its exit status is another than 0, unless told otherwise."""
        words = [str(word) for word in command]
        if user != "root":
            words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--", *words]
        ran = self._machine.entered(words, stdin=stdin, within=within, check=False)
        said = f"{shlex.join(words)}: exit status {ran.returncode}\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}"
        assert not check or ran.returncode == 0, said
        return ran

    def output(self, *command: str | Path, user: str = "root", within: float = 30.0) -> str:
        """Run a command and return what it printed, without the last line's end."""
        return self.run(*command, user=user, within=within).stdout.rstrip("\n")

    def write(self, path: str | Path, text: str, mode: str = "0644") -> None:
        """Write a file as root; its folder is made."""
        self.run("install", "-D", f"--mode={mode}", "/dev/stdin", path, stdin=text)

    @contextlib.contextmanager
    def background(self, program: str, *arguments: str) -> Iterator[Background]:
        """Have a program of `inside/` run on the host meanwhile."""
        process = self._machine.start(["python3", "-c", (_INSIDE / f"{program}.py").read_text(), *arguments])
        running = Background(process)
        try:
            yield running
        finally:
            running.end()

    def reboot(self) -> None:
        self._machine.reboot()

    def apt(self, *arguments: str | Path, within: float = 120.0) -> str:
        """Run apt-get as scripts do, and return what it printed."""
        return self.output("apt-get", "--yes", "--no-install-recommends", *arguments, within=within)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        by: str = SOCKET,
        user: str = "root",
        token: str | None = None,
        headers: tuple[str, ...] = (),
        within: float = 10.0,
        inside: tuple[str, ...] = (),
    ) -> Answer:
        """Ask the API as a user, by the path of a socket or by the URL of a host.

        ``inside`` is what a command begins with that is to run in another network, say.
        """
        place = [f"http://magi{path}", "--unix-socket", by] if by.startswith("/") else [by + path]
        given = [f"Authorization: Bearer {token}"] if token else []
        given += ["Content-Type: application/json"] if body is not None else []
        ran = self.run(
            *inside, "curl", "--silent", "--show-error", "--max-time", f"{within:g}", "--request", method, *place,
            *(word for header in (*given, *headers) for word in ("--header", header)),
            *(["--data-binary", json.dumps(body)] if body is not None else []),
            "--write-out", _STATUS + "%{http_code}",
            user=user, within=within + 10, check=False,
        )  # fmt: skip
        text, _, status = ran.stdout.rpartition(_STATUS)
        if ran.returncode != 0 or status == "000":
            return Answer(0, ran.stderr.strip())
        try:
            return Answer(int(status), json.loads(text) if text else None)
        except ValueError:
            return Answer(int(status), text)

    def must(self, method: str, path: str, body: Any = None, within: float = 10.0) -> Any:
        """Ask as root over the unix socket, and fail for anything but success."""
        answer = self.ask(method, path, body, within=within)
        assert 200 <= answer.status < 300, f"{method} {path}: {answer}"
        return answer.body

    def insist(self, method: str, path: str, body: Any = None, within: float = 30.0) -> Any:
        """Ask as root over the unix socket, again while the answer is that it is too early, until it succeeds."""

        def answer() -> Answer | None:
            answered = self.ask(method, path, body, within=within)
            return answered if answered.status != 503 else None

        answered = self.until(answer, f"{method} {path} is answered otherwise than by 503", within)
        assert 200 <= answered.status < 300, f"{method} {path}: {answered}"
        return answered.body

    def until(self, condition: Callable[[], Wanted | None], what: str, within: float) -> Wanted:
        """Return what ``condition`` gives once that is true; fail after ``within`` seconds."""
        deadline = time.monotonic() + within
        while True:
            if value := condition():
                return value
            assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
            time.sleep(_POLL_SECONDS)

    def until_api_answers(self, within: float) -> None:
        """Wait until the API says that it is alive."""
        answers: list[Answer] = []

        def alive() -> bool:
            answers.append(self.ask("GET", "/health/live"))
            return answers[-1].status == 200

        try:
            self.until(alive, "the API answers", within)
        except AssertionError as error:
            error.add_note(f"the last answer: {answers[-1]}")
            raise

    def until_ready(self, model: str, within: float) -> dict[str, Any]:
        """Wait until a model's server is ready, and return what the API says of it."""

        def ready() -> dict[str, Any] | None:
            server = self.server(model)
            return server if server is not None and server["isReady"] else None

        try:
            return self.until(ready, f"{model} is ready", within)
        except AssertionError as error:
            error.add_note(f"the server: {self.server(model)}")
            raise

    def server(self, model: str) -> dict[str, Any] | None:
        """What the API says of a model's server; ``None`` where it lists none."""
        answer = self.ask("GET", "/api/models/servers")
        servers = answer.body["servers"] if answer.status == 200 else []
        return next((server for server in servers if server["modelId"] == model), None)

    def models(self) -> dict[str, Any]:
        """The models of the registry by their ids."""
        answer = self.ask("GET", "/api/models/registry")
        return answer.body["models"] if answer.status == 200 else {}

    def add_model(self, name: str, model: str, within: float = 20.0) -> None:
        """Copy a sample into the models' folder, and wait until it is listed as a model that may be used."""
        self.run("install", "-D", "--mode=0644", "-t", "/models", self.parts.samples / name)

        def listed() -> bool:
            return bool(self.models().get(model, {}).get("status") == "ok")

        self.until(listed, f"{name} is listed as {model}, ok; listed: {list(self.models())}", within)

    def answers(self, url: str) -> str:
        """Ask a model's server at its own address for a few tokens, and return them."""
        asked = self.ask("POST", "/completion", {"prompt": "a b c", "n_predict": 4}, by=url, within=30)
        assert asked.status == 200, f"{url}: {asked}"
        assert asked.body["content"], f"{url}: {asked}"
        return str(asked.body["content"])

    def property(self, unit: str, name: str) -> str:
        """One property of a unit, as ``systemctl show`` prints it."""
        return self.output("systemctl", "show", f"--property={name}", "--value", unit)

    def main_pid(self, unit: str) -> int:
        return int(self.property(unit, "MainPID"))

    def units(self, pattern: str = "magi*") -> dict[str, str]:
        """The units that the manager has loaded, by name, with their active state."""
        listed = self.output("systemctl", "list-units", "--all", "--plain", "--no-legend", pattern)
        return {line.split()[0]: line.split()[2] for line in listed.splitlines() if line.strip()}

    def journal(self, *arguments: str) -> str:
        """What journalctl prints for these arguments, messages alone."""
        return self.output("journalctl", "--output=cat", "--no-pager", *arguments)

    def print_journal(self) -> None:
        """Print the end of the journal; pytest shows it where a scenario failed."""
        with contextlib.suppress(AssertionError):
            print(self.output("journalctl", "--no-pager", "--boot", "--lines=80"))

    def now(self) -> str:
        """The time on the host, for journalctl's ``--since=``.

        Not a cursor: with one, journalctl leaves out the first line of those that it is asked for by unit.
        """
        return self.output("date", "+@%s.%6N")


def unit_of(model: str) -> str:
    """The unit that a model's server runs in."""
    return f"magi-llama-{model}.service"
