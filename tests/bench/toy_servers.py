"""An agent with many toy servers up: what benchmarks of a host that is in use begin with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from locations import LLAMA_SERVER
from toy_model import write_toy_model

from tests.agent_process import AgentProcess, ended, wait_until
from tests.bench.ports import is_free

_WAIT = 120


@contextmanager
def toy_servers(
    folder: Path, name: str, count: int, settings: dict[str, str] | None = None
) -> Iterator[tuple[AgentProcess, list[str]]]:
    """Start an agent in ``folder`` and so many servers, of models called ``name-0`` and so on; give it and their ids.

    All are ready when the block is entered, and ended when it is left. The models lie in ``folder / "models"``.
    """
    models = folder / "models"
    models.mkdir()
    toy = write_toy_model(folder / "toy.gguf")
    ids = [f"{name}-{number}" for number in range(count)]
    for model_id in ids:
        shutil.copyfile(toy, models / f"{model_id}.gguf")
    agent = AgentProcess(folder, models, _port_range(count), LLAMA_SERVER.resolve(), settings or {})
    with ended(agent, f"magi-llama-{name}-*.service"):
        agent.start()
        wait_until(lambda: not agent.ask("GET", "/health/ready").body["scanning"], "the first scan")
        for model_id in ids:
            agent.must("PUT", f"/api/models/{model_id}/settings", {"nThreads": 1, "ctxSize": 256})
            agent.must("POST", f"/api/models/servers/{model_id}/start")
        ready = "every server is ready"
        wait_until(lambda: agent.must("GET", "/api/models/servers")["readyServers"] == count, ready, _WAIT)
        yield agent, ids
        agent.stop()


def _port_range(count: int) -> tuple[int, int]:
    """As many ports in a row that nothing listens on."""
    for first in range(20_000, 21_000 - count, count):
        if all(is_free(port) for port in range(first, first + count)):
            return first, first + count - 1
    raise RuntimeError(f"no {count} free ports in a row")
