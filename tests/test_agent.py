"""The agent's life: how it starts, stops, dies and comes back, and what becomes of the models. All parts are real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import locations
import pytest

from magi_agent.servers.history import MESSAGE_ID
from tests.agent_process import AgentProcess, ended, remove_units, unit_property, units, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.fuse_mount import fuse_mount

AGENT = str(locations.VENV / "bin" / "magi-agent")
UNIT = "agent-life.service"
HANGING_SCAN = """\
import os
import threading

scandir = os.scandir


def hanging(path="."):
    if os.fspath(path).endswith("/models") and threading.current_thread().name == "scan":
        threading.Event().wait()
    return scandir(path)


os.scandir = hanging
"""
"""A scan that never comes back in the middle of a folder: no file system hangs at so exact a moment."""


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    """An agent that is not started yet, with two models: life-one and life-two."""
    toy_model(tmp_path / "models" / "life-one.gguf", name="One")
    toy_model(tmp_path / "models" / "life-two.gguf", name="Two")
    with ended(
        AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server), "magi-llama-life-*"
    ) as agent:
        yield agent


def scanned(agent: AgentProcess) -> bool:
    return not agent.ask("GET", "/health/ready").body["scanning"]


def server(agent: AgentProcess, model_id: str) -> dict[str, Any]:
    found: dict[str, Any] = agent.must("GET", f"/api/models/{model_id}")["server"]
    return found


def start(agent: AgentProcess) -> None:
    agent.start()
    wait_until(lambda: scanned(agent), "the first scan is through")


def settles_as(agent: AgentProcess, model_id: str, state: str) -> None:
    wait_until(lambda: server(agent, model_id)["state"] == state, f"{model_id} is {state}", 60)


@pytest.mark.parametrize("end", [AgentProcess.stop, AgentProcess.kill])
def test_a_model_outlives_the_agent_and_is_adopted(agent: AgentProcess, end: Callable[[AgentProcess], object]) -> None:
    start(agent)
    agent.must("PUT", "/api/models/life-one/enabled?apply=true", {"enabled": True})
    settles_as(agent, "life-one", "ready")
    before = server(agent, "life-one")
    invocation = unit_property(before["unit"], "InvocationID")

    end(agent)
    assert units("magi-llama-life-*") == {before["unit"]: "active"}
    start(agent)
    agent.wait_settled()

    after = server(agent, "life-one")
    assert (after["pid"], after["port"], after["state"]) == (before["pid"], before["port"], "ready")
    assert unit_property(before["unit"], "InvocationID") == invocation
    assert after["restartReasons"] == []


def test_a_stop_removes_the_socket_and_ends_with_status_0(agent: AgentProcess) -> None:
    start(agent)

    assert agent.stop() == 0
    assert not agent.socket.exists()


def test_a_killed_agents_socket_is_in_nobodys_way(agent: AgentProcess) -> None:
    start(agent)
    agent.kill()
    assert agent.socket.exists()

    start(agent)


def test_a_second_agent_on_the_same_state_refuses(agent: AgentProcess) -> None:
    start(agent)
    assert agent.process is not None
    second = subprocess.run(
        [AGENT, "--socket", str(agent.folder / "second.sock")],
        env=agent.environment(), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert second.returncode == 73
    assert f"another agent (process {agent.process.pid}) uses the state in {agent.folder / 'state'}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert scanned(agent)


def test_what_was_started_stays_wanted_and_what_was_stopped_stays_stopped(agent: AgentProcess) -> None:
    start(agent)
    for model_id in ("life-one", "life-two"):
        agent.must("PUT", f"/api/models/{model_id}/enabled?apply=true", {"enabled": True})
        settles_as(agent, model_id, "ready")
    agent.must("POST", "/api/models/servers/life-two/stop?wait=30")
    agent.kill()
    # What was wanted and went while nobody looked is started again; what was stopped is not.
    subprocess.run(["systemctl", "--user", "kill", "-s", "KILL", "magi-llama-life-one.service"], check=True)
    start(agent)
    agent.wait_settled()

    assert server(agent, "life-one")["state"] == "ready"
    assert server(agent, "life-two")["state"] == "stopped"


def test_in_a_new_boot_what_is_enabled_is_started(agent: AgentProcess) -> None:
    start(agent)
    agent.must("PUT", "/api/models/life-one/enabled", {"enabled": True})
    agent.must("POST", "/api/models/servers/life-two/start?wait=60")
    agent.must("POST", "/api/models/servers/stop-all?wait=60")
    agent.stop()
    desired = agent.folder / "state" / "desired.json"
    desired.write_text(json.dumps({**json.loads(desired.read_text()), "boot": "an earlier one"}))
    start(agent)
    agent.wait_settled()

    assert server(agent, "life-one")["state"] == "ready"
    assert server(agent, "life-two")["state"] == "stopped"


def test_what_is_started_as_the_agent_comes_up_has_the_active_profiles_settings(agent: AgentProcess) -> None:
    start(agent)
    profile = {"name": "short", "enabledModels": ["life-one"], "runtimeSettings": {"life-one": {"ctxSize": 128}}}
    agent.must("POST", "/api/models/profiles", profile)
    agent.must("POST", "/api/models/profiles/short/activate?wait=60")
    agent.must("POST", "/api/models/servers/life-one/stop?wait=60")
    agent.stop()
    # As if it had failed, or were not through yet, when the agent went.
    desired = agent.folder / "state" / "desired.json"
    desired.write_text(desired.read_text().replace('"run": false', '"run": true'))
    start(agent)
    agent.wait_settled()

    unit = server(agent, "life-one")["unit"]
    assert "--ctx-size 128" in unit_property(unit, "ExecStart")


def test_an_enabled_model_whose_file_comes_late_is_started(agent: AgentProcess) -> None:
    start(agent)
    agent.must("PUT", "/api/models/life-one/enabled", {"enabled": True})
    agent.stop()
    file, away = agent.models / "life-one.gguf", agent.folder / "life-one.gguf"
    file.rename(away)
    (agent.folder / "state" / "desired.json").unlink(missing_ok=True)
    start(agent)
    agent.wait_settled()
    assert agent.ask("GET", "/api/models/life-one").status == 404

    away.rename(file)
    wait_until(lambda: agent.ask("GET", "/api/models/life-one").status == 200, "it is listed again")
    settles_as(agent, "life-one", "ready")


def test_what_runs_and_nobody_spoke_about_is_adopted(agent: AgentProcess) -> None:
    start(agent)
    agent.must("POST", "/api/models/servers/life-one/start?wait=60")
    pid = server(agent, "life-one")["pid"]
    agent.kill()
    (agent.folder / "state" / "desired.json").unlink()
    start(agent)
    agent.wait_settled()

    assert (server(agent, "life-one")["pid"], server(agent, "life-one")["state"]) == (pid, "ready")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, as root")
def test_a_file_system_that_hangs_holds_up_neither_the_start_of_the_others_nor_the_stop(agent: AgentProcess) -> None:
    start(agent)
    agent.must("PUT", "/api/models/life-one/enabled", {"enabled": True})
    agent.stop()
    (agent.folder / "state" / "desired.json").unlink(missing_ok=True)
    with fuse_mount(agent.folder / "source", agent.models / "remote") as remote, remote.silent():
        agent.start()
        settles_as(agent, "life-one", "ready")
        health = agent.ask("GET", "/health/ready").body
        assert any(f"{remote.point}: it has not answered for" in problem for problem in health["problems"])
        assert agent.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, as root")
def test_profiles_on_a_file_system_that_hangs_hold_up_no_stop(agent: AgentProcess) -> None:
    with fuse_mount(agent.folder / "source", agent.folder / "profiles") as remote:
        start(agent)
        assert agent.must("GET", "/api/models/profiles") == []
        with remote.silent(), ThreadPoolExecutor() as threads:
            asked = threads.submit(agent.ask, "GET", "/api/models/profiles")
            with pytest.raises(TimeoutError):
                asked.result(1)
            assert agent.stop() == 0
            assert asked.exception(10) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts, as root")
def test_profiles_on_a_file_system_that_hangs_are_a_problem_that_holds_up_no_health(agent: AgentProcess) -> None:
    with fuse_mount(agent.folder / "source", agent.folder / "profiles") as remote:
        start(agent)
        assert agent.ask("GET", "/health/ready").body["problems"] == []
        with remote.silent():
            # More often than there are threads: each look must not cost one.
            for _ in range(3):
                with ThreadPoolExecutor(20) as threads:
                    asked = [threads.submit(agent.ask, "GET", "/health/ready") for _ in range(20)]
                    for each in asked:
                        assert each.result(20).body["problems"] == ["the profiles' folders have not answered for 2 s"]
            agent.must("PUT", "/api/models/life-one/tier", {"tier": "fast"})
        wait_until(lambda: agent.ask("GET", "/health/ready").body["problems"] == [], "it is mended")
        assert agent.stop() == 0


def test_a_first_scan_that_hangs_holds_up_nothing_but_what_it_finds(agent: AgentProcess) -> None:
    start(agent)
    agent.must("PUT", "/api/models/life-one/enabled", {"enabled": True})
    agent.stop()
    (agent.folder / "state" / "desired.json").unlink(missing_ok=True)
    (agent.folder / "sitecustomize.py").write_text(HANGING_SCAN)
    agent.settings["PYTHONPATH"] = str(agent.folder)
    agent.start()
    health = agent.ask("GET", "/health/ready")
    assert (health.status, health.body["status"]) == (503, "not_ready")
    assert "the first scan is still under way" in health.body["problems"]
    settles_as(agent, "life-one", "ready")
    health = agent.ask("GET", "/health/ready")
    assert (health.status, health.body["scanning"]) == (200, True)
    assert agent.stop() == 0


class TestActiveProfile:
    @staticmethod
    def write(agent: AgentProcess, name: str, *models: str) -> None:
        path = agent.folder / "profiles" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"profile: {{name: {name}}}\nenabled_models: [{', '.join(models)}]\n")

    def test_it_is_applied_at_the_first_start_and_nobodys_later_choice_is_undone(self, agent: AgentProcess) -> None:
        self.write(agent, "mine", "life-one")
        agent.settings["ACTIVE_PROFILE"] = "mine"
        start(agent)
        settles_as(agent, "life-one", "ready")
        agent.must("PUT", "/api/models/life-one/enabled?apply=true", {"enabled": False})
        agent.must("PUT", "/api/models/life-two/enabled?apply=true", {"enabled": True})
        settles_as(agent, "life-two", "ready")
        agent.stop()
        start(agent)
        agent.wait_settled()

        models = agent.must("GET", "/api/models/registry")["models"]
        assert {name: model["enabled"] for name, model in models.items()} == {"life-one": False, "life-two": True}
        assert agent.ask("GET", "/health/ready").body["activeProfile"] == "mine"

    def test_a_changed_value_is_applied_as_a_difference(self, agent: AgentProcess) -> None:
        self.write(agent, "first", "life-one")
        self.write(agent, "both", "life-one", "life-two")
        agent.settings["ACTIVE_PROFILE"] = "first"
        start(agent)
        settles_as(agent, "life-one", "ready")
        pid = server(agent, "life-one")["pid"]
        agent.stop()
        agent.settings["ACTIVE_PROFILE"] = "both"
        start(agent)
        settles_as(agent, "life-two", "ready")

        assert server(agent, "life-one")["pid"] == pid

    def test_one_that_is_not_there_is_a_warning_not_a_refusal(self, agent: AgentProcess) -> None:
        agent.settings["ACTIVE_PROFILE"] = "nowhere"
        start(agent)
        agent.wait_settled()
        health = agent.ask("GET", "/health/ready").body

        assert any("nowhere" in problem for problem in health["problems"])


def test_an_earlier_magis_registry_is_carried_over(agent: AgentProcess) -> None:
    registry = agent.folder / "state" / "model_registry.json"
    registry.parent.mkdir()
    old = {
        "file_path": str(agent.models / "life-one.gguf"), "filename": "life-one.gguf", "family": "llama",
        "tier_override": "powerful", "thinking_override": True, "enabled": True, "port": agent.port_range[1],
        "ctx_size": 256,
    }  # fmt: skip
    registry.write_text(json.dumps({"models": {"llama_one_q4": old}, "scan_path": str(agent.models)}))
    agent.settings["ACTIVE_PROFILE"] = "development"
    TestActiveProfile.write(agent, "development")
    start(agent)
    settles_as(agent, "life-one", "ready")

    model = agent.must("GET", "/api/models/life-one")
    chosen = {name: model[name] for name in ("tierOverride", "thinkingOverride", "enabled", "port", "ctxSize")}
    assert chosen == {
        "tierOverride": "powerful", "thinkingOverride": True, "enabled": True, "port": agent.port_range[1],
        "ctxSize": 256,
    }  # fmt: skip
    assert agent.must("GET", "/api/models/llama_one_q4")["modelId"] == "life-one"
    assert [path.name for path in registry.parent.iterdir() if ".v1-" in path.name] != []


def test_the_agent_comes_up_without_systemd_and_works_once_it_is_there(
    agent: AgentProcess, systemd_user: SystemdUser
) -> None:
    bus = agent.folder / "bus"
    agent.settings["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={bus}"
    agent.start()
    answer = agent.ask("POST", "/api/models/servers/life-one/start")
    assert (answer.status, answer.body["error"]) in {(503, "ServiceUnavailable"), (404, "ModelNotFound")}
    assert agent.ask("GET", "/health/ready").status == 503
    assert agent.must("GET", "/api/models/profiles") == []

    bus.symlink_to(systemd_user.bus_address.removeprefix("unix:path="))
    wait_until(lambda: scanned(agent), "it settles")
    agent.must("POST", "/api/models/servers/life-one/start?wait=60")
    settles_as(agent, "life-one", "ready")


def test_the_bus_is_cut_and_everything_goes_on(agent: AgentProcess) -> None:
    start(agent)
    agent.must("POST", "/api/models/servers/life-one/start?wait=60")
    pid = server(agent, "life-one")["pid"]
    for _ in range(3):
        subprocess.run(["systemctl", "--user", "kill", "-s", "KILL", "dbus.service"], check=True)
        wait_until(lambda: agent.ask("GET", "/health/ready").body["systemdConnected"], "it is connected again")
    agent.must("POST", "/api/models/servers/life-two/start?wait=60")

    assert (server(agent, "life-one")["pid"], server(agent, "life-one")["state"]) == (pid, "ready")
    assert server(agent, "life-two")["state"] == "ready"


class TestAsAUnit:
    """As systemd runs it: notifications, watchdog, journal."""

    @pytest.fixture
    def unit(self, agent: AgentProcess) -> Iterator[AgentProcess]:
        names = ("MAGI_", "MODEL_", "REGISTRY_", "PROFILES_", "LLAMA_", "ACTIVE_", "XDG_RUNTIME_DIR", "DBUS_")
        variables = [
            f"--setenv={name}={value}" for name, value in agent.environment().items() if name.startswith(names)
        ]
        run = ["systemd-run", "--user", "--quiet", "--unit", UNIT, "-p", "Type=notify", "-p", "WatchdogSec=2"]
        subprocess.run(
            [*run, "-p", "TimeoutStartSec=30", "-p", "WatchdogSignal=KILL", *variables, AGENT], check=True, timeout=60
        )
        wait_until(lambda: scanned(agent), "the first scan is through")
        yield agent
        remove_units(UNIT)

    @staticmethod
    def entries(systemd_user: SystemdUser, *matches: str) -> list[dict[str, Any]]:
        command = [
            "journalctl",
            "-D",
            str(systemd_user.journal),
            "-o",
            "json",
            "SYSLOG_IDENTIFIER=magi-agent",
            *matches,
        ]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def test_it_says_ready_and_how_things_are(self, unit: AgentProcess) -> None:
        # systemd-run came back, so READY was said.
        assert unit.ask("GET", "/health/live").status == 200
        wait_until(lambda: unit_property(UNIT, "StatusText") == "2 models; 0 of 0 servers ready", "the status is told")
        unit.must("POST", "/api/models/servers/life-one/start?wait=60")
        wait_until(lambda: unit_property(UNIT, "StatusText") == "2 models; 1 of 1 servers ready", "it is told anew")

    @pytest.mark.usefixtures("unit")
    def test_the_watchdog_ends_it_when_its_loop_does_not_turn(self) -> None:
        pid = int(unit_property(UNIT, "MainPID"))
        # It is alive for longer than the watchdog waits.
        wait_until(lambda: int(unit_property(UNIT, "WatchdogTimestampMonotonic") or 0) > 0, "the watchdog runs")
        os.kill(pid, signal.SIGSTOP)

        wait_until(lambda: unit_property(UNIT, "Result") == "watchdog", "the watchdog sees it")

    def test_its_log_is_structured(self, unit: AgentProcess, systemd_user: SystemdUser) -> None:
        unit.must("POST", "/api/models/servers/life-one/start?wait=60")

        [entry] = wait_until(
            lambda: self.entries(systemd_user, "MAGI_MODEL=life-one", "PRIORITY=6", f"_SYSTEMD_USER_UNIT={UNIT}"),
            "the journal has it",
        )[-1:]
        assert "life-one is ready" in entry["MESSAGE"]
        assert entry["LOGGER"] == "magi_agent.history"
        assert entry["MESSAGE_ID"] == MESSAGE_ID
        assert entry["MAGI_EVENT"] == "ready"
        assert len(entry["MAGI_INVOCATION"]) == 32

    def test_what_a_request_did_is_found_by_its_id(self, unit: AgentProcess, systemd_user: SystemdUser) -> None:
        answer = unit.ask("POST", "/api/models/rescan")

        [entry] = wait_until(
            lambda: self.entries(systemd_user, f"MAGI_REQUEST_ID={answer.headers['x-request-id']}"), "it is there"
        )
        assert entry["MESSAGE"].startswith("POST /api/models/rescan: 200 in ")

    def test_it_stops_cleanly(self, unit: AgentProcess) -> None:
        unit.must("POST", "/api/models/servers/life-one/start?wait=60")
        subprocess.run(["systemctl", "--user", "stop", UNIT], check=True, timeout=60)

        assert unit_property("magi-llama-life-one.service", "ActiveState") == "active"
        assert unit_property(UNIT, "Result") in ("success", "")


class TestCommandLine:
    @staticmethod
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "MAGI_CONFIG": "/dev/null", **variables}
        return subprocess.run(
            [AGENT, *arguments], env=environment, capture_output=True, text=True, timeout=30, check=False
        )

    def test_check_shows_what_holds(self) -> None:
        checked = self.run("--check", "--tcp", "127.0.0.1:9999", MAGI_PORT_RANGE="9000-9010")

        assert checked.returncode == 0
        lines = {line.split()[0]: line.split()[1] for line in checked.stdout.splitlines()[1:]}
        assert lines["api.tcp"] == "127.0.0.1:9999"
        assert lines["servers.port_range"] == "9000-9010"
        assert lines["discovery.model_scan_path"] == "/models"

    def test_a_bad_value_stops_the_start_with_one_line(self) -> None:
        refused = self.run("--port-range", "9010-9000")

        assert refused.returncode == 78
        assert refused.stderr == (
            "magi-agent: --port-range: must be two ports from 1 to 65535, the lower first, such as '8080-8099', "
            "not '9010-9000'\n"
        )

    def test_a_socket_unit_has_it_started_again_no_faster_than_each_second(self) -> None:
        began = time.monotonic()

        refused = self.run("--port-range", "no", LISTEN_FDS="1")

        assert refused.returncode == 78
        assert time.monotonic() - began > 1.0

    def test_an_unknown_key_is_named_with_its_place(self, tmp_path: Path) -> None:
        config = tmp_path / "agent.toml"
        config.write_text("[api]\n\ntpc = 'off'\n")
        refused = self.run("--config", str(config), "--check")

        assert refused.returncode == 78
        assert f"{config}:3: api.tpc: unknown key; [api] has " in refused.stderr

    def test_the_shipped_configuration_is_valid_and_says_the_defaults(self, tmp_path: Path) -> None:
        text = (locations.CHECKOUT / "etc" / "agent.toml").read_text()
        config = tmp_path / "agent.toml"
        # What the last section shows are examples: its defaults are not to say anything.
        keys, _, examples = text.partition("[defaults]")
        config.write_text(re.sub(r"^#(?=\w+ = )", "", keys, flags=re.MULTILINE))

        assert self.run("--check", "--config", str(config)).stdout == self.run("--check").stdout
        lines = [line.removeprefix("#") for line in examples.splitlines() if " = " in line or line.startswith("#[")]
        config.write_text("\n".join(["[defaults]", *lines]))
        shown = self.run("--check", "--config", str(config)).stdout
        assert all(f"defaults.{name} " in shown for name in ("ctx_size", "flash_attention", "fast.parallel_slots"))

    def test_an_unknown_option_is_a_usage_error(self) -> None:
        assert self.run("--frobnicate").returncode == 2

    def test_help_names_every_setting_with_its_variable(self) -> None:
        text = self.run("--help").stdout

        assert "--model-scan-path" in text
        assert "$MODEL_SCAN_PATH" in text
        assert "$MAGI_SYSTEMD_SCOPE" in text


def test_ctrl_c_ends_it_as_a_stop_does(agent: AgentProcess) -> None:
    start(agent)
    process, agent.process = agent.process, None
    assert process is not None
    process.send_signal(signal.SIGINT)

    assert process.wait(30) == 0
