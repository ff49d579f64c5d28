"""A proxy that runs as a user of its own: on the socket it is a proxy with every word, and has what it was granted."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, wait_until
from tests.proxies.conftest import MODEL, Bearer
from tests.proxies.proxy_process import Proxy, running
from tests.proxies.shipped import NAME, Surroundings

USER = "www-data"
READ = "/api/models/registry"
CHANGE = ("PUT", f"/magi/api/models/{MODEL}/tier", {"tier": "fast"})
ORIGIN = f"https://{NAME}"

MEMBERS = 64_997
"""The id that the group magi has in these tests."""

Grant = Callable[[str], None]


@pytest.fixture(scope="module", autouse=True)
def group_magi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have the proxy's user be a member of magi, by a file of groups of this mount namespace's own."""
    groups = tmp_path_factory.mktemp("groups") / "group"
    others = [line for line in Path("/etc/group").read_text().splitlines() if not line.startswith("magi:")]
    groups.write_text("\n".join([*others, f"magi:x:{MEMBERS}:{USER}", ""]))
    groups.chmod(0o644)
    subprocess.run(["mount", "--bind", groups, "/etc/group"], check=True, timeout=30)
    yield
    subprocess.run(["umount", "/etc/group"], check=True, timeout=30)


@pytest.fixture
def grant(agent: AgentProcess) -> Iterator[Grant]:
    """Has the agent's configuration say what callers through this user's proxy may do."""
    file = agent.folder / "agent.toml"

    def reloads() -> int:
        return agent.log.read_text().count("the configuration was reloaded")

    def say(text: str) -> None:
        assert agent.process is not None
        before = reloads()
        file.write_text(text)
        agent.process.send_signal(signal.SIGHUP)
        wait_until(lambda: reloads() > before, "the configuration is read again")

    yield lambda rights: say(f'[api]\nproxy_access = "{rights}"\n')
    say("")


@pytest.fixture
def proxy(kind: str, agent: AgentProcess, surroundings: Surroundings, tmp_path: Path) -> Iterator[Proxy]:
    """The proxy, run by a user that the socket lets in as a member of its group, and nobody else."""
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        pytest.skip(f"this host has no user {USER}")
    folder = agent.folder / tmp_path.name
    folder.mkdir()
    own = [shutil.copy(path, folder) for path in (surroundings.certificate, surroundings.key)]
    for path in (folder, *own):
        os.chown(path, user.pw_uid, user.pw_gid)
    assert (agent.socket.stat().st_gid, agent.socket.stat().st_mode & 0o777) == (MEMBERS, 0o660)
    here = replace(surroundings, certificate=Path(own[0]), key=Path(own[1]))
    with running(Proxy(kind, folder, here, user=USER)) as started:
        yield started


def directly(agent: AgentProcess, path: str) -> tuple[int, dict[str, object]]:
    """Ask the agent as that user, without a proxy and without a word of one."""
    run = subprocess.run(
        ["curl", "--silent", "--max-time", "30", "--unix-socket", agent.socket, "--write-out", "\n%{http_code}",
         f"http://localhost{path}"],
        user=USER, group=USER, extra_groups=[MEMBERS], capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    body, _, status = run.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_without_a_grant_it_gets_in_and_may_do_nothing(proxy: Proxy, agent: AgentProcess, bearer: Bearer) -> None:
    refused = proxy.ask("GET", f"/magi{READ}")
    changed = proxy.ask(*CHANGE, bearer())

    assert (refused.status, refused.body["error"]) == (401, "Unauthorized")
    assert proxy.ask("GET", "/magi/health/live").status == 200
    assert (changed.status, changed.body["tier"]) == (200, "fast")
    assert directly(agent, READ)[0] == 401, "it needs no header to be known as a proxy"


def test_what_it_is_granted_is_for_its_callers_and_no_more(
    proxy: Proxy, agent: AgentProcess, bearer: Bearer, grant: Grant
) -> None:
    grant(f"{USER}=read")

    assert proxy.ask("GET", f"/magi{READ}").status == 200
    assert directly(agent, READ)[0] == 200
    refused = proxy.ask(*CHANGE)
    assert (refused.status, refused.body["error"]) == (403, "Forbidden")
    assert proxy.ask(*CHANGE, bearer()).status == 200
    bad = proxy.ask("GET", f"/magi{READ}", headers={"Authorization": "Bearer nobodys"})
    assert bad.status == 401, "a token that does not hold is no way to be somebody without one"


def test_a_page_of_another_site_gains_nothing_by_the_grant(proxy: Proxy, grant: Grant) -> None:
    """Neither by a name of its own that leads to the proxy, nor by asking the proxy from its own site."""
    grant(f"{USER}=admin")

    for host in ("evil.example", f"evil.example:{proxy.here.port}", "127.0.0.1", "localhost"):
        answered = proxy.ask("GET", f"/magi{READ}", headers={"Host": host})
        assert answered.status in (200, 421), host
        assert MODEL not in str(answered.body), host
    for origin in ("https://evil.example", "null", f"http://{NAME}.evil.example", f"{ORIGIN}:1"):
        headers = {"Origin": origin, "X-Forwarded-Host": origin.partition("://")[2]}
        refused = proxy.ask(*CHANGE, headers)
        assert (refused.status, refused.body["error"]) == (403, "Forbidden"), origin
        read = proxy.ask("GET", f"/magi{READ}", headers=headers)
        assert not [name for name in read.headers if name.startswith("access-control")], origin
    assert proxy.ask(*CHANGE, {"Origin": ORIGIN}).status == 200
    port = proxy.here.port
    assert proxy.ask(*CHANGE, {"Origin": f"{ORIGIN}:{port}", "Host": f"{NAME}:{port}"}).status == 200


def test_a_user_that_is_not_named_as_a_proxys_has_its_own_rights_and_its_callers_none(
    proxy: Proxy, agent: AgentProcess, grant: Grant
) -> None:
    """Why docs/reverse-proxy.md has a proxy's user named before it becomes a member."""
    grant("someone-else=none")

    assert directly(agent, READ)[0] == 200
    for request in (("GET", f"/magi{READ}"), CHANGE):
        assert proxy.ask(*request).status == 401


def test_a_proxy_that_the_socket_keeps_out_says_that_the_agent_does_not_answer(
    proxy: Proxy, agent: AgentProcess
) -> None:
    agent.socket.chmod(0o600)
    try:
        away = proxy.ask("GET", "/magi/health/live")
    finally:
        agent.socket.chmod(0o660)
    assert (away.status, away.body["error"]) == (503, "ServiceUnavailable")
    # Caddy says why with the global option debug alone.
    assert proxy.kind == "caddy" or "Permission denied" in proxy.log.read_text()
