"""Other hosts: who reaches the API by a network card, and what becomes of an address that comes late."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import locations
import pytest

from tests.system.host import SOCKET, TCP, Answer, Host, unit_of

_GUIDE = locations.CHECKOUT / "docs/operations.md"
_ADDRESS_IN_GUIDE = "10.0.0.5"
_HERE = "198.51.100.5"
_THERE = "198.51.100.9"
_API = f"http://{_HERE}:8000"
_SERVER = f"http://{_HERE}:8080"
_NEIGHBOUR = "neighbour"
_ON_NEIGHBOUR = ("ip", "netns", "exec", _NEIGHBOUR)

_CONFIGURATION = "/etc/magi-agent/agent.toml"
_AGENT = "magi-agent.service"
_LISTENER = "magi-agent-tcp.socket"
_HEALTH = ("GET", "/health/live", None)
_READ = ("GET", "/api/models/registry", None)
_SERVERS_HEALTH = ("GET", "/health", None)
_CHANGE = ("PUT", "/api/models/toy/tier", {"tier": "powerful"})


@contextlib.contextmanager
def _network(host: Host) -> Iterator[None]:
    """Give the host a network card, and at the other end of its cable a host of one's own."""
    for command in (
        f"ip netns add {_NEIGHBOUR}",
        f"ip link add magi0 type veth peer name magi0 netns {_NEIGHBOUR}",
        f"ip address add {_HERE}/24 dev magi0",
        "ip link set magi0 up",
        f"ip -n {_NEIGHBOUR} address add {_THERE}/24 dev magi0",
        f"ip -n {_NEIGHBOUR} link set magi0 up",
    ):
        host.run(*command.split())
    try:
        yield
    finally:
        host.run("ip", "netns", "delete", _NEIGHBOUR)


def _from_neighbour(host: Host, question: tuple[str, str, Any], by: str = _API, **other: Any) -> Answer:
    """What the API, or who listens elsewhere, answers to who asks from the other end."""
    return host.ask(*question, by=by, inside=_ON_NEIGHBOUR, **other)


def _edit(host: Host, unit: str, text: str) -> None:
    """Do what `systemctl edit` does, which asks for a terminal."""
    host.write(f"/etc/systemd/system/{unit}.d/override.conf", text)
    host.run("systemctl", "daemon-reload")


def _recipe() -> tuple[str, list[str]]:
    """The commands in the guide by which other hosts are let in: the one for a token, and those after it."""
    section = _GUIDE.read_text().partition("## Letting other hosts in\n")[2].partition("\n## ")[0]
    lines = section.partition("```console\n")[2].partition("```")[0].splitlines()
    token, *rest = [line.removeprefix("# ") for line in lines]
    assert token.startswith("magictl token add front-end --scope read"), section
    assert [line.split()[1] for line in rest] == ["edit", "restart"], section
    return token, rest


def _follow(host: Host, line: str, check: bool = True) -> str:
    """Carry out one line of the guide, and return what was printed."""
    command, _, remark = line.partition(" #")
    if not command.startswith("systemctl edit "):
        return host.run("sh", "-c", command, check=check).stdout
    text = remark.strip().replace(" (empty)", "").replace(", ", "\n").replace(_ADDRESS_IN_GUIDE, _HERE)
    assert f"ListenStream={_HERE}:8000" in text, line
    _edit(host, command.split()[2], f"{text}\n")
    return ""


def _made(said: str) -> str:
    """The token in what `magictl token add` printed."""
    return str(re.findall(r"\S{20,}", said)[0])


def _let_others_in(host: Host) -> str:
    """Follow the guide to its end, and return the token that it makes."""
    token, rest = _recipe()
    made = _made(_follow(host, token))
    for line in rest:
        _follow(host, line)
    host.until_api_answers(within=20)
    return made


def test_other_hosts_are_let_in_as_the_guide_says_with_a_token_alone(serving: Host) -> None:
    server = serving.main_pid(unit_of("toy"))
    with _network(serving):
        assert _from_neighbour(serving, _HEALTH).status == 0
        token = _let_others_in(serving)

        assert _from_neighbour(serving, _HEALTH).status == 200
        assert _from_neighbour(serving, _READ).status == 401
        assert _from_neighbour(serving, _READ, token="not-a-token-of-ours").status == 401
        assert "toy" in _from_neighbour(serving, _READ, token=token).body["models"]
        assert _from_neighbour(serving, _CHANGE, token=token).status == 403
        # A token holds by whatever name the host is asked for. Without one, no name helps, loopback's neither.
        for name in ("example.org", "localhost"):
            header = (f"Host: {name}",)
            assert _from_neighbour(serving, _READ, headers=header).status == 401, name
            assert _from_neighbour(serving, _READ, headers=header, token=token).status == 200, name
        # By that address the host itself is one like others, and loopback's is given up.
        assert serving.ask(*_READ, by=_API).status == 401
        assert serving.ask(*_HEALTH, by=TCP).status == 0
        assert serving.ask(*_READ, by=SOCKET).status == 200

        assert _from_neighbour(serving, _SERVERS_HEALTH, by=_SERVER).status == 0
        serving.until_ready("toy", within=15)
        assert serving.main_pid(unit_of("toy")) == server

        serving.run("magictl", "token", "revoke", "front-end")
        serving.run("systemctl", "reload", _AGENT)
        serving.until(lambda: _from_neighbour(serving, _READ, token=token).status == 401, "the token is ended", 10)


def test_without_any_token_nothing_answers_other_hosts_and_the_journal_says_what_to_do(installed: Host) -> None:
    token, rest = _recipe()
    with _network(installed):
        before = installed.now()
        for line in rest:
            _follow(installed, line, check=False)
        installed.until(
            lambda: "magictl token add" in installed.journal(f"--unit={_AGENT}", f"--since={before}"), "it says why", 15
        )
        assert installed.property(_AGENT, "ActiveState") != "active"
        assert _from_neighbour(installed, _HEALTH, within=3).status == 0

        made = _made(_follow(installed, token))
        for line in rest[1:]:
            _follow(installed, line)
        installed.until_api_answers(within=20)
        assert _from_neighbour(installed, _READ, token=made).status == 200


def test_an_address_that_comes_after_the_boot_is_served_from_then_on(installed: Host) -> None:
    token = _let_others_in(installed)
    installed.reboot()
    assert installed.property(_LISTENER, "ActiveState") == "active"
    installed.until_api_answers(within=20)

    with _network(installed):
        assert _from_neighbour(installed, _READ, token=token).status == 200


def _filters_addresses(host: Host) -> bool:
    """Whether IPAddressDeny= has an effect: in a container it needs rights that not every container has."""
    denied = ("systemd-run", "--wait", "--collect", "--quiet", "--property=IPAddressDeny=any")
    return host.run(*denied, "curl", "--silent", "--max-time", "2", f"{TCP}/health/live", check=False).returncode != 0


def test_servers_at_the_address_of_a_network_card_want_a_word_in_the_agents_sandbox(
    serving: Host, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--this-machine") and not _filters_addresses(serving):
        pytest.skip("systemd filters no addresses on this machine")
    shipped = serving.run("cat", _CONFIGURATION).stdout
    with _network(serving):
        serving.write(_CONFIGURATION, shipped.replace("[servers]\n", f'[servers]\nllama_server_host = "{_HERE}"\n'))
        serving.run("systemctl", "restart", _AGENT)
        serving.until_api_answers(within=20)
        serving.must("POST", "/api/models/servers/toy/restart?wait=5", within=20)
        serving.until(
            lambda: _from_neighbour(serving, _SERVERS_HEALTH, by=_SERVER).status == 200, "others reach the server", 20
        )
        toy = serving.server("toy")
        assert toy is not None
        assert (toy["url"], toy["isReady"]) == (_SERVER, False)

        _edit(serving, _AGENT, f"[Service]\nIPAddressAllow={_HERE}\n")
        serving.run("systemctl", "restart", _AGENT)
        serving.until_ready("toy", within=20)
