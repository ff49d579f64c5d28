"""Who may what, on each listener."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from tests.system.host import MEMBER, SOCKET, STRANGER, TCP, Answer, Host

_NO_CONNECTION = 0
_READ = ("GET", "/api/models/registry", None)
_CHANGE = ("PUT", "/api/models/toy/tier", {"tier": "powerful"})
_HEALTH = ("GET", "/health/live", None)


class Caller(NamedTuple):
    """Somebody who asks, and what they are answered when they read and when they change something."""

    user: str
    by: str
    token: str | None
    reads: int
    changes: int


def _asked(host: Host, caller: Caller) -> Caller:
    def ask(method: str, path: str, body: object) -> Answer:
        return host.ask(method, path, body, by=caller.by, user=caller.user, token=caller.token)

    return caller._replace(reads=ask(*_READ).status, changes=ask(*_CHANGE).status)


def _token(host: Host, name: str, scope: str) -> str:
    said = host.output("magictl", "token", "add", name, "--scope", scope)
    return str(re.findall(r"\S{20,}", said)[0])


def _reload(host: Host) -> None:
    host.run("systemctl", "reload", "magi-agent.service")


def test_each_caller_may_do_what_the_contract_says(serving: Host) -> None:
    tokens = {scope: _token(serving, f"for-{scope}", scope) for scope in ("read", "infer", "admin")}
    _reload(serving)
    serving.until(lambda: serving.ask(*_CHANGE, by=TCP, token=tokens["admin"]).status == 200, "tokens hold", 10)

    expected = [
        Caller("root", SOCKET, None, 200, 200),
        Caller(MEMBER, SOCKET, None, 200, 200),
        Caller(STRANGER, SOCKET, None, _NO_CONNECTION, _NO_CONNECTION),
        Caller("root", TCP, None, 200, 403),
        Caller(STRANGER, TCP, None, 200, 403),
        Caller(STRANGER, TCP, tokens["read"], 200, 403),
        Caller(STRANGER, TCP, tokens["infer"], 403, 403),
        Caller(STRANGER, TCP, tokens["admin"], 200, 200),
        Caller(STRANGER, TCP, "not-a-token-of-ours", 401, 401),
    ]
    assert [_asked(serving, caller) for caller in expected] == expected

    # Health is open to whoever can connect, and to nobody's browser.
    assert serving.ask(*_HEALTH, by=TCP, user=STRANGER).status == 200
    for header in ("Host: example.org", "Origin: https://example.org"):
        assert serving.ask(*_READ, by=TCP, headers=(header,)).status == 403, header

    serving.run("magictl", "token", "revoke", "for-admin")
    _reload(serving)
    serving.until(lambda: serving.ask(*_CHANGE, by=TCP, token=tokens["admin"]).status == 401, "it is revoked", 10)


def test_a_stranger_may_read_where_the_operator_opens_the_socket(serving: Host) -> None:
    serving.write("/etc/systemd/system/magi-agent.socket.d/open.conf", "[Socket]\nSocketMode=0666\n")
    serving.run("systemctl", "daemon-reload")
    serving.run("systemctl", "stop", "magi-agent.service")
    serving.run("systemctl", "restart", "magi-agent.socket")
    serving.until_ready("toy", within=20)

    expected = [
        Caller("root", SOCKET, None, 200, 200),
        Caller(MEMBER, SOCKET, None, 200, 200),
        Caller(STRANGER, SOCKET, None, 200, 403),
    ]
    assert [_asked(serving, caller) for caller in expected] == expected


def test_a_listener_beyond_loopback_is_refused_without_a_token(installed: Host) -> None:
    installed.write(
        "/etc/systemd/system/magi-agent-tcp.socket.d/open.conf", "[Socket]\nListenStream=\nListenStream=8000\n"
    )
    installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "stop", "magi-agent.service")
    installed.run("systemctl", "restart", "magi-agent-tcp.socket")

    before = installed.now()
    installed.run("systemctl", "start", "magi-agent.service", check=False)
    installed.until(
        lambda: "token" in installed.journal("--unit=magi-agent.service", f"--since={before}"), "it says why", 15
    )
    assert installed.property("magi-agent.service", "ActiveState") != "active"

    _token(installed, "front-end", "read")
    installed.run("systemctl", "reset-failed", "magi-agent.service", "magi-agent.socket", "magi-agent-tcp.socket")
    installed.run("systemctl", "start", "magi-agent.socket", "magi-agent-tcp.socket", "magi-agent.service")
    installed.until_api_answers(within=15)


def test_each_change_is_in_the_journal_with_who_made_it(serving: Host) -> None:
    token = _token(serving, "front-end", "admin")
    _reload(serving)
    serving.until(lambda: serving.ask(*_CHANGE, by=TCP, token=token).status == 200, "the token holds", 10)
    before = serving.now()

    assert serving.ask(*_CHANGE, user=MEMBER).status == 200
    assert serving.ask(*_CHANGE, by=TCP, token=token).status == 200

    said = serving.journal("--unit=magi-agent.service", f"--since={before}")
    assert f"uid {serving.output('id', '-u', MEMBER)}" in said or MEMBER in said
    assert "front-end" in said
    journal = serving.journal("--boot")
    assert token not in journal
    assert "token front-end (admin) was added to /etc/magi-agent/tokens, by root" in journal
    assert "changed: the tokens (front-end added)" in journal
    method, path, body = _CHANGE
    assert f"{method} {path} {json.dumps(body)}: 200 in " in journal
