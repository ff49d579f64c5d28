"""A scrape of `/metrics` with twenty toy servers up, and what it costs the agent.

Each looks and asks anew: they are more than two seconds apart. Beside it stands what a look does at its core: the same
servers' own `/metrics`, asked for one after the other without the agent. Then the same again with a thousand more
models listed, which no scrape should take longer for, and many scrapers at once, which are told one look.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.agent_process import AgentProcess, wait_until
from tests.bench.figures import at_most, print_rows, print_targets, shown, spread_of
from tests.bench.many_models import write_models
from tests.bench.process_figures import cpu_seconds
from tests.bench.toy_servers import toy_servers
from tests.bench.unix_http import fetch

_SERVERS = 20
_SCRAPES = 15
_PAUSE = 2.2
_SCRAPERS = 16
_IDLE_MODELS = 1000
_WAIT = 120


def measure() -> dict[str, Any]:
    """Scrape and return milliseconds. Beside a systemd user manager only."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-metrics-") as name:
        folder = Path(name)
        with toy_servers(folder, "bench-metrics", _SERVERS) as (agent, _):
            ports = [server["port"] for server in agent.must("GET", "/api/models/servers")["servers"]]
            alone = _scrapes(agent)
            by_hand = spread_of(_by_hand(ports) for _ in range(_SCRAPES))
            write_models(folder / "models", _IDLE_MODELS)
            listed = "the models are listed"
            wait_until(lambda: agent.must("GET", "/health/ready")["models"] > _IDLE_MODELS, listed, _WAIT)
            among_many = _scrapes(agent)
            together = _together(agent)
    return {
        "servers": _SERVERS,
        "idleModels": _IDLE_MODELS,
        "alone": alone,
        "amongMany": among_many,
        "byHand": by_hand,
        "together": together,
        "targets": [
            at_most("median of a scrape", alone["milliseconds"]["median"], 250, "ms"),
            at_most("processor time of a scrape", alone["cpuMilliseconds"], 100, "ms"),
            at_most(
                "the same with a thousand more models, as a multiple",
                among_many["cpuMilliseconds"] / alone["cpuMilliseconds"], 1.3, "",
            ),
        ],
    }  # fmt: skip


def print_table(figures: dict[str, Any]) -> None:
    """Print the scrapes beside each other, then the targets."""
    alone, many = figures["alone"], figures["amongMany"]
    print(f"a scrape with {figures['servers']} toy servers up; median (lowest to highest)")
    print_rows(
        ["", "alone", f"{figures['idleModels']} more models listed"],
        [
            ["scrape, ms", shown(alone["milliseconds"]), shown(many["milliseconds"])],
            ["the agent's processor time, ms", f"{alone['cpuMilliseconds']:.1f}", f"{many['cpuMilliseconds']:.1f}"],
            ["told again within a second, ms", shown(alone["againMilliseconds"]), shown(many["againMilliseconds"])],
            ["answer, kB", f"{alone['bytes'] / 1e3:.0f}", f"{many['bytes'] / 1e3:.0f}"],
            ["samples", str(alone["samples"]), str(many["samples"])],
            ["the servers asked by hand, in turn, ms", shown(figures["byHand"]), "-"],
            [f"{_SCRAPERS} scrapers at once, the last, ms", "-", f"{figures['together']:.1f}"],
        ],
    )
    print_targets(figures["targets"])


def _scrapes(agent: AgentProcess) -> dict[str, Any]:
    assert agent.process is not None
    took, again, used = [], [], 0.0
    content = b""
    for _ in range(_SCRAPES):
        time.sleep(_PAUSE)
        before = cpu_seconds(agent.process.pid)
        began = time.perf_counter()
        content = _scrape(agent)
        took.append((time.perf_counter() - began) * 1e3)
        used += cpu_seconds(agent.process.pid) - before
        began = time.perf_counter()
        _scrape(agent)
        again.append((time.perf_counter() - began) * 1e3)
    told = (line for line in content.splitlines() if line.startswith(b"magi_server_scrape_success{"))
    answered = sum(line.endswith(b" 1.0") for line in told)
    if answered != _SERVERS:
        raise RuntimeError(f"{answered} of {_SERVERS} servers told their metrics")
    return {
        "milliseconds": spread_of(took),
        "againMilliseconds": spread_of(again),
        "cpuMilliseconds": used / _SCRAPES * 1e3,
        "bytes": len(content),
        "samples": sum(not line.startswith(b"#") for line in content.splitlines()),
    }


def _scrape(agent: AgentProcess) -> bytes:
    status, content = fetch(agent.socket, "/metrics")
    if status != 200:
        raise RuntimeError(f"/metrics answered {status}: {content[:500]!r}")
    return content


def _together(agent: AgentProcess) -> float:
    """Milliseconds until the last of many scrapers has its answer."""
    time.sleep(_PAUSE)
    with concurrent.futures.ThreadPoolExecutor(_SCRAPERS) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: _scrape(agent), range(_SCRAPERS)))
        return (time.perf_counter() - began) * 1e3


def _by_hand(ports: list[int]) -> float:
    """Milliseconds to ask each server for its metrics, one after the other."""
    began = time.perf_counter()
    for port in ports:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/metrics")
        connection.getresponse().read()
        connection.close()
    return (time.perf_counter() - began) * 1e3
