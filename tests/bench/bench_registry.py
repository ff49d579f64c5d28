"""`GET /api/models/registry` with 1,000 models, over a unix socket: the agent against FastAPI and uvicorn.

The peer answers with the same bytes (compared), from pydantic objects that it holds. Both are asked in turns by the
same generator in a process of its own, on 1 and on 8 connections that stay open; each run warms up before it counts.
Nothing of this is cold: both sides have answered before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from locations import CHECKOUT, LLAMA_SERVER

from tests.agent_process import AgentProcess, ended
from tests.bench.figures import at_least, print_rows, print_targets, shown, spread_of
from tests.bench.many_models import write_models
from tests.bench.peer import running_peer
from tests.bench.ports import free_ports
from tests.bench.unix_http import fetch

MODELS = 1000
_PATH = "/api/models/registry"
_CONNECTIONS = (1, 8)
_ROUNDS = 5
_SECONDS = 2.0
_SCAN_SECONDS = 60.0
_UNCHANGED_SECONDS = 3.0
_POLL_SECONDS = 0.1
_FASTER = 5.0
_KEYS = ("perSecond", "p50", "p99", "busy")


def measure() -> dict[str, Any]:
    """Ask both sides in turns; return requests a second and milliseconds. Beside a systemd user manager only."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-registry-") as name:
        folder = Path(name)
        write_models(folder / "models", MODELS)
        (port,) = free_ports(1)
        scans = {"MAGI_RESCAN_INTERVAL": "86400"}
        agent = AgentProcess(folder, folder / "models", (port, port), LLAMA_SERVER.resolve(), scans)
        with ended(agent, "magi-llama-none-of-this-benchmark.service"):
            agent.start()
            body = _settled_answer(agent)
            document, peer = folder / "registry.json", folder / "fastapi.sock"
            document.write_bytes(body)
            with running_peer("tests.bench.fastapi_registry", [str(peer), str(document)], peer):
                sides = {"agent": agent.socket, "fastapi": peer}
                loads = {connections: _in_turns(sides, connections) for connections in _CONNECTIONS}
                # After the load: whatever was measured was this.
                same = fetch(peer, _PATH) == fetch(agent.socket, _PATH) == (200, body)
            agent.stop()
    return {
        "models": MODELS,
        "bytes": len(body),
        "sameBytes": same,
        "connections": {str(connections): load for connections, load in loads.items()},
        "targets": [
            {"target": "the same bytes from both", "measured": int(same), "met": same},
            *(
                at_least(f"{words}, {connections} at once", loads[connections]["ratio"][key], _FASTER, "times")
                for connections in _CONNECTIONS
                for key, words in (("perSecond", "more requests a second"), ("p99", "shorter p99"))
            ),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print both sides beside each other for each number of connections, then the targets."""
    print(
        f"GET {_PATH}, {figures['models']:,} models, {figures['bytes']:,} bytes, unix socket; "
        f"median of runs of {_SECONDS:g} s (lowest to highest)"
    )
    rows = []
    for connections, load in figures["connections"].items():
        for key, words, digits in (("perSecond", "requests/s", 0), ("p50", "p50 ms", 2), ("p99", "p99 ms", 2)):
            sides = [shown(load[side][key], digits) for side in ("agent", "fastapi")]
            rows.append([f"{words}, {connections} at once", *sides, f"{load['ratio'][key]:.1f}"])
        busy = [f"{load[side]['busy']['median']:.0%}" for side in ("agent", "fastapi")]
        rows.append([f"generator busy, {connections} at once", *busy, ""])
    print_rows(["", "agent", "FastAPI + uvicorn", "times better"], rows)
    print_targets(figures["targets"])


def _settled_answer(agent: AgentProcess) -> bytes:
    """Return the agent's answer once every model is in it and no scan has changed it for a while."""
    agent.wait_settled(_SCAN_SECONDS)
    deadline = time.monotonic() + _SCAN_SECONDS
    answer, since = b"", time.monotonic()
    while time.monotonic() - since < _UNCHANGED_SECONDS:
        if (latest := fetch(agent.socket, _PATH)[1]) != answer:
            answer, since = latest, time.monotonic()
        if time.monotonic() > deadline:
            raise RuntimeError(f"the agent's answer kept changing for {_SCAN_SECONDS:g} seconds")
        time.sleep(_POLL_SECONDS)
    if (found := len(json.loads(answer)["models"])) != MODELS:
        raise RuntimeError(f"the agent found {found} of {MODELS} models")
    return answer


def _in_turns(sides: dict[str, Path], connections: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(_ROUNDS):
        for side, listening in sides.items():
            runs[side].append(_load(listening, connections))
    load: dict[str, Any] = {side: {key: spread_of(run[key] for run in runs[side]) for key in _KEYS} for side in sides}
    medians = {side: {key: load[side][key]["median"] for key in _KEYS} for side in sides}
    load["ratio"] = {
        "perSecond": medians["agent"]["perSecond"] / medians["fastapi"]["perSecond"],
        **{key: medians["fastapi"][key] / medians["agent"][key] for key in ("p50", "p99")},
    }
    return load


def _load(listening: Path, connections: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.load", str(listening), _PATH, str(connections), str(_SECONDS)]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, timeout=_SECONDS + _SCAN_SECONDS, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result
