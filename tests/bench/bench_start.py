"""From the request to start a model until it is ready: by the agent, and by hand.

By the agent: `POST /api/models/servers/{id}/start?wait=60` on its unix socket, until the answer is there. By hand: the
same binary with the same arguments (read from the process that the agent's unit runs; only the port differs), without
systemd, `/health` asked every 10 ms. In turns, the model's file in the page cache for both: one pair of starts comes
before those that count. A start with the file not in the page cache is not measured; the disk would be.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locations import LLAMA_SERVER, SMOLLM2

from tests.agent_process import AgentProcess, ended, unit_property, wait_until
from tests.bench.ending import end
from tests.bench.figures import at_most, print_rows, print_targets, shown, spread_of
from tests.bench.ports import free_ports, is_free

_MODEL_NAME = "bench-start"
_PAIRS = 15
_POLL_SECONDS = 0.01
_START_SECONDS = 60
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Started:
    """One start by the agent, and what its unit gave to the server."""

    milliseconds: float
    until_executed: float  # milliseconds
    arguments: list[str]
    environment: dict[str, str]


def measure() -> dict[str, Any]:
    """Start one model in turns by both ways and return milliseconds. Beside a systemd user manager only."""
    agents_port, hands_port = free_ports(2)
    by_agent: list[float] = []
    executed: list[float] = []
    by_hand: list[float] = []
    with tempfile.TemporaryDirectory(prefix="magi-bench-start-") as name:
        folder = Path(name)
        models = folder / "models"
        models.mkdir()
        # A copy, so that the model and its unit have a name like no other's.
        shutil.copyfile(SMOLLM2, models / f"{_MODEL_NAME}.gguf")
        agent = AgentProcess(folder, models, (agents_port, agents_port), LLAMA_SERVER.resolve())
        with ended(agent, f"magi-llama-{_MODEL_NAME}*.service"):
            agent.start()
            agent.wait_settled()
            (model_id,) = agent.must("GET", "/api/models/registry")["models"]
            for pair in range(1 + _PAIRS):
                started = _start_by_agent(agent, model_id)
                wait_until(lambda: is_free(agents_port), "the port is free")
                arguments = [str(hands_port) if word == str(agents_port) else word for word in started.arguments]
                milliseconds = _start_by_hand(arguments, started.environment, hands_port)
                if pair:
                    by_agent.append(started.milliseconds)
                    executed.append(started.until_executed)
                    by_hand.append(milliseconds)
            agent.stop()
    more = spread_of(ours - theirs for ours, theirs in zip(by_agent, by_hand, strict=True))
    figures = {
        "agent": spread_of(by_agent),
        "agentUntilExecuted": spread_of(executed),
        "byHand": spread_of(by_hand),
        "more": more,
    }
    return {
        "model": SMOLLM2.name,
        "arguments": arguments[1:],
        "milliseconds": figures,
        "ratio": figures["agent"]["median"] / figures["byHand"]["median"],
        "targets": [at_most("median of what the agent takes longer", more["median"], 100, "ms")],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print both ways beside each other, then the target."""
    columns = [figures["milliseconds"][column] for column in ("agent", "byHand", "more")]
    print(f"start of {figures['model']} to ready, in page cache; median (lowest to highest)")
    print_rows(
        ["", "by the agent", "by hand", "difference of a pair"],
        [
            ["from request to ready, ms", *map(shown, columns)],
            ["of that, until executed, ms", shown(figures["milliseconds"]["agentUntilExecuted"]), "-", "-"],
            ["starts", *(str(column["runs"]) for column in columns)],
        ],
    )
    print_targets(figures["targets"])


def _start_by_agent(agent: AgentProcess, model_id: str) -> _Started:
    servers = f"/api/models/servers/{model_id}"
    requested = time.monotonic()
    answer = agent.must("POST", f"{servers}/start?wait={_START_SECONDS}")
    milliseconds = (time.monotonic() - requested) * 1e3
    server = agent.must("GET", f"/api/models/{model_id}")["server"]
    if not server["isReady"]:
        raise RuntimeError(f"not ready but {server['state']}: {answer}")
    process = Path("/proc") / str(server["pid"])
    arguments = _words(process / "cmdline")
    environment = dict(entry.partition("=")[::2] for entry in _words(process / "environ"))
    # A unit of Type=exec is active once its program is executed; by systemd's clock, which is time.monotonic()'s.
    executed = int(unit_property(server["unit"], "ActiveEnterTimestampMonotonic")) / 1e6
    agent.must("POST", f"{servers}/stop?wait={_START_SECONDS}")
    return _Started(
        milliseconds,
        (executed - requested) * 1e3,
        arguments,
        {name: value for name, value in environment.items() if name.startswith("LLAMA_")},
    )


def _start_by_hand(arguments: list[str], environment: dict[str, str], port: int) -> float:
    """Start it, wait until it is ready, end it; return the milliseconds to readiness."""
    began = time.perf_counter()
    process = subprocess.Popen(
        arguments, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not _is_healthy(port):
            if process.poll() is not None or time.perf_counter() - began > _START_SECONDS:
                raise RuntimeError(f"{arguments} did not get ready, exit status {process.poll()}")
            time.sleep(_POLL_SECONDS)
        return (time.perf_counter() - began) * 1e3
    finally:
        end(process, _END_SECONDS)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _words(path: Path) -> list[str]:
    return [word.decode() for word in path.read_bytes().split(b"\0") if word]
