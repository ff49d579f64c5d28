"""Faults at random, all at once: agent and servers killed, the bus restarted, files that come and go.

Afterwards what runs is what was asked for, and nothing is orphaned. A minute of it in every run of the tests, ten in
`make soak` (``MAGI_TEST_FAULT_SECONDS``); ``MAGI_TEST_SEED`` does the same again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, ended, unit_property, units, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.test_agent_killed import llama_servers

SECONDS = float(os.environ.get("MAGI_TEST_FAULT_SECONDS", "60"))
SEED = int(os.environ.get("MAGI_TEST_SEED", str(random.randrange(1_000_000))))
PREFIX = "faulty"
IDS = [f"{PREFIX}-{number}" for number in range(4)]
PATTERN = f"magi-llama-{PREFIX}-*.service"


class Chaos:
    """One random fault after the other, and what was asked for meanwhile."""

    def __init__(self, agent: AgentProcess, spare: Path) -> None:
        self.agent = agent
        self.wanted: dict[str, set[bool]] = {model_id: {False} for model_id in IDS}
        """Whether each is to run; both, where nobody knows whether the agent heard it."""
        self.done: Counter[str] = Counter()
        self._chance = random.Random(SEED)
        self._spare = spare
        self._deeds = [self.ask] * 6 + [
            self.kill_agent, self.kill_server, self.stop_server, self.restart_bus, self.take_file, self.reload,
        ]  # fmt: skip

    def act(self) -> None:
        deed = self._chance.choice(self._deeds)
        deed()
        self.done[deed.__name__] += 1
        time.sleep(self._chance.uniform(0, 0.5))

    def ask(self) -> None:
        model_id, runs = self._chance.choice(IDS), self._chance.random() < 0.7
        self.wanted[model_id].add(runs)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            verb = "start" if runs else "stop"
            if self.agent.ask("POST", f"/api/models/servers/{model_id}/{verb}").status in (200, 202):
                self.wanted[model_id] = {runs}

    def kill_agent(self) -> None:
        self.agent.kill()
        time.sleep(self._chance.uniform(0, 0.5))
        self.agent.spawn()

    def kill_server(self) -> None:
        pid = int(unit_property(self._unit(), "MainPID") or 0)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self._chance.choice([signal.SIGKILL, signal.SIGSEGV]))

    def stop_server(self) -> None:
        """As an operator: their word holds, if it is known that it ran by then."""
        unit = self._unit()
        self.wanted[unit.removeprefix("magi-llama-").removesuffix(".service")] |= {True, False}
        subprocess.run(["systemctl", "--user", "stop", unit], capture_output=True, timeout=60, check=False)

    def restart_bus(self) -> None:
        subprocess.run(["systemctl", "--user", "restart", "dbus.service"], capture_output=True, timeout=60, check=True)

    def take_file(self) -> None:
        path = self.agent.models / f"{self._chance.choice(IDS)}.gguf"
        path.unlink(missing_ok=True)
        time.sleep(self._chance.uniform(0, 0.3))
        shutil.copyfile(self._spare / path.name, path)

    def reload(self) -> None:
        assert self.agent.process is not None
        # An agent that has not come so far would be ended by it, as every program is.
        with contextlib.suppress(OSError, http.client.HTTPException):
            if self.agent.ask("GET", "/health/live").status == 200:
                self.agent.process.send_signal(signal.SIGHUP)

    def _unit(self) -> str:
        return f"magi-llama-{self._chance.choice(IDS)}.service"


@pytest.mark.timeout(SECONDS + 240)
def test_after_random_faults_what_runs_is_what_was_asked_for(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> None:
    models, spare = tmp_path / "models", tmp_path / "spare"
    for seed, model_id in enumerate(IDS):
        toy_model(models / f"{model_id}.gguf", name=model_id, seed=seed)
    shutil.copytree(models, spare)
    print(f"MAGI_TEST_SEED={SEED}")
    agent = AgentProcess(tmp_path, models, unused_ports(8), llama_server)
    chaos = Chaos(agent, spare)
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            chaos.act()

        wait_until(agent.answers, "the agent answers", 30)
        wait_until(lambda: not agent.ask("GET", "/health/ready").body["scanning"], "the scan is through", 60)
        assert sorted(agent.must("GET", "/api/models/registry")["models"]) == IDS

        def agree() -> bool:
            states = {each["modelId"]: each["state"] for each in agent.must("GET", "/api/models/servers")["servers"]}
            return all(_allows(chaos.wanted[model_id], states.get(model_id, "stopped")) for model_id in IDS)

        wait_until(agree, f"what runs is what was asked for: {chaos.wanted}", 60)
        # A model that cools down is tried again at once when somebody says so.
        for model_id in IDS:
            runs = True in chaos.wanted[model_id]
            answer = agent.ask("POST", f"/api/models/servers/{model_id}/{'start' if runs else 'stop'}?wait=60")
            assert answer.status == 200, answer.body
            chaos.wanted[model_id] = {runs}

        servers = {server["modelId"]: server for server in agent.must("GET", "/api/models/servers")["servers"]}
        assert {model_id: servers.get(model_id, {}).get("state", "stopped") for model_id in IDS} == {
            model_id: "ready" if chaos.wanted[model_id] == {True} else "stopped" for model_id in IDS
        }
        active = sorted(name for name, state in units(PATTERN).items() if state == "active")
        assert sorted(llama_servers(models).values()) == active, "no process without its unit, none twice"
        assert agent.ask("GET", "/health/ready").body["problems"] == []
        assert agent.stop() == 0
    assert len(chaos.done) == 7, chaos.done


def _allows(wanted: set[bool], state: str) -> bool:
    """Whether a server may be in a state for good, by what was wished for it; which of two was heard is not known."""
    return (True in wanted and state in ("ready", "cooldown")) or (False in wanted and state == "stopped")
