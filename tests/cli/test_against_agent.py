"""Every command of `magictl` against a real agent, with toy models on a real systemd."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent_process import AgentProcess, ended, units, wait_until
from tests.cli.terminal import MAGICTL, on_terminal, piped, surroundings
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.servers.freezer import frozen

PREFIX = "cli-agent"
CHAT, DRAFT, BROKEN = f"{PREFIX}-chat", f"{PREFIX}-draft", f"{PREFIX}-broken"
PATTERN = f"magi-llama-{PREFIX}-*.service"


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    toy_model: MakeToyModel,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("cli-agent")
    models = folder / "models"
    toy_model(models / f"{CHAT}.gguf")
    toy_model(models / f"{DRAFT}.gguf", name="draft", seed=2)
    broken = toy_model(models / f"{BROKEN}.gguf", name="broken", seed=3)
    broken.write_bytes(broken.read_bytes()[:200_000])
    first, last = unused_ports(5)
    settings = {"MAGI_TCP": f"127.0.0.1:{last}", "MAGI_TCP_ACCESS": "read", "MAGI_STOP_TIMEOUT": "2"}
    agent = AgentProcess(folder, models, (first, last - 1), llama_server, settings)
    with ended(agent, PATTERN):
        agent.start()
        agent.wait_settled()
        yield agent


@pytest.fixture
def agent(service: AgentProcess) -> Iterator[AgentProcess]:
    """The agent with nothing chosen and nothing running, before and after."""
    yield service
    for model_id in (CHAT, DRAFT):
        service.must("PUT", f"/api/models/{model_id}/enabled", {"enabled": False})
    wait_until(
        lambda: service.must("POST", "/api/models/servers/stop-all?wait=30")["status"] == "succeeded", "all stopped"
    )


@pytest.fixture
def environment(agent: AgentProcess) -> dict[str, str]:
    return surroundings(MAGI_SOCKET=str(agent.socket))


def choices(agent: AgentProcess) -> dict[str, Any]:
    names = ("tierOverride", "thinkingOverride", "enabled", "port", "effectiveTier", "runtimeSettings")
    models = agent.must("GET", "/api/models/registry")["models"]
    return {model_id: [model[name] for name in names] for model_id, model in models.items()}


def test_models_and_scan_list_the_same(agent: AgentProcess, environment: dict[str, str]) -> None:
    listed = json.loads(piped("models", "--json", environment=environment).stdout)["models"]
    scanned = json.loads(piped("scan", str(agent.models), "--json").stdout)["models"]

    assert listed.keys() == {CHAT, DRAFT, BROKEN}
    given = {"port", "enabled"}
    for model_id, model in listed.items():
        assert list(model) == list(scanned[model_id])
        assert {key: value for key, value in model.items() if key not in given} == {
            key: value for key, value in scanned[model_id].items() if key not in given
        }
    table = piped("models", environment=environment)
    assert table.returncode == 0
    assert f"1 problem\n  {BROKEN}: " in table.stdout


def test_a_model_is_enabled_started_watched_and_stopped(agent: AgentProcess, environment: dict[str, str]) -> None:
    enabled = piped("enable", CHAT, environment=environment)
    assert (enabled.returncode, enabled.stdout) == (
        0, f"✓ {CHAT} enabled; it does not run yet: magictl start {CHAT}\n"
    )  # fmt: skip

    started = piped("start", CHAT, environment=environment)
    assert started.returncode == 0, started.stderr
    assert re.fullmatch(rf"✓ {CHAT} ready on port \d+ \(\d+\.\d s\)\n", started.stdout)
    assert units(PATTERN)[f"magi-llama-{CHAT}.service"] == "active"

    again = piped("start", CHAT, environment=environment)
    assert again.stdout.endswith(" (was already)\n")

    [server] = json.loads(piped("servers", "--json", environment=environment).stdout)["servers"]
    assert (server["modelId"], server["state"], server["isReady"]) == (CHAT, "ready", True)
    row = piped("servers", environment=environment).stdout.splitlines()[1].split()
    assert row[:4] == [CHAT, "ready", str(server["port"]), str(server["pid"])]

    status = piped("status", environment=environment).stdout
    assert "health   ready\n" in status
    assert "models   3 found, 1 enabled, 1 not usable" in status
    assert CHAT in status

    restarted = piped("restart", CHAT, environment=environment)
    assert restarted.returncode == 0, restarted.stderr
    [after] = json.loads(piped("servers", "--json", environment=environment).stdout)["servers"]
    assert after["pid"] != server["pid"]

    disabled = piped("disable", CHAT, environment=environment)
    assert disabled.stdout == f"✓ {CHAT} disabled; it still runs: magictl stop {CHAT}\n"
    stopped = piped("stop", CHAT, environment=environment)
    assert stopped.returncode == 0
    assert stopped.stdout.startswith(f"✓ {CHAT} stopped (")
    assert units(PATTERN).get(f"magi-llama-{CHAT}.service", "inactive") != "active"


def test_now_does_both_and_all_means_all(agent: AgentProcess, environment: dict[str, str]) -> None:
    both = piped("enable", CHAT, DRAFT, "--now", environment=environment)
    assert both.returncode == 0, both.stderr
    assert [line.split()[2] for line in both.stdout.splitlines()] == ["enabled", "enabled", "ready", "ready"]

    stopped = piped("stop", "--all", environment=environment)
    assert (stopped.returncode, stopped.stdout) == (0, f"✓ {CHAT} stopped\n✓ {DRAFT} stopped\n")
    started = piped("start", "--all", environment=environment)
    assert (started.returncode, started.stdout) == (0, f"✓ {CHAT} ready\n✓ {DRAFT} ready\n")

    off = piped("disable", CHAT, DRAFT, "--now", environment=environment)
    assert off.returncode == 0, off.stderr
    assert [line.split()[2] for line in off.stdout.splitlines()] == ["disabled", "disabled", "stopped", "stopped"]


def test_the_log_is_that_of_the_llama_server(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("start", CHAT, environment=environment).returncode == 0

    log = piped("logs", CHAT, "-n", "1000", environment=environment)

    assert log.returncode == 0
    assert log.stderr == ""
    assert "model loaded" in log.stdout or "server is listening" in log.stdout
    asked = piped("logs", CHAT, "-n", "3", "--json", environment=environment)
    entries = [json.loads(line) for line in asked.stdout.splitlines()]
    assert len(entries) == 3
    # Fifty where nobody says how many; a server that has just been started may have written less.
    assert 3 < len(piped("logs", CHAT, "--json", environment=environment).stdout.splitlines()) <= 50
    assert {entry["source"] for entry in entries} <= {"server", "systemd"}


def test_a_model_that_cannot_be_used_is_refused(agent: AgentProcess, environment: dict[str, str]) -> None:
    for command in ("start", "enable"):
        told = piped(command, BROKEN, environment=environment)

        assert told.returncode == 1
        assert told.stdout == ""
        assert BROKEN in told.stderr


def test_an_unknown_id_gets_a_suggestion(agent: AgentProcess, environment: dict[str, str]) -> None:
    for command in ("start", "stop", "restart", "enable", "disable", "logs"):
        told = piped(command, "cli-agent-cha", environment=environment)

        assert told.returncode == 4
        assert told.stderr == f"magictl: no model has the id 'cli-agent-cha'; did you mean {CHAT}?\n"


def test_rescan_finds_what_was_put_there(
    agent: AgentProcess, environment: dict[str, str], toy_model: MakeToyModel
) -> None:
    new = toy_model(agent.models / f"{PREFIX}-new.gguf", name="new", seed=9)
    try:
        told = piped("rescan", environment=environment)
        assert told.returncode == 0
        assert told.stdout.startswith("✓ 4 models found, ")
        assert f"{PREFIX}-new" in piped("models", environment=environment).stdout
    finally:
        new.unlink()
        assert piped("rescan", environment=environment).stdout.startswith("✓ 3 models found, ")


@pytest.mark.parametrize("running", [False, True])
def test_check_passes_and_leaves_everything_as_it_was(
    agent: AgentProcess, environment: dict[str, str], running: bool
) -> None:
    if running:
        assert piped("enable", CHAT, "--now", environment=environment).returncode == 0
    agent.must("PUT", f"/api/models/{DRAFT}/tier", {"tier": "balanced"})
    before, profiles, units_before = choices(agent), agent.must("GET", "/api/models/profiles"), units(PATTERN)
    servers = agent.must("GET", "/api/models/servers")["servers"]

    told = piped("check", environment=environment)
    as_json = json.loads(piped("check", "--json", environment=environment).stdout)

    assert told.returncode == 0, told.stdout
    assert "✗" not in told.stdout
    assert as_json["failed"] == 0
    # Without a profile called development, of it only the 404 can be checked.
    assert (as_json["passed"], as_json["skipped"]) == (10, 1)
    assert as_json["checks"][3]["result"] == "skipped"
    assert choices(agent) == before
    assert agent.must("GET", "/api/models/profiles") == profiles
    assert units(PATTERN) == units_before
    after = agent.must("GET", "/api/models/servers")["servers"]
    assert [(one["modelId"], one["pid"]) for one in after] == [(one["modelId"], one["pid"]) for one in servers]
    agent.must("PUT", f"/api/models/{DRAFT}/tier", {"tier": None})


def test_check_passes_whole_where_the_profile_development_is(agent: AgentProcess, environment: dict[str, str]) -> None:
    agent.must("POST", "/api/models/profiles", {"name": "development"})
    try:
        told = piped("check", environment=environment)
    finally:
        agent.must("DELETE", "/api/models/profiles/development")

    assert told.returncode == 0, told.stdout
    assert told.stdout.splitlines()[-4:] == [
        "Total      11", "Passed     11", "Failed      0", "Rate      100 %"
    ]  # fmt: skip


def test_over_tcp_one_may_read_and_is_told_what_one_may_not(agent: AgentProcess) -> None:
    environment = surroundings(MAGI_URL=agent.settings["MAGI_TCP"])
    before = choices(agent)

    listed, started = piped("models", environment=environment), piped("start", CHAT, environment=environment)
    checked = piped("check", environment=environment)

    assert listed.returncode == 0
    assert CHAT in listed.stdout
    assert started.returncode == 1
    assert "unix socket" in started.stderr
    assert checked.returncode == 1
    assert "Passed      4\nFailed      6\nSkipped     1\n" in checked.stdout
    assert "read access only by" in checked.stderr
    assert "put back" not in checked.stdout + checked.stderr
    assert choices(agent) == before


def test_check_interrupted_at_random_moments_leaves_every_choice(
    agent: AgentProcess, environment: dict[str, str]
) -> None:
    before, profiles = choices(agent), agent.must("GET", "/api/models/profiles")
    for lines in range(2, 14, 2):
        with subprocess.Popen(
            [str(MAGICTL), "check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)

        assert choices(agent) == before
        assert agent.must("GET", "/api/models/profiles") == profiles


def test_on_a_terminal_a_start_is_watched(agent: AgentProcess, environment: dict[str, str]) -> None:
    with on_terminal("start", CHAT, environment=environment) as terminal:
        assert terminal.end() == 0

    assert f"✓ {CHAT} ready on port " in terminal.text
    assert terminal.output.endswith("\r\n")


def test_a_server_that_survives_sigkill_is_said_everywhere(agent: AgentProcess, environment: dict[str, str]) -> None:
    assert piped("start", CHAT, DRAFT, environment=environment).returncode == 0
    pid = agent.must("GET", f"/api/models/{CHAT}")["server"]["pid"]
    said = f"it survived SIGKILL: process {pid} (llama-server, state D"
    with frozen(pid):
        stopped = piped("stop", CHAT, environment=environment)
        assert (stopped.returncode, said in stopped.stderr) == (1, True), stopped.stderr
        assert f"sudo cat /proc/{pid}/stack" in " ".join(stopped.stderr.split())
        status = " ".join(piped("status", environment=environment).stdout.split())
        assert f"problems: server of {CHAT}: {said}" in status
        assert f"{CHAT} stuck" in status
        assert f"sudo cat /proc/{pid}/stack" in status
        answer = agent.ask("POST", f"/api/models/servers/{CHAT}/restart?wait=30")
        assert (answer.status, answer.body["error"]) == (500, "StopFailed")
        health = agent.ask("GET", "/health/ready")
        assert (health.status, health.body["serversWanted"], health.body["missing"]) == (503, 2, {CHAT: "stuck"})
        figures = agent.ask("GET", "/metrics").body
        assert f'magi_server_state{{model="{CHAT}",state="stuck"}} 1' in figures
    wait_until(lambda: agent.must("GET", f"/api/models/{CHAT}")["server"]["state"] == "ready", "it is started anew")
    assert agent.ask("GET", "/health/ready").status == 200


def test_an_agent_that_is_down_is_said(service: AgentProcess) -> None:
    environment = surroundings(MAGI_SOCKET=str(service.folder / "nowhere.sock"))
    for command in (["status"], ["models"], ["start", CHAT], ["check"], ["logs", CHAT], ["history", CHAT]):
        told = piped(*command, environment=environment)

        assert told.returncode == 3
        assert "is the agent up? systemctl status magi-agent" in told.stderr
