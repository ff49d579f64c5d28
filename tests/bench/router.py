"""llama.cpp's own router (`llama-server` without a model): the nearest peer, in the same binary as the servers.

Its models are told to it by a file of presets, so that each has the settings that were chosen for the agent's own. That
a server need not try to fit into memory (``--fit``) nobody chose: the agent finds out, and a router is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.agent_process import wait_until
from tests.bench.ending import end
from tests.bench.launches import Launch, is_healthy

FIT_VARIABLE = "LLAMA_ARG_FIT"
_HELP_SECONDS = 30.0
_ASK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Router:
    """One that runs."""

    port: int
    pid: int

    def children(self) -> list[int]:
        """The processes of the servers that it has up."""
        return [
            int(pid) for path in Path(f"/proc/{self.pid}/task").glob("*/children") for pid in path.read_text().split()
        ]

    def unload(self, model_id: str) -> None:
        """Have a model's server ended, and return when it is."""
        self.ask("/models/unload", {"model": model_id})
        wait_until(lambda: not self.children(), f"the router has ended the server of {model_id}")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask it something that is JSON."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, _ASK_SECONDS) as answer:
            return json.load(answer)


def has_router(binary: Path) -> bool:
    """Whether a llama-server can be a router, by what it says of its options."""
    done = subprocess.run([binary, "--help"], capture_output=True, timeout=_HELP_SECONDS, check=False)
    said = done.stdout + done.stderr
    return all(option in said for option in (b"--models-preset ", b"--models-max "))


@contextmanager
def running_router(
    binary: Path, launches: Mapping[str, Launch], folder: Path, port: int, most: int, *, fits: bool = True
) -> Iterator[Router]:
    """Run one that has the models by their names, and at most so many of them up; begins when it answers.

    ``fits`` is whether its servers try to fit into memory, as they do by themselves.
    """
    preset = folder / f"router-{port}.ini"
    preset.write_text(presets({name: launch.settings() for name, launch in launches.items()}))
    environment = {name: value for launch in launches.values() for name, value in launch.environment.items()}
    environment.pop("LLAMA_ARG_MODEL", None)
    environment.pop(FIT_VARIABLE, None)
    if not fits:
        environment[FIT_VARIABLE] = "off"
    with (folder / f"router-{port}.log").open("wb") as log:
        process = subprocess.Popen(
            [binary, "--models-preset", preset, "--models-max", str(most), "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        router = Router(port, process.pid)
        try:
            wait_until(lambda: _answers(router, process), "the router answers")
            yield router
        finally:
            end(process)


def presets(models: Mapping[str, Mapping[str, str]]) -> str:
    """The file that tells a router of models and their settings."""
    sections = (
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
        for name, settings in models.items()
    )
    return "version = 1\n\n" + "\n".join(sections)


def _answers(router: Router, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the router ended with exit status {process.returncode}")
    return is_healthy(router.port)
