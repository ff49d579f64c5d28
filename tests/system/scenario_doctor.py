"""What `magictl doctor` says is true, and what it advises helps when it is done to the letter."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from tests.system.host import MEMBER, STRANGER, TCP, Host

_AGENT = "magi-agent.service"
_TCP_SOCKET = "magi-agent-tcp.socket"
_CONFIGURATION = "/etc/magi-agent/agent.toml"
_TOKENS = "/etc/magi-agent/tokens"
_HOLDER = "import socket, time; s = socket.create_server(('127.0.0.1', 8000)); time.sleep(3600)"
_CLIENTS = "while :; do curl -s -o /dev/null --unix-socket /run/magi-agent/api.sock http://x/; sleep 0.05; done"


@dataclass(frozen=True, slots=True)
class Told:
    """What the doctor found, but for what is as it should be."""

    status: int
    findings: list[dict[str, Any]]

    def of(self, check: str) -> list[dict[str, Any]]:
        return [each for each in self.findings if each["check"] == check and each["result"] != "ok"]


def examined(host: Host, user: str = "root") -> Told:
    ran = host.run("magictl", "doctor", "--json", user=user, check=False, within=60)
    return Told(ran.returncode, json.loads(ran.stdout)["findings"])


def carry_out(host: Host, mend: str) -> None:
    """Do as the doctor says, as root; of what it leaves to a person, the last part alone."""
    host.run("sh", "-c", mend.rpartition("; then: ")[2].replace("sudo ", ""), within=60)


def test_a_port_that_was_taken_before_the_agent_s_socket_is_missed_and_had_back(serving: Host) -> None:
    serving.run("systemctl", "stop", _AGENT, _TCP_SOCKET, "magi-agent.socket")
    serving.run("systemd-run", "--unit=holder", "/usr/bin/python3", "-c", _HOLDER)
    serving.until(lambda: serving.run("curl", TCP, "-m", "0.2", check=False).returncode == 28, "the port is taken", 10)
    serving.run("systemctl", "start", "magi-agent.socket")
    assert serving.run("systemctl", "start", _TCP_SOCKET, check=False).returncode != 0
    serving.until_api_answers(within=15)

    told = examined(serving)
    [found] = told.of("sockets")
    assert told.status == 1
    assert found["result"] == "failed"
    said = rf"{_TCP_SOCKET} has failed \(resources\): 127.0.0.1:8000, where it is to listen, is held by python3\S* "
    assert re.match(said + r"\(process \d+, unit holder.service\)$", found["found"]), found
    assert f"sudo systemctl edit {_TCP_SOCKET}" in found["mend"]
    assert "agent.toml" not in found["mend"]
    [found] = examined(serving, STRANGER).of("sockets")
    assert found["found"].endswith("somebody listens at 127.0.0.1:8000")

    # Another port, as it is advised, while clients would have the service started at any moment that it does not run.
    serving.run("systemd-run", "--unit=clients", "sh", "-c", _CLIENTS)
    drop_in = "[Socket]\nListenStream=\nListenStream=127.0.0.1:8001\n"
    serving.write(f"/etc/systemd/system/{_TCP_SOCKET}.d/override.conf", drop_in)
    serving.run("systemctl", "daemon-reload")
    [found] = examined(serving).of("sockets")
    assert found["found"].endswith("nothing is in its way now"), found
    carry_out(serving, found["mend"])
    assert examined(serving).of("sockets") == []
    assert serving.ask("GET", "/health/live", by="http://127.0.0.1:8001").status == 200

    # And the usual one, once it is free.
    serving.run("systemctl", "stop", "holder.service")
    serving.run("rm", "-r", f"/etc/systemd/system/{_TCP_SOCKET}.d")
    serving.run("systemctl", "daemon-reload")
    [found] = examined(serving).of("sockets")
    assert "127.0.0.1:8000" in found["found"]
    carry_out(serving, found["mend"])
    assert examined(serving).of("sockets") == []
    assert serving.ask("GET", "/health/live", by=TCP).status == 200


def test_a_container_s_host_is_named_where_controllers_are_missing(serving: Host) -> None:
    missing = examined(serving).of("control groups")
    if serving.run("systemd-detect-virt", "--container", check=False).returncode == 0:
        assert all("cgroup_disable" not in each["mend"] for each in missing)
        assert all(each["mend"].startswith("this is a container (") for each in missing)


def test_servers_that_the_agent_s_sandbox_does_not_let_it_reach_are_told(serving: Host) -> None:
    shipped = serving.run("cat", _CONFIGURATION).stdout
    host = "192.0.2.7"
    serving.write(_CONFIGURATION, shipped.replace("[servers]\n", f"[servers]\nllama_server_host = '{host}'\n"))

    [found] = examined(serving).of("server address")
    assert found["result"] == "warning"
    assert "127.0.0.0/8" in found["found"]
    assert f"sudo systemctl edit {_AGENT} (below [Service] IPAddressAllow={host})" in found["mend"]

    serving.write(f"/etc/systemd/system/{_AGENT}.d/override.conf", f"[Service]\nIPAddressAllow={host}\n")
    serving.run("systemctl", "daemon-reload")
    carry_out(serving, found["mend"])
    assert examined(serving).of("server address") == []
    serving.until_api_answers(within=15)


def test_an_agent_that_does_not_run_is_not_started_by_the_question_and_one_that_cannot_is_told(serving: Host) -> None:
    serving.run("systemctl", "stop", _AGENT)
    for user in ("root", MEMBER):
        told = examined(serving, user)
        [down] = told.of("service")
        assert down["found"] == f"{_AGENT} is inactive"
        assert told.of("agent")[0]["found"].endswith("it is not asked, as that would start it")
    assert serving.property(_AGENT, "ActiveState") == "inactive"
    carry_out(serving, down["mend"])
    assert examined(serving).of("service") == []

    shipped = serving.run("cat", _CONFIGURATION).stdout
    serving.write(_CONFIGURATION, shipped.replace("[servers]\n", "[servers]\nport_rage = 1\n"))
    assert serving.run("systemctl", "restart", _AGENT, check=False).returncode != 0
    told = examined(serving)
    [wrong] = told.of("configuration")
    assert "servers.port_rage: unknown key" in wrong["found"]
    [failing] = told.of("service")
    assert re.match(rf"{_AGENT} (has failed|fails whenever it is started) \(exit-code\)$", failing["found"])
    serving.write(_CONFIGURATION, shipped)
    carry_out(serving, wrong["mend"])
    serving.until_api_answers(within=15)
    assert examined(serving).of("service") == []


def test_what_is_wrong_with_the_tokens_file_is_mended_as_it_is_said(serving: Host) -> None:
    serving.run("magictl", "token", "add", "front-end", "--scope", "read")
    assert examined(serving).of("tokens") == []
    [unseen] = examined(serving, STRANGER).of("tokens")
    assert unseen == {
        "check": "tokens",
        "result": "unknown",
        "found": f"{_TOKENS} may not be read by you",
        "mend": "sudo magictl doctor",
    }

    for change in (f"chmod 0644 {_TOKENS}", f"chmod 0666 {_TOKENS}", f"chown root:root {_TOKENS}"):
        serving.run(*shlex.split(change))
        [found] = examined(serving).of("tokens")
        for step in found["mend"].split("; then: "):
            if "sudoedit" not in step:
                carry_out(serving, step)
        serving.until_api_answers(within=15)
        assert examined(serving).of("tokens") == [], change
        assert examined(serving).of("agent") == [], change
    assert serving.output("stat", "--format=%U:%G %a", _TOKENS) == "root:magi-agent 640"
