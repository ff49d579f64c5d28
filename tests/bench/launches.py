"""How the agent has servers run, read from their processes: the same again by hand, or by another program."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NOT_SETTINGS = {"host", "port", "alias"}
_ASK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Launch:
    """How the agent has a model's server run."""

    arguments: list[str]
    """With the program."""
    environment: dict[str, str]
    """What of it is llama-server's, the model's file as well."""

    @classmethod
    def of(cls, pid: int) -> Launch:
        """How a server that runs was started."""
        variables = dict(entry.partition("=")[::2] for entry in _words(pid, "environ"))
        return cls(_words(pid, "cmdline"), {key: value for key, value in variables.items() if key.startswith("LLAMA_")})

    def settings(self) -> dict[str, str]:
        """Its options, but for those by which it is reached; an option without a value is ``true``."""
        found: dict[str, str] = {"model": self.environment.get("LLAMA_ARG_MODEL", "")}
        name = ""
        for word in self.arguments[1:]:
            if word.startswith("--"):
                name = word.removeprefix("--")
                found[name] = "true"
            else:
                found[name] = word
        return {name: value for name, value in found.items() if name not in _NOT_SETTINGS}


@contextmanager
def by_hand(launch: Launch, port: int) -> Iterator[None]:
    """Run a server as the agent does, but for its port and for systemd; begins when it says that it is ready."""
    at = launch.arguments.index("--port") + 1
    arguments = [*launch.arguments[:at], str(port), *launch.arguments[at + 1 :]]
    environment = {**os.environ, **launch.environment}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_healthy(port):
            if process.poll() is not None:
                raise RuntimeError(f"{arguments} ended with exit status {process.returncode}")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


def is_healthy(port: int) -> bool:
    """Whether a llama-server at a port of loopback says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", None, _ASK_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _words(pid: int, name: str) -> list[str]:
    return [word.decode() for word in Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") if word]
