"""The agent killed at random moments, a hundred times: nothing is lost, doubled or orphaned."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.agent_process import AgentProcess, ended, unit_property, units, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

KILLS = int(os.environ.get("MAGI_TEST_KILLS", "100"))
SEED = int(os.environ.get("MAGI_TEST_SEED", str(random.randrange(1_000_000))))
PREFIX = "killed"
STEADY = f"{PREFIX}-steady"
IDS = [f"{PREFIX}-{number}" for number in range(4)]
PATTERN = f"magi-llama-{PREFIX}-*.service"

TIERS = [None, "fast", "balanced", "powerful"]


@dataclass
class Promises:
    """What the agent said is so; where an answer was cut off, both the old and the new may be."""

    values: dict[tuple[str, str], set[Any]] = field(default_factory=dict)

    def asked(self, what: tuple[str, str], value: Any) -> None:
        self.values.setdefault(what, {None if what[1] != "enabled" else False}).add(value)

    def answered(self, what: tuple[str, str], value: Any) -> None:
        self.values[what] = {value}


@dataclass
class Person:
    """Does things to the agent until it dies."""

    agent: AgentProcess
    models: Path
    random: random.Random
    promises: Promises
    done: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)

    def live(self) -> None:
        deeds: list[Callable[[], None]] = [
            self.choose_tier, self.choose_thinking, self.enable, self.choose_settings, self.choose_port, self.start,
            self.stop, self.restart, self.rescan, self.write_profile, self.copy_a_model,
        ]  # fmt: skip
        while True:
            deed = self.random.choice(deeds)
            try:
                deed()
            except (OSError, http.client.HTTPException, ValueError):
                return
            self.done[deed.__name__] += 1

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.agent.ask(method, path, body)
        if answer.status >= 400 and answer.status not in (404, 409, 503):
            self.refused.append(f"{method} {path}: {answer.status} {answer.body}")
        return answer

    def choose_tier(self) -> None:
        self.choose(self.random.choice(IDS), "tier", self.random.choice(TIERS))

    def choose_thinking(self) -> None:
        # False and null leave the tier alone, so that each promise is about one thing.
        self.choose(self.random.choice(IDS), "thinking", self.random.choice([None, False]))

    def enable(self) -> None:
        self.choose(self.random.choice(IDS), "enabled", self.random.choice([True, False]))

    def choose(self, model_id: str, what: str, value: Any) -> None:
        self.promises.asked((model_id, what), value)
        if self.ask("PUT", f"/api/models/{model_id}/{what}", {what: value}).status == 200:
            self.promises.answered((model_id, what), value)

    def choose_settings(self) -> None:
        model_id, size = self.random.choice(IDS), self.random.choice([None, 128, 256, 512])
        self.promises.asked((model_id, "ctxSize"), size)
        if self.ask("PUT", f"/api/models/{model_id}/settings", {"ctxSize": size, "nThreads": 1}).status == 200:
            self.promises.answered((model_id, "ctxSize"), size)

    def choose_port(self) -> None:
        model_id, port = self.random.choice(IDS), self.random.choice([None, self.agent.port_range[1]])
        self.ask("PUT", f"/api/models/{model_id}/port", {"port": port})

    def restart(self) -> None:
        self.act(self.random.choice(IDS), "restart", runs=True)

    def start(self) -> None:
        self.act(self.random.choice(IDS), "start", runs=True)

    def stop(self) -> None:
        self.act(self.random.choice(IDS), "stop", runs=False)

    def act(self, model_id: str, verb: str, *, runs: bool) -> None:
        self.promises.values.setdefault((model_id, "runs"), {False}).add(runs)
        if self.ask("POST", f"/api/models/servers/{model_id}/{verb}").status in (200, 202):
            self.promises.answered((model_id, "runs"), runs)

    def rescan(self) -> None:
        self.ask("POST", "/api/models/rescan")

    def write_profile(self) -> None:
        name = f"p{self.random.randrange(5)}"
        if self.ask("POST", "/api/models/profiles", {"name": name}).status == 409:
            self.ask("DELETE", f"/api/models/profiles/{name}")

    def copy_a_model(self) -> None:
        extra = self.models / f"{PREFIX}-guest.gguf"
        if extra.exists():
            extra.unlink()
        else:
            shutil.copyfile(self.models / f"{STEADY}.gguf", extra)


def llama_servers(folder: Path) -> dict[int, str]:
    """Every llama-server that serves a model of the folder, with the unit whose cgroup it is in."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text().strip() != "llama-server":
                continue
            if f"LLAMA_ARG_MODEL={folder}".encode() not in (process / "environ").read_bytes():
                continue
            groups = (process / "cgroup").read_text()
        except OSError:
            continue
        found[int(process.name)] = next(
            (part for part in groups.replace("\n", "/").split("/") if part.startswith("magi-llama-")), ""
        )
    return found


@pytest.mark.timeout(900)
def test_a_hundred_kills_lose_double_and_orphan_nothing(
    systemd_user: SystemdUser,
    tmp_path: Path,
    toy_model: MakeToyModel,
    unused_ports: PortRanges,
    llama_server: Path,
) -> None:
    models = tmp_path / "models"
    for seed, model_id in enumerate([STEADY, *IDS]):
        toy_model(models / f"{model_id}.gguf", name=f"Killed {seed}", seed=seed + 10)
    rng = random.Random(SEED)
    print(f"MAGI_TEST_SEED={SEED}")
    promises = Promises()
    person = Person(
        AgentProcess(tmp_path, models, unused_ports(8), llama_server), models, random.Random(SEED + 1), promises
    )
    agent = person.agent
    with ended(agent, PATTERN):
        agent.start()
        wait_until(lambda: not agent.ask("GET", "/health/ready").body["scanning"], "the first scan")
        agent.must("POST", f"/api/models/servers/{STEADY}/start?wait=60")
        steady_pid = unit_property(f"magi-llama-{STEADY}.service", "MainPID")
        agent.kill()
        for _ in range(KILLS):
            agent.spawn()
            if rng.random() < 0.8:
                # The other fifth is killed somewhere in its start.
                wait_until(agent.answers, "the agent answers", 30)
            life = threading.Thread(target=person.live)
            life.start()
            time.sleep(rng.uniform(0.0, 0.7))
            agent.kill()
            life.join(60)
            assert not life.is_alive()
            registry = json.loads((tmp_path / "state" / "model_registry.json").read_text())
            assert registry["version"] == 2
        (models / f"{PREFIX}-guest.gguf").unlink(missing_ok=True)
        agent.start()
        agent.wait_settled()
        agent.must("POST", "/api/models/rescan")

        assert person.refused == []
        listed = agent.must("GET", "/api/models/registry")["models"]
        assert sorted(listed) == sorted([STEADY, *IDS])
        ports = [model["port"] for model in listed.values() if model["port"] is not None]
        assert len(ports) == len(set(ports))
        keys = {"tier": "tierOverride", "thinking": "thinkingOverride", "enabled": "enabled", "ctxSize": "ctxSize"}
        for (model_id, what), allowed in promises.values.items():
            if what in keys:
                assert listed[model_id][keys[what]] in allowed, (model_id, what, allowed)

        def as_promised() -> bool:
            states = {
                server["modelId"]: server["state"] for server in agent.must("GET", "/api/models/servers")["servers"]
            }
            return all(
                (states.get(model_id, "stopped") == "ready") in allowed
                and states.get(model_id, "stopped") in ("ready", "stopped")
                for (model_id, what), allowed in promises.values.items()
                if what == "runs"
            )

        wait_until(as_promised, "what runs is what was asked for", 60)
        processes = llama_servers(models)
        active = [name for name, state in units(PATTERN).items() if state == "active"]
        assert sorted(processes.values()) == sorted(active)
        assert unit_property(f"magi-llama-{STEADY}.service", "MainPID") == steady_pid
        # Not before: what a server uses that has just come up may be being written down.
        assert agent.stop() == 0
        assert sorted(tmp_path.rglob(".*.tmp")) == []
    deeds = ("choose_tier", "enable", "choose_settings", "choose_port", "start", "stop", "restart", "rescan")
    assert all(person.done[deed] for deed in (*deeds, "copy_a_model"))


def test_a_restart_that_is_asked_of_an_agent_which_has_just_come_up_is_one(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> None:
    toy_model(tmp_path / "models" / f"{STEADY}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server)
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        pid = agent.must("POST", f"/api/models/servers/{STEADY}/start?wait=60")["server"]["pid"]
        for _ in range(3):
            agent.kill()
            agent.start()
            # It answers before it has looked at what runs.
            after = agent.must("POST", f"/api/models/servers/{STEADY}/restart?wait=60")["server"]
            assert (after["state"], after["pid"] != pid) == ("ready", True)
            pid = after["pid"]
