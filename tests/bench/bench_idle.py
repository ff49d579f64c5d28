"""What an agent takes while nobody asks it for anything and twenty toy servers are ready: processor time and memory.

The servers are measured beside it, all together: each looks for work of its own, and each is looked at now and then by
the agent. A minute at a time, as that is how often the agent looks at each.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.figures import at_most, print_rows, print_targets, shown, spread_of
from tests.bench.process_figures import cpu_seconds, resident_megabytes
from tests.bench.ready_socket import heard
from tests.bench.toy_servers import toy_servers

SERVERS = 20
SECONDS = 60.0
ROUNDS = 3
REST = 70.0
"""Seconds that it is left alone before that: a minute after each is ready, it is measured what it uses."""
_WATCHDOG_SECONDS = 30
"""As its unit has it."""


def measure(
    servers: int = SERVERS, seconds: float = SECONDS, rounds: int = ROUNDS, rest: float = REST
) -> dict[str, Any]:
    """Leave them alone. Beside a systemd user manager only."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-idle-") as name:
        folder = Path(name)
        notify = folder / "notify"
        settings = {"NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": str(_WATCHDOG_SECONDS * 1_000_000)}
        with heard(notify), toy_servers(folder, "bench-idle", servers, settings) as (agent, _):
            assert agent.process is not None
            pid = agent.process.pid
            pids = [int(server["pid"]) for server in agent.must("GET", "/api/models/servers")["servers"]]
            time.sleep(rest)
            ours, theirs = [], []
            for _ in range(rounds):
                before, before_theirs, since = cpu_seconds(pid), sum(map(cpu_seconds, pids)), time.monotonic()
                time.sleep(seconds)
                took = time.monotonic() - since
                ours.append((cpu_seconds(pid) - before) / took * 100)
                theirs.append((sum(map(cpu_seconds, pids)) - before_theirs) / took * 100)
            megabytes = resident_megabytes(pid)
    return {
        "servers": servers,
        "seconds": seconds,
        "agentPercent": spread_of(ours),
        "serversPercent": spread_of(theirs),
        "agentMegabytes": megabytes,
        "targets": [
            at_most("processor time of the agent", spread_of(ours)["median"], 0.1, "% of one"),
            at_most("resident memory of the agent", megabytes, 80, "MB"),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print what they take, then the targets."""
    print(f"{figures['servers']} toy servers ready, nobody asks; median (lowest to highest)")
    rows = [
        [f"the agent over {figures['seconds']:g} s, % of a processor", shown(figures["agentPercent"], 3)],
        ["all servers together, % of a processor", shown(figures["serversPercent"], 3)],
        ["memory of the agent, MB", f"{figures['agentMegabytes']:.1f}"],
    ]
    print_rows(["", "measured"], rows)
    print_targets(figures["targets"])
