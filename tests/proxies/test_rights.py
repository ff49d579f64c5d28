"""What comes through a proxy has no rights of the proxy's own, and nobody gets at the agent by another's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess
from tests.proxies.conftest import MODEL, Bearer
from tests.proxies.proxy_process import Proxy, running
from tests.proxies.shipped import Surroundings

READ = ("GET", "/magi/api/models/registry", None)
CHANGE = ("PUT", f"/magi/api/models/{MODEL}/tier", {"tier": "fast"})
EVERY_MARK = "X-Forwarded-For, X-Forwarded-Host, X-Forwarded-Proto, X-Forwarded-Prefix, X-Real-IP, Forwarded, Via"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        # A proxy must not let its client have the marks taken away as headers of one hop.
        {"Connection": f"close, {EVERY_MARK}"},
        {"Connection": "keep-alive, X-Forwarded-For, Host"},
        {"X-Forwarded-For": ""},
        {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1;host=localhost"},
        {"X-Forwarded-Prefix": "", "X-Forwarded-Host": "localhost", "X-Forwarded-Proto": "http"},
        {"X_Forwarded_For": "127.0.0.1"},
        {"Authorization": "Bearer no-token-of-anybody"},
        {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"},
    ],
)
def test_a_caller_without_a_token_may_do_nothing_though_the_proxy_might_do_all(
    proxy: Proxy, headers: dict[str, str]
) -> None:
    for method, path, body in (READ, CHANGE, ("GET", "/magi/", None), ("GET", "/magi/api/nowhere", None)):
        refused = proxy.ask(method, path, body, headers)
        assert (refused.status, refused.body["error"]) == (401, "Unauthorized"), (path, headers)
        assert refused.headers["www-authenticate"].startswith("Bearer")
    assert proxy.ask("GET", "/magi/health/live", None, headers).status == 200


def test_by_the_agents_port_it_is_the_same_as_by_its_socket(
    kind: str, agent: AgentProcess, bearer: Bearer, tmp_path: Path, surroundings: Surroundings
) -> None:
    """Though a program of this host may do everything on that port."""
    port = int(agent.settings["MAGI_TCP"].rpartition(":")[2])
    with running(Proxy(kind, tmp_path / "proxy", replace(surroundings, tcp=port))) as proxy:
        for headers in ({}, {"Connection": f"close, {EVERY_MARK}"}):
            for method, path, body in (READ, CHANGE):
                assert proxy.ask(method, path, body, headers).status == 401
        assert proxy.ask("GET", "/magi/", headers=bearer()).body["docs"] == "/magi/api/docs"
        assert proxy.ask(*CHANGE, bearer()).status == 200


def test_the_agent_is_not_reached_by_another_name_or_path(proxy: Proxy, agent: AgentProcess) -> None:
    """By a name of its own, a page of another site would be of the proxy's origin for the browser."""
    before = agent.log.read_text()
    for host in ("evil.example", "evil.example:443", "127.0.0.1", "magi.example.org.evil.example", "localhost"):
        answered = proxy.ask("GET", "/magi/health/live", None, {"Host": host})
        assert answered.status in (200, 421), host
        assert b"live" not in str(answered.body).encode(), host
    for path in ("/", "/health/live", "/magi", "/magi/../health/live", "/magix/health/live", "/magi/../../etc/passwd"):
        answered = proxy.ask("GET", path)
        assert answered.status in (200, 301, 302, 308, 400, 404), path
        assert "x-response-time" not in answered.headers, path
    assert agent.log.read_text() == before


def test_the_agents_log_names_the_token_and_the_client_and_not_what_it_claims(
    proxy: Proxy, agent: AgentProcess, bearer: Bearer
) -> None:
    path = f"/api/models/claims-by-{proxy.kind}/tier"
    claims = {"X-Forwarded-For": "127.0.0.1, 203.0.113.77", "X-Real-IP": "203.0.113.78"}

    proxy.ask("PUT", f"/magi{path}", {"tier": "fast"}, {**claims, **bearer()})

    [line] = [line for line in agent.log.read_text().splitlines() if path in line]
    assert "for token admin from 127.0.0.1 through uid 0" in line
    assert "203.0.113" not in line


def test_no_token_is_in_the_log_of_the_proxy(
    kind: str, agent: AgentProcess, bearer: Bearer, tmp_path: Path, surroundings: Surroundings
) -> None:
    """Above all where the agent is away, when a proxy has something to say of a request."""
    token = bearer()["Authorization"].removeprefix("Bearer ")
    for number, socket in enumerate((agent.socket, tmp_path / "no.sock")):
        here = replace(surroundings, socket=socket)
        with running(Proxy(kind, tmp_path / f"proxy{number}", here)) as proxy:
            for headers in ({"X-Api-Key": token}, {"Authorization": f"Bearer {token}"}):
                status = proxy.ask("GET", "/magi/v1/models", headers=headers).status
                assert status == (503 if number else 200)
        for log in (tmp_path / f"proxy{number}").glob("*.log"):
            assert token not in log.read_text()
