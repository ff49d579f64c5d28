"""What may happen on a host at any time, and who may not notice."""

from __future__ import annotations

import functools

import pytest

from tests.system.asking import clients_of
from tests.system.host import Host, unit_of

_AGENT = "magi-agent.service"
_LAUNCHER = "magi-launcher.service"


def _wait_for_another_agent(host: Host, than: int, within: float) -> None:
    host.until(lambda: host.main_pid(_AGENT) not in {0, than}, "another agent runs", within)


@pytest.mark.parametrize("how", ["kill --signal=KILL", "restart", "stop"], ids=["killed", "restarted", "stopped"])
def test_the_agent_goes_and_nobody_notices(serving: Host, how: str) -> None:
    server = serving.main_pid(unit_of("toy"))
    url = serving.until_ready("toy", within=5)["url"]
    with clients_of(serving) as clients:
        agent = serving.main_pid(_AGENT)
        serving.run("systemctl", *how.split(), _AGENT)
        assert serving.answers(url)
        # Also where it was stopped: whoever connects has it started.
        _wait_for_another_agent(serving, agent, within=10)
        serving.until_ready("toy", within=15)
        clients.nobody_was_refused(broken=1)
    assert serving.main_pid(unit_of("toy")) == server


def test_the_launcher_goes_and_the_next_start_brings_another(serving: Host) -> None:
    serving.must("POST", "/api/models/servers/toy/restart?wait=30", within=35)
    launcher = serving.main_pid(_LAUNCHER)
    assert launcher
    for how in ("stop", "kill --signal=KILL"):
        serving.run("systemctl", *how.split(), _LAUNCHER)
        server = serving.main_pid(unit_of("toy"))
        serving.must("POST", "/api/models/servers/toy/restart?wait=30", within=35)
        serving.until_ready("toy", within=10)
        assert serving.main_pid(unit_of("toy")) != server
        assert serving.main_pid(_LAUNCHER) not in {0, launcher}


def test_an_agent_whose_loop_is_blocked_is_ended_by_the_watchdog(serving: Host) -> None:
    # What is shipped is longer than a test should take; that there is something is what counts.
    assert serving.property(_AGENT, "WatchdogUSec") not in {"0", "infinity"}
    serving.write(f"/etc/systemd/system/{_AGENT}.d/soon.conf", "[Service]\nWatchdogSec=3\n")
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "restart", _AGENT)
    serving.until_ready("toy", within=20)
    server = serving.main_pid(unit_of("toy"))

    agent = serving.main_pid(_AGENT)
    serving.run("kill", "-STOP", str(agent))
    _wait_for_another_agent(serving, agent, within=30)

    serving.until_ready("toy", within=15)
    assert "Watchdog timeout" in serving.journal(f"--unit={_AGENT}", "--boot")
    assert serving.main_pid(unit_of("toy")) == server


def test_systemd_reads_its_units_again_at_any_moment(serving: Host) -> None:
    arguments = serving.output("ps", "-o", "args=", "-p", str(serving.main_pid(unit_of("toy"))))
    with serving.background("reload_often") as reloading:
        for _ in range(3):
            serving.must("POST", "/api/models/servers/toy/stop?wait=30", within=35)
            serving.must("POST", "/api/models/servers/toy/start?wait=30", within=35)
            serving.until_ready("toy", within=10)
        server = serving.main_pid(unit_of("toy"))
        serving.run("kill", "-KILL", str(server))
        serving.until(lambda: serving.main_pid(unit_of("toy")) not in {0, server}, "systemd starts it again", 20)
        serving.until_ready("toy", within=20)
        serving.run("systemctl", "restart", _AGENT)
        serving.until_ready("toy", within=20)
        assert reloading.count("reloaded") > 10
        reloading.stop()
    server = serving.main_pid(unit_of("toy"))
    assert serving.output("ps", "-o", "args=", "-p", str(server)) == arguments

    serving.run("systemctl", "daemon-reexec")
    serving.insist("POST", "/api/models/servers/toy/restart?wait=30", within=40)
    serving.until_ready("toy", within=10)
    assert serving.main_pid(unit_of("toy")) != server


@pytest.mark.parametrize("how", ["restart", "kill --signal=KILL"], ids=["restarted", "killed"])
def test_journald_is_started_again(serving: Host, how: str) -> None:
    pids = {unit: serving.main_pid(unit) for unit in (_AGENT, unit_of("toy"))}
    journald = serving.main_pid("systemd-journald.service")

    serving.run("systemctl", *how.split(), "systemd-journald.service")
    serving.until(
        lambda: serving.main_pid("systemd-journald.service") not in {0, journald}, "another journald runs", 10
    )

    # Whoever logs holds a connection that has to survive: both still say what they do.
    before = serving.now()
    serving.must("PUT", "/api/models/toy/tier", {"tier": "powerful"})
    serving.answers(serving.until_ready("toy", within=5)["url"])
    for unit in pids:
        serving.until(
            functools.partial(serving.journal, f"--unit={unit}", f"--since={before}"), f"{unit} still logs", 10
        )
    assert {unit: serving.main_pid(unit) for unit in pids} == pids


@pytest.mark.parametrize("how", ["restart", "kill --signal=KILL"], ids=["restarted", "killed"])
def test_the_system_bus_is_started_again(serving: Host, how: str) -> None:
    pids = {unit: serving.main_pid(unit) for unit in (_AGENT, unit_of("toy"))}
    url = serving.until_ready("toy", within=5)["url"]
    with clients_of(serving) as clients:
        serving.run("systemctl", *how.split(), "dbus.service")
        assert serving.answers(url)
        serving.until(lambda: serving.run("busctl", "status", check=False).returncode == 0, "the bus is back", 20)
        serving.until_ready("toy", within=15)
        assert {unit: serving.main_pid(unit) for unit in pids} == pids

        serving.insist("POST", "/api/models/servers/toy/stop?wait=30", within=40)
        serving.insist("POST", "/api/models/servers/toy/start?wait=30", within=40)
        serving.until_ready("toy", within=15)
        assert serving.answers(url)
        clients.nobody_was_refused(broken=0, fine=(200, 503))
    assert serving.main_pid(_AGENT) == pids[_AGENT]


def test_a_server_that_crashes_is_started_again_and_one_that_is_stopped_is_not(serving: Host) -> None:
    unit = unit_of("toy")
    server = serving.main_pid(unit)
    serving.run("systemctl", "kill", "--signal=KILL", unit)
    serving.until(lambda: serving.main_pid(unit) not in {0, server}, "systemd starts it again", 10)
    serving.until_ready("toy", within=15)

    serving.run("systemctl", "stop", unit)
    for _ in range(3):
        serving.run("systemctl", "restart", _AGENT)
        serving.until_api_answers(within=10)
    assert serving.units(unit) == {}

    serving.run("magictl", "start", "toy", within=40)
    serving.until_ready("toy", within=5)
