"""How soon the agent's events are heard: by a hundred listeners, and when a server has died.

Fan-out: a choice is made for a model again and again, over the API, with nobody listening and with 100 listeners on the
unix socket; from the moment that the event itself names until the last listener has it, and the agent's processor time
for one such change. The listeners are one process beside the agent, so on two processors they wait for each other.

Death: a ready toy server is killed with SIGKILL; from the signal until a listener hears that it is ready no more, with
the reason, and likewise until an answer to somebody who asks for that server every 20 ms tells it. Killed again and
again until systemd gives up, which it finds out when its pause of a second before the next try is over, the same is
measured until the event that the agent lets it cool down; the log's last lines are read first.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

from locations import LLAMA_SERVER
from toy_model import write_toy_model

from tests.agent_process import AgentProcess, ended, wait_until
from tests.bench.event_listeners import Listeners, listening, seconds_since
from tests.bench.figures import at_most, print_rows, print_targets, shown, spread_of
from tests.bench.ports import free_ports
from tests.bench.process_figures import cpu_seconds

_MODEL = "bench-events"
LISTENERS = 100
CHANGES = 50
DEATHS = 10
LAST_DEATHS = 3
_QUICK_RETRIES = 3  # of systemd's, after which it gives up


def measure(
    listeners: int = LISTENERS, changes: int = CHANGES, deaths: int = DEATHS, last_deaths: int = LAST_DEATHS
) -> dict[str, Any]:
    """Have one agent with one toy model. Beside a systemd user manager only."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="magi-bench-events-") as name:
        folder = Path(name)
        (folder / "models").mkdir()
        write_toy_model(folder / "toy.gguf")
        shutil.copyfile(folder / "toy.gguf", folder / "models" / f"{_MODEL}.gguf")
        agent = AgentProcess(folder, folder / "models", (port, port), LLAMA_SERVER.resolve())
        with ended(agent, f"magi-llama-{_MODEL}.service"):
            agent.start()
            agent.wait_settled()
            tiers = cycle(("fast", "balanced"))
            alone = _fan_out(agent, tiers, 0, changes)
            heard = _fan_out(agent, tiers, listeners, changes)
            with listening(agent.socket, 1) as one:
                first = [_first_death(agent, one) for _ in range(deaths)]
                answered = [_death_in_answers(agent, one) for _ in range(deaths)]
                last = [_last_death(agent, one) for _ in range(last_deaths)]
            agent.stop()
    return {
        "listeners": listeners,
        "toLast": spread_of(heard["toLast"]),
        "toFirst": spread_of(heard["toFirst"]),
        "cpuPerChange": {"alone": alone["cpu"], "heard": heard["cpu"]},
        "death": spread_of(first),
        "deathInAnswers": spread_of(answered),
        "lastDeath": spread_of(last),
        "targets": [
            at_most("a server's death to the event that tells it", spread_of(first)["median"], 100, "ms"),
            at_most("a server's death to the answer that tells it", spread_of(answered)["median"], 100, "ms"),
            at_most("the same until it cools down", spread_of(last)["median"], 1500, "ms"),
            at_most(f"an event to the last of {listeners} listeners", spread_of(heard["toLast"])["median"], 50, "ms"),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print fan-out and deaths, then the targets."""
    cpu, count = figures["cpuPerChange"], figures["listeners"]
    print("events; median (lowest to highest)")
    print_rows(
        ["", "measured"],
        [
            [f"to the first of {count} listeners, ms", shown(figures["toFirst"], 2)],
            [f"to the last of {count} listeners, ms", shown(figures["toLast"], 2)],
            ["a change, nobody listens: processor time of the agent, ms", f"{cpu['alone']:.2f}"],
            [f"the same with {count} listeners, ms", f"{cpu['heard']:.2f}"],
            ["kill -9 to the event that tells it, ms", shown(figures["death"])],
            ["kill -9 to the first GET of the server that tells it, ms", shown(figures["deathInAnswers"])],
            ["kill -9 to its cool-down, with its last words, ms", shown(figures["lastDeath"])],
        ],
    )
    print_targets(figures["targets"])


def _fan_out(agent: AgentProcess, tiers: Iterator[str], count: int, changes: int) -> dict[str, Any]:
    """Milliseconds from each change to the first and the last listener, and of processor time for one change."""
    assert agent.process is not None
    to_first, to_last = [], []
    with listening(agent.socket, count) as listeners, ThreadPoolExecutor(1) as asker:
        before = cpu_seconds(agent.process.pid)
        for _ in range(changes):
            listeners.forget()
            # Beside the listeners: the event is on its way before the answer is.
            change = asker.submit(agent.must, "PUT", f"/api/models/{_MODEL}/tier", {"tier": next(tiers)})
            if count:
                late = sorted(seconds_since(event) for event in listeners.wait("a choice", "choicesChanged"))
                to_first.append(late[0] * 1e3)
                to_last.append(late[-1] * 1e3)
            change.result()
        used = cpu_seconds(agent.process.pid) - before
    return {"toFirst": to_first, "toLast": to_last, "cpu": used / changes * 1e3}


def _first_death(agent: AgentProcess, listeners: Listeners) -> float:
    """Milliseconds from a ready server's death to the event that tells it."""
    server = agent.must("POST", f"/api/models/servers/{_MODEL}/start?wait=60")["server"]
    listeners.wait("it is ready", "serverChanged", after="ready")
    late = _kill(int(server["pid"]), listeners, before="ready")
    agent.must("POST", f"/api/models/servers/{_MODEL}/stop?wait=60")
    listeners.wait("it is stopped", "serverChanged", after="stopped")
    return late


def _death_in_answers(agent: AgentProcess, listeners: Listeners) -> float:
    """Milliseconds from a ready server's death until it is answered that it is ready no more."""
    path = f"/api/models/servers/{_MODEL}"
    server = agent.must("POST", f"{path}/start?wait=60")["server"]
    began = time.time()
    os.kill(int(server["pid"]), signal.SIGKILL)
    wait_until(lambda: not agent.must("GET", path)["isReady"], "it is ready no more")
    late = (time.time() - began) * 1e3
    listeners.forget()
    agent.must("POST", f"{path}/stop?wait=60")
    listeners.wait("it is stopped", "serverChanged", after="stopped")
    return late


def _last_death(agent: AgentProcess, listeners: Listeners) -> float:
    """The same for the death after which systemd gives up."""
    agent.must("POST", f"/api/models/servers/{_MODEL}/start?wait=60")
    while True:
        wait_until(lambda: agent.must("GET", f"/api/models/servers/{_MODEL}")["isReady"], "it is up again", 30.0)
        server = agent.must("GET", f"/api/models/servers/{_MODEL}")
        listeners.forget()
        began = time.time()
        os.kill(int(server["pid"]), signal.SIGKILL)
        if server["restarts"] >= _QUICK_RETRIES:
            break
        listeners.wait("it is no more", "serverChanged", before="ready")
    [(heard, _)] = listeners.wait("it cools down", "serverChanged", after="cooldown")
    agent.must("POST", f"/api/models/servers/{_MODEL}/stop?wait=60")
    return (heard - began) * 1e3


def _kill(pid: int, listeners: Listeners, **told: object) -> float:
    listeners.forget()
    began = time.time()
    os.kill(pid, signal.SIGKILL)
    [(heard, event)] = listeners.wait("it is no more", "serverChanged", **told)
    if not event["failure"]:
        raise RuntimeError(f"told without a reason: {event}")
    return (heard - began) * 1e3
