"""An agent that starts nothing itself, beside a launcher that systemd starts when it is asked for."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, ended, unit_property, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

PREFIX = "lagent"
LAUNCHER = "magi-test-launcher"


def systemctl(*arguments: str) -> str:
    return subprocess.run(
        ["systemctl", "--user", *arguments], capture_output=True, text=True, timeout=60, check=False
    ).stdout.strip()


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    toy_model(tmp_path / "models" / f"{PREFIX}-one.gguf")
    path = tmp_path / "launcher.sock"
    agent = AgentProcess(
        tmp_path, tmp_path / "models", unused_ports(4), llama_server, {"MAGI_LAUNCHER_SOCKET": str(path)}
    )
    ours = {name: value for name, value in agent.environment().items() if name.isupper() and "MAGI" in name}
    ours |= {name: agent.environment()[name] for name in ("MODEL_SCAN_PATH", "REGISTRY_PATH", "LLAMA_SERVER_PATH")}
    subprocess.run(
        [
            "systemd-run", "--user", f"--unit={LAUNCHER}", f"--socket-property=ListenStream={path}",
            "--socket-property=SocketMode=0600", f"--property=Environment=STATE_DIRECTORY={tmp_path}/launcher",
            f"--property=Environment=PYTHONPATH={Path.cwd()}", "--property=StartLimitIntervalSec=0",
            *(f"--property=Environment={name}={value}" for name, value in ours.items()),
            sys.executable, "-m", "magi_agent.cli.launcher",
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(systemctl, "reset-failed", f"{LAUNCHER}.service")
        stack.callback(systemctl, "stop", f"{LAUNCHER}.socket", f"{LAUNCHER}.service")
        stack.enter_context(ended(agent, f"magi-llama-{PREFIX}-*"))
        yield agent


def test_models_are_run_as_ever_and_the_launcher_may_go_meanwhile(agent: AgentProcess) -> None:
    model_id = f"{PREFIX}-one"
    agent.start()
    agent.wait_settled()
    assert agent.must("POST", f"/api/models/servers/{model_id}/start?wait=60")["server"]["state"] == "ready"
    assert systemctl("is-active", f"{LAUNCHER}.service") == "active"
    pid = unit_property(f"magi-llama-{model_id}.service", "MainPID")

    systemctl("kill", "--signal=SIGKILL", f"{LAUNCHER}.service")
    wait_until(lambda: systemctl("is-active", f"{LAUNCHER}.service") == "failed", "the launcher is gone")
    agent.kill()
    agent.start()
    agent.wait_settled()
    server = agent.must("GET", f"/api/models/{model_id}")["server"]
    assert (server["state"], str(server["pid"]), server["restartReasons"]) == ("ready", pid, [])

    agent.must("PUT", f"/api/models/{model_id}/settings", {"ctxSize": 256})
    reasons = agent.must("GET", f"/api/models/{model_id}")["server"]["restartReasons"]
    assert [reason.partition(":")[0] for reason in reasons] == ["ctx-size"]
    assert agent.must("POST", f"/api/models/servers/{model_id}/restart?wait=60")["server"]["state"] == "ready"
    assert systemctl("is-active", f"{LAUNCHER}.service") == "active"
    assert agent.must("POST", f"/api/models/servers/{model_id}/stop?wait=60")["server"]["state"] == "stopped"


def test_without_a_launcher_the_agent_says_what_to_look_at(agent: AgentProcess) -> None:
    systemctl("stop", f"{LAUNCHER}.socket", f"{LAUNCHER}.service")
    agent.start()
    agent.wait_settled()
    answer = agent.ask("POST", f"/api/models/servers/{PREFIX}-one/start?wait=10")
    shown = agent.must("GET", f"/api/models/{PREFIX}-one")["server"]
    assert "magi-launcher.socket" in f"{answer.body} {shown['failure']}"


def test_a_stop_that_nobody_can_carry_out_is_said_and_tried_again(agent: AgentProcess) -> None:
    model_id = f"{PREFIX}-one"
    agent.start()
    agent.wait_settled()
    agent.must("POST", f"/api/models/servers/{model_id}/start?wait=60")
    path = Path(agent.settings["MAGI_LAUNCHER_SOCKET"])
    path.rename(path.with_suffix(".hidden"))

    for verb in ("stop", "restart"):
        answer = agent.ask("POST", f"/api/models/servers/{model_id}/{verb}?wait=30")
        assert (answer.status, answer.body["error"]) == (500, "StopFailed")
        assert "it cannot be stopped, which is tried again: the launcher cannot be reached" in answer.body["message"]
        shown = agent.must("GET", f"/api/models/{model_id}")["server"]
        assert shown["failure"]["result"] == "stop-error"
        problems = agent.ask("GET", "/health/ready").body["problems"]
        assert [problem for problem in problems if problem.startswith(f"server of {model_id}: it cannot be stopped")]

    said = agent.log.read_text().count(f"server of {model_id}: it cannot be stopped")
    assert said == 2, "once each time that somebody wished for it, however often it is tried"
    path.with_suffix(".hidden").rename(path)
    wait_until(lambda: agent.ask("GET", "/health/ready").body["problems"] == [], "what was asked last is done", 20)
    after = agent.must("GET", f"/api/models/{model_id}")["server"]
    assert after["pid"] != shown["pid"]


def test_a_launcher_that_cannot_read_its_configuration_says_so_and_no_fault_stays(agent: AgentProcess) -> None:
    model_id = f"{PREFIX}-one"
    agent.start()
    agent.wait_settled()
    agent.must("POST", f"/api/models/servers/{model_id}/start?wait=60")
    systemctl("stop", f"{LAUNCHER}.service")
    systemctl("set-environment", "MAGI_LOG_LEVEL=loud")
    try:
        for _ in range(8):  # more often than systemd lets a unit fail by default
            answer = agent.ask("POST", f"/api/models/servers/{model_id}/stop?wait=30")
            assert answer.body["error"] == "StopFailed"
            assert "MAGI_LOG_LEVEL" in answer.body["message"]
    finally:
        systemctl("unset-environment", "MAGI_LOG_LEVEL")
    assert agent.must("POST", f"/api/models/servers/{model_id}/stop?wait=30")["server"]["state"] == "stopped"
