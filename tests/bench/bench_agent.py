"""What an agent with 1,000 known models takes: start to READY, memory, and processor time in an idle minute.

Known means that a run before has read every header and saved registry and header cache, as at every start but the
first. The floor beside it is a service that only imports the same libraries and says READY (bare_service.py): what no
code of the agent's own can save. Both start in turns, with all files in the page cache; one pair comes before those
that count. After READY the first scan goes on in the background; its end is measured too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locations import CHECKOUT, LLAMA_SERVER

from tests.agent_process import AgentProcess, ended
from tests.bench.ending import end
from tests.bench.figures import at_most, print_rows, print_targets, shown, spread_of
from tests.bench.many_models import write_models
from tests.bench.ports import free_ports
from tests.bench.process_figures import cpu_seconds, resident_megabytes
from tests.bench.ready_socket import ReadySocket
from tests.bench.unix_http import fetch

MODELS = 1000
STARTS = 5
IDLE_SECONDS = 60.0
IDLE_ROUNDS = 3
_VOCABULARY = 1000
_SETTLE_SECONDS = 120.0
_REST = 0.1  # of the time it is left alone, before that
_LISTS = 20
_PATH = "/api/models/registry"


def measure(
    models: int = MODELS, starts: int = STARTS, idle_seconds: float = IDLE_SECONDS, idle_rounds: int = IDLE_ROUNDS
) -> dict[str, Any]:
    """Start both in turns, then leave the agent alone. Beside a systemd user manager only."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-agent-") as name:
        folder = Path(name)
        write_models(folder / "models", models, _VOCABULARY)
        (port,) = free_ports(1)
        with ReadySocket(folder / "notify") as ready:
            settings = {"NOTIFY_SOCKET": str(ready.path)}
            agent = AgentProcess(folder, folder / "models", (port, port), LLAMA_SERVER.resolve(), settings)
            with ended(agent, "magi-llama-none-of-this-benchmark.service"):
                agent.spawn()
                ready.wait_ready(agent.process)
                agent.wait_settled(_SETTLE_SECONDS)
                found = len(agent.must("GET", _PATH)["models"])
                agent.stop()
                pairs = [(_start_agent(agent, ready), _start_bare(ready)) for _ in range(1 + starts)][1:]
                ours, floor = ([pair[side] for pair in pairs] for side in (0, 1))
                idle = _left_alone(agent, ready, idle_seconds, idle_rounds)
                agent.stop()
    return {
        "models": found,
        "agent": {key: spread_of(start[key] for start in ours) for key in ours[0]},
        "floor": {key: spread_of(start[key] for start in floor) for key in floor[0]},
        "idle": idle,
        "targets": [
            at_most(f"models of {models} that are missing", models - found, 0, ""),
            at_most("start to READY", spread_of(start["ready"] for start in ours)["median"], 1000, "ms"),
            at_most("resident memory", idle["megabytes"], 70, "MB"),
            at_most("processor time when idle", idle["percent"]["median"], 0.1, "% of one"),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print the agent beside its floor, then the targets."""
    agent, floor, idle = figures["agent"], figures["floor"], figures["idle"]
    print(f"an agent with {figures['models']:,} known models; median (lowest to highest)")
    rows = [
        ["start to READY, ms", shown(agent["ready"], 0), shown(floor["ready"], 0), _ratio(agent, floor, "ready")],
        ["of that, processor time, ms", shown(agent["cpu"], 0), shown(floor["cpu"], 0), _ratio(agent, floor, "cpu")],
        ["start to first scan done, ms", shown(agent["settled"], 0), "-", "-"],
        ["memory when settled, MB", shown(agent["megabytes"]), shown(floor["megabytes"]),
         _ratio(agent, floor, "megabytes")],
        [f"memory after {_LISTS} lists of all models, MB", f"{idle['megabytes']:.1f}", "-", "-"],
        ["memory after a scrape, MB", f"{idle['megabytesScraped']:.1f}", "-", "-"],
        [f"idle for {idle['seconds']:g} s, % of a processor", shown(idle["percent"], 3), "-", "-"],
        ["starts", str(agent["ready"]["runs"]), str(floor["ready"]["runs"]), ""],
    ]  # fmt: skip
    print_rows(["", "agent", "libraries alone", "times"], rows)
    print_targets(figures["targets"])


def _ratio(agent: dict[str, Any], floor: dict[str, Any], key: str) -> str:
    return f"{agent[key]['median'] / floor[key]['median']:.2f}"


def _start_agent(agent: AgentProcess, ready: ReadySocket) -> dict[str, float]:
    """Start it, wait until its first scan is through, stop it."""
    began = time.monotonic()
    agent.spawn()
    pid = ready.wait_ready(agent.process)
    figures = {"ready": (time.monotonic() - began) * 1e3, "cpu": cpu_seconds(pid) * 1e3}
    agent.wait_settled(_SETTLE_SECONDS)
    figures["settled"] = (time.monotonic() - began) * 1e3
    figures["megabytes"] = resident_megabytes(pid)
    agent.stop()
    return figures


def _start_bare(ready: ReadySocket) -> dict[str, float]:
    began = time.monotonic()
    with _bare_service(ready) as process:
        ready.wait_ready(process)
        return {
            "ready": (time.monotonic() - began) * 1e3,
            "cpu": cpu_seconds(process.pid) * 1e3,
            "megabytes": resident_megabytes(process.pid),
        }


@contextmanager
def _bare_service(ready: ReadySocket) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.bench.bare_service"]
    process = subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, "NOTIFY_SOCKET": str(ready.path)})
    try:
        yield process
    finally:
        end(process)


def _left_alone(agent: AgentProcess, ready: ReadySocket, seconds: float, rounds: int) -> dict[str, Any]:
    """Have the agent answer for a while, then leave it alone; return what it takes then."""
    agent.spawn()
    pid = ready.wait_ready(agent.process)
    agent.wait_settled(_SETTLE_SECONDS)
    for _ in range(_LISTS):
        fetch(agent.socket, _PATH)
    time.sleep(seconds * _REST)
    percent = []
    for _ in range(rounds):
        before, since = cpu_seconds(pid), time.monotonic()
        time.sleep(seconds)
        percent.append((cpu_seconds(pid) - before) / (time.monotonic() - since) * 100)
    megabytes = resident_megabytes(pid)
    # The first scrape imports what tells metrics.
    fetch(agent.socket, "/metrics")
    return {
        "seconds": seconds,
        "percent": spread_of(percent),
        "megabytes": megabytes,
        "megabytesScraped": resident_megabytes(pid),
    }
