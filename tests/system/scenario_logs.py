"""Logs and histories of the packaged agent: from its sandbox, with journald's own words, under a rate limit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.system.host import MEMBER, Host, unit_of

_AGENT = "magi-agent.service"
_JOURNALD = "systemd-journald.service"
_CONFIGURATION = "/etc/magi-agent/agent.toml"
_LLAMA_SERVER = "/usr/local/bin/llama-server"


def _log(host: Host, model: str = "toy", query: str = "lines=10000") -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = host.must("GET", f"/api/models/servers/{model}/logs?{query}")["entries"]
    return entries


def _history(host: Host, model: str = "toy") -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = host.must("GET", f"/api/models/{model}/history")["events"]
    return events


def test_the_agent_reads_the_journal_from_its_sandbox(serving: Host) -> None:
    entries = _log(serving, query="run=current&lines=10000")
    assert any("model loaded" in entry["message"] for entry in entries if entry["source"] == "server")
    run = serving.property(unit_of("toy"), "InvocationID")
    assert {entry["invocationId"] for entry in entries} == {run}
    # systemd's own words of the unit are among them.
    assert any("Started" in entry["message"] for entry in entries if entry["source"] == "systemd"), entries

    serving.run("systemctl", "restart", _AGENT)
    serving.until_api_answers(within=15)
    again = _log(serving, query="run=current&lines=10000")
    assert again[: len(entries)] == entries
    assert "model loaded" in serving.output("magictl", "logs", "toy", user=MEMBER)

    # The log of the run before, after a restart by the operator's own means.
    serving.run("systemctl", "restart", unit_of("toy"))
    serving.until_ready("toy", within=20)
    assert {entry["invocationId"] for entry in _log(serving, query="run=previous")} == {run}
    # No other unit's log can be had by its run.
    other = serving.property(_AGENT, "InvocationID")
    assert _log(serving, query=f"run={other}") == []


def test_a_log_is_followed_while_journald_agent_and_server_are_restarted(serving: Host) -> None:
    followed = "/run/followed"
    serving.run(
        "systemd-run", "--unit=follower", "--quiet", f"--property=StandardOutput=file:{followed}",
        "magictl", "logs", "toy", "--follow", "--json", "--lines=1",
    )  # fmt: skip

    def runs() -> list[str]:
        lines = serving.output("cat", followed).splitlines()
        said = [json.loads(line) for line in lines]
        loaded = [entry["invocationId"] for entry in said if "model loaded" in entry["message"]]
        assert len({entry["cursor"] for entry in said}) == len(said), "something came twice"
        return loaded

    def has_begun() -> bool:
        return bool(serving.run("cat", followed, check=False).stdout)

    serving.until(has_begun, "the last line is there", 10)
    for number, (disturb, unit) in enumerate(
        [("restart", _JOURNALD), ("kill --signal=KILL", _JOURNALD), ("restart", _AGENT)]
    ):
        serving.run("systemctl", *disturb.split(), unit)
        # An agent that has not adopted it yet would start it, and do nothing as it runs.
        serving.until_ready("toy", within=20)
        serving.insist("POST", "/api/models/servers/toy/restart?wait=30", within=40)
        run = serving.property(unit_of("toy"), "InvocationID")
        serving.until(lambda run=run: run in runs(), f"the new server's log, after {disturb} of {unit}", 15)  # type: ignore[misc]
        assert len(runs()) == number + 1
    # Nothing of a follower is left once it has gone.
    assert serving.output("pgrep", "--count", "--full", "journalctl.*--follow") == "1"
    serving.run("systemctl", "stop", "follower")
    serving.until(
        lambda: serving.run("pgrep", "--full", "journalctl.*--follow", check=False).returncode == 1,
        "no journalctl is left",
        10,
    )


def test_a_model_that_floods_is_held_back_and_what_is_left_out_is_said(serving: Host) -> None:
    shipped = serving.run("cat", _CONFIGURATION).stdout
    limits = "[servers]\nlog_rate_limit_interval = 2\nlog_rate_limit_burst = 500\n"
    serving.write(_CONFIGURATION, shipped.replace("[servers]\n", limits))
    serving.run("systemctl", "reload", _AGENT)
    flood = "seq --format='flood %.0f' 50000; sleep 4; echo after the flood"
    serving.run("rm", _LLAMA_SERVER)
    serving.write(
        _LLAMA_SERVER,
        f'#!/bin/sh\n[ "$1" = --help ] || {{ {flood}; }}\nexec {serving.parts.llama_server} "$@"\n',
        mode="0755",
    )
    serving.must("POST", "/api/models/servers/toy/restart?wait=60", within=65)
    unit = unit_of("toy")
    assert serving.property(unit, "LogRateLimitBurst") == "500"
    assert serving.property(unit, "LogRateLimitIntervalUSec") == "2s"

    entries = _log(serving, query="run=all&since=-2min&lines=10000")

    taken = [entry for entry in entries if entry["message"].startswith("flood ")]
    # journald takes more than was said while its disk has room: up to six times as many.
    assert 500 <= len(taken) < 5000
    assert any(entry["message"] == "after the flood" for entry in entries)
    said = [entry for entry in entries if entry["message"].startswith("Suppressed ")]
    assert said, entries[-5:]
    assert {entry["source"] for entry in said} == {"systemd"}
    left_out = sum(int(entry["message"].split()[1]) for entry in said)
    assert left_out + len(taken) == 50_000


def test_an_agent_without_the_right_to_read_the_journal_says_what_to_do(serving: Host) -> None:
    serving.write(f"/etc/systemd/system/{_AGENT}.d/no-group.conf", "[Service]\nSupplementaryGroups=\n")
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "restart", _AGENT)
    serving.until_ready("toy", within=20)

    for path in ("servers/toy/logs", "servers/toy/logs?follow=true", "toy/history"):
        answer = serving.ask("GET", f"/api/models/{path}")
        assert (answer.status, answer.body["details"]) == (503, {"service": "journal"}), answer
        assert "systemd-journal" in answer.body["message"]


def test_what_happened_while_no_agent_was_there_is_systemds_word(serving: Host) -> None:
    unit = unit_of("toy")
    before = _history(serving)
    assert [event["event"] for event in before[-2:]] == ["started", "ready"]
    assert before[-2]["by"] in {"enabled", "adoption"}
    first = serving.property(unit, "InvocationID")

    serving.run("systemctl", "stop", "magi-agent.socket", "magi-agent-tcp.socket", _AGENT)
    server = serving.main_pid(unit)
    serving.run("systemctl", "kill", "--signal=KILL", unit)
    serving.until(lambda: serving.main_pid(unit) not in {0, server}, "systemd starts it again", 15)
    serving.until(lambda: serving.property(unit, "ActiveState") == "active", "it runs", 15)
    second = serving.property(unit, "InvocationID")
    serving.run("systemctl", "stop", unit, within=40)
    serving.run("systemctl", "start", "magi-agent.socket", "magi-agent-tcp.socket", _AGENT)
    serving.until_api_answers(within=15)

    def ended() -> list[dict[str, Any]] | None:
        events = _history(serving)[len(before) :]
        return events if events and events[-1]["by"] == "systemctl" else None

    [failed, again, stopped] = serving.until(ended, f"the stop is told; there is {_history(serving)}", 10)

    assert (failed["event"], failed["result"], failed["signal"]) == ("failed", "signal", "SIGKILL")
    assert (failed["invocationId"], failed["by"]) == (first, None)
    assert (again["event"], again["by"], again["invocationId"]) == ("started", "systemd", second)
    assert (stopped["event"], stopped["by"], stopped["invocationId"]) == ("stopped", "systemctl", second)

    serving.run("magictl", "start", "toy", user=MEMBER, within=60)
    table = serving.output("magictl", "history", "toy", user=MEMBER)
    assert "signal SIGKILL" in table or "SIGKILL" in table
    assert _history(serving)[-1]["event"] == "ready"
    assert _history(serving)[-2]["by"].startswith("uid ")


Own = Callable[..., str]
_BUS_SOCKET = "[Socket]\nListenStream=%t/bus\n"
_BUS_SERVICE = """\
[Unit]
Requires=dbus.socket
[Service]
Type=notify
NotifyAccess=main
ExecStart=dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation --syslog-only
"""


@contextlib.contextmanager
def _users_manager(host: Host) -> Iterator[Own]:
    """A user's own systemd, and what runs commands as that user beside it."""
    uid = host.output("id", "--user", MEMBER)
    run, folder = f"/run/user/{uid}", "/etc/systemd/user"
    for name, text in (("dbus.socket", _BUS_SOCKET), ("dbus.service", _BUS_SERVICE)):
        host.write(f"{folder}/{name}", text)

    def own(*command: str) -> str:
        environment = (
            f"XDG_RUNTIME_DIR={run}",
            f"DBUS_SESSION_BUS_ADDRESS=unix:path={run}/bus",
            f"HOME=/home/{MEMBER}",
        )
        words = ("env", *environment, f"MAGI_SOCKET={run}/magi-agent/api.sock", *command)
        return host.output(*words, user=MEMBER, within=90)

    try:
        host.run("systemctl", "start", f"user@{uid}.service")
        own("systemctl", "--user", "start", "dbus.socket")
        yield own
    finally:
        host.run("systemctl", "stop", f"user@{uid}.service", within=60)
        host.run("rm", f"{folder}/dbus.socket", f"{folder}/dbus.service")


def test_a_users_own_agent_reads_that_users_own_journal(serving: Host) -> None:
    with _users_manager(serving) as own:
        _users_logs_and_history(serving, own)


def _users_logs_and_history(serving: Host, own: Own) -> None:
    settings = {
        "MAGI_SYSTEMD_SCOPE": "user",
        "MAGI_CONFIG": "/dev/null",
        "MODEL_SCAN_PATH": "/models",
        "REGISTRY_PATH": f"/home/{MEMBER}/state/registry.json",
        "PROFILES_PATH": f"/home/{MEMBER}/state/profiles",
        "MAGI_PORT_RANGE": "9100-9109",
        "MAGI_TCP": "off",
    }
    own(
        "systemd-run", "--user", "--unit=own-agent", "--property=Type=notify", "--quiet",
        *(f"--setenv={name}={value}" for name, value in settings.items()), "/usr/bin/magi-agent",
    )  # fmt: skip
    # An agent answers before its first scan is through.
    own("magictl", "rescan")
    own("magictl", "start", "toy")
    unit = unit_of("toy")

    log = [json.loads(line) for line in own("magictl", "logs", "toy", "--json").splitlines()]
    assert any("model loaded" in entry["message"] for entry in log if entry["source"] == "server")
    assert any("Started" in entry["message"] for entry in log if entry["source"] == "systemd"), log
    [run_id] = {entry["invocationId"] for entry in log}
    # The system's server of the same name has another log.
    assert run_id != serving.property(unit, "InvocationID")
    assert run_id not in {entry["invocationId"] for entry in _log(serving)}

    own("systemctl", "--user", "stop", "own-agent")
    own("systemctl", "--user", "kill", "--signal=KILL", unit)
    serving.until(
        lambda: own("systemctl", "--user", "show", "--value", "--property=NRestarts,ActiveState", unit) == "1\nactive",
        "systemd starts it again", 20,
    )  # fmt: skip
    own(
        "systemd-run", "--user", "--unit=own-agent", "--property=Type=notify", "--quiet",
        *(f"--setenv={name}={value}" for name, value in settings.items()), "/usr/bin/magi-agent",
    )  # fmt: skip

    def told() -> list[tuple[str, str | None]]:
        answer = json.loads(own("magictl", "history", "toy", "--json"))
        return [(event["event"], event["by"] and event["by"].split()[0]) for event in answer["events"]]

    wanted = [("started", "uid"), ("ready", None), ("failed", None), ("started", "systemd"), ("ready", None)]
    serving.until(lambda: told() == wanted, f"the history is whole; it has {told()}", 20)
    assert [entry for entry in _history(serving) if entry["event"] == "failed"] == []
