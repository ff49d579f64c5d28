"""Servers that do nothing any more, and one that does not even die."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.host import Host, unit_of

_CONFIGURATION = "/etc/magi-agent/agent.toml"
_FREEZER = "/run/freezer"
_NOTICED_SECONDS = 150.0
"""At the most so long after a server hangs that is known: a look a minute, and three in a row that are in vain."""


@contextlib.contextmanager
def _frozen(host: Host, pid: int) -> Iterator[None]:
    """Keep a process from dying, whatever it is sent: it is in a freezer of control groups' version 1."""
    host.run("mkdir", _FREEZER)
    mounted = host.run("mount", "-t", "cgroup", "-o", "freezer", "freezer", _FREEZER, check=False)
    if mounted.returncode:
        pytest.skip(f"no freezer of version 1 can be had here: {mounted.stderr}")
    group = f"{_FREEZER}/stuck"
    host.run("mkdir", group)
    try:
        host.run("sh", "-c", f"echo {pid} > {group}/cgroup.procs; echo FROZEN > {group}/freezer.state")
        frozen = f"grep -q FROZEN {group}/freezer.state"
        host.until(lambda: host.run("sh", "-c", frozen, check=False).returncode == 0, "it is frozen", 10)
        yield
    finally:
        host.run("sh", "-c", f"echo THAWED > {group}/freezer.state")
        host.until(lambda: host.run("rmdir", group, check=False).returncode == 0, "nothing is left of it", 10)
        host.run("umount", _FREEZER)


def _events(host: Host, model: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = host.must("GET", f"/api/models/{model}/history")["events"]
    return events


def _with_another(host: Host) -> int:
    """Have another model run as well, and return its server's process."""
    host.add_model("other.gguf", "other")
    host.must("POST", "/api/models/servers/other/start?wait=60", within=65)
    return host.main_pid(unit_of("other"))


def test_a_server_that_hangs_is_replaced_and_no_other(serving: Host) -> None:
    other = _with_another(serving)
    toy = serving.main_pid(unit_of("toy"))
    before = len(_events(serving, "toy"))

    serving.run("kill", "-STOP", str(toy))

    serving.until(lambda: serving.main_pid(unit_of("toy")) not in {0, toy}, "another runs", _NOTICED_SECONDS)
    url = serving.until_ready("toy", within=60)["url"]
    assert serving.answers(url)
    told = [(event["event"], event["result"], event["by"]) for event in _events(serving, "toy")[before:]]
    assert told == [
        ("failed", "hung", None),
        ("stopped", None, "agent"),
        ("started", None, "agent"),
        ("ready", None, None),
    ]
    assert "it has not answered for" in serving.journal("--unit=magi-agent.service", "--grep=toy failed")
    assert serving.main_pid(unit_of("other")) == other
    assert [event["event"] for event in _events(serving, "other")] == ["started", "ready"]


def test_a_server_that_survives_sigkill_is_stuck_until_it_is_gone(serving: Host) -> None:
    shipped = serving.run("cat", _CONFIGURATION).stdout
    serving.write(_CONFIGURATION, shipped.replace("[servers]\n", "[servers]\nstop_timeout = 2\n"))
    serving.run("systemctl", "reload", "magi-agent.service")
    serving.must("POST", "/api/models/servers/toy/restart?wait=60", within=65)
    other = _with_another(serving)
    toy = serving.main_pid(unit_of("toy"))
    with _frozen(serving, toy):
        answer = serving.ask("POST", "/api/models/servers/toy/restart?wait=60", within=65)

        assert (answer.status, answer.body["error"]) == (500, "StopFailed")
        assert f"it survived SIGKILL: process {toy} still there" in answer.body["message"]
        assert (serving.property(unit_of("toy"), "ActiveState"), serving.property(unit_of("toy"), "Result")) == (
            "failed",
            "timeout",
        )
        # Also for an agent that has not seen it happen.
        serving.run("systemctl", "restart", "magi-agent.service")
        serving.until_api_answers(within=20)
        serving.until(lambda: (serving.server("toy") or {}).get("state") == "stuck", "it is known again", 15)
        assert f"process {toy} " in serving.output("magictl", "status")
        assert serving.run("kill", "-0", str(toy), check=False).returncode == 0
    serving.until_ready("toy", within=30)
    assert serving.main_pid(unit_of("toy")) not in {0, toy}
    assert serving.main_pid(unit_of("other")) == other
