"""magictl from elsewhere: by the proxy's URL and a token, as docs/reverse-proxy.md has it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import locations
import pytest

from tests.agent_process import AgentProcess, wait_until
from tests.proxies.conftest import MODEL
from tests.proxies.proxy_process import Proxy
from tests.proxies.shipped import NAME

Magictl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def known_name(tmp_path: Path) -> Iterator[None]:
    """Have the proxy's name lead to this host: a file of hosts of this mount namespace's own."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {NAME}\n")
    subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True, timeout=30)
    yield
    subprocess.run(["umount", "/etc/hosts"], check=True, timeout=30)


@pytest.fixture
def magictl(proxy: Proxy, agent: AgentProcess, known_name: None) -> Magictl:
    def run(*words: str, token: str | None = "admin") -> subprocess.CompletedProcess[str]:
        given = [] if token is None else ["--token-file", str(agent.folder / f"{token}.token")]
        return subprocess.run(
            [locations.VENV / "bin" / "magictl", *words, "--url", f"https://{NAME}:{proxy.here.port}/magi", *given],
            env={**os.environ, "SSL_CERT_FILE": str(proxy.here.certificate), "COLUMNS": "200"},
            capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    return run


def test_magictl_works_through_the_proxy(magictl: Magictl, agent: AgentProcess) -> None:
    for words, state in ((("enable", MODEL), None), (("start", MODEL), "ready"), (("restart", MODEL), "ready")):
        done = magictl(*words)
        assert done.returncode == 0, done.stderr
        if state is not None:
            wait_until(lambda: agent.must("GET", f"/api/models/servers/{MODEL}")["state"] == "ready", "it is up")
    status = magictl("status", "--json")
    assert status.returncode == 0, status.stderr
    assert MODEL in status.stdout
    stopped = magictl("stop", "--all")
    assert stopped.returncode == 0, stopped.stderr
    assert agent.must("GET", f"/api/models/servers/{MODEL}")["state"] == "stopped"


def test_magictl_says_what_is_missing(magictl: Magictl) -> None:
    for words, token, word in ((("status",), None, "token"), (("enable", MODEL), "read", "admin")):
        refused = magictl(*words, token=token)
        assert refused.returncode == 1, refused.stdout
        assert word in refused.stderr


def test_magictl_takes_the_proxys_own_errors_for_the_agents(
    proxy: Proxy, agent: AgentProcess, magictl: Magictl
) -> None:
    agent.stop()
    try:
        away = magictl("status", "--json")
    finally:
        agent.start()
    assert away.returncode in (1, 3), away.stdout
    assert "systemctl status magi-agent" in json.dumps(away.stdout) + away.stderr
