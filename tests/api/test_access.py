"""Who may what: real users on the unix socket, real addresses on TCP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from magi_agent.agent import Agent
from magi_agent.api.access import Caller
from magi_agent.api.application import make_application
from magi_agent.api.forwarding import TrustedProxies
from magi_agent.api.listeners import Listeners
from magi_agent.api.peers import Peer, Peers
from magi_agent.api.routes import Access
from magi_agent.settings.loading import load_settings
from tests.api.client import Api
from tests.api.conftest import Serve

NOBODY = 65534
MEMBERS = 64_999
"""The id that the group magi has in these tests."""
READ = ("GET", "/api/models/registry", None)
CHANGE = ("PUT", "/api/models/api-one/tier", {"tier": "fast"})
OPEN = ("GET", "/health/live", None)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are for root alone."""
    folder = Path(tempfile.mkdtemp(prefix="magi-api-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def group_magi(tmp_path: Path) -> Iterator[int]:
    """Have the host know a group called magi: a file of groups of this mount namespace's own."""
    groups = tmp_path / "group"
    groups.write_text(f"{Path('/etc/group').read_text()}magi:x:{MEMBERS}:\n")
    groups.chmod(0o644)
    command("mount", "--bind", str(groups), "/etc/group")
    yield MEMBERS
    command("umount", "/etc/group")


def command(*argv: str) -> None:
    pid = os.spawnvp(os.P_WAIT, argv[0], argv)
    assert pid == 0, argv


async def ask_as(
    path: Path, request: tuple[str, str, object], *, uid: int, groups: tuple[int, ...] = ()
) -> tuple[int, str]:
    """Ask over a unix socket as another user; the status and the word of the error."""
    method, target, body = request
    more = ["-H", "Content-Type: application/json", "--data", json.dumps(body)] if body is not None else []
    process = await asyncio.create_subprocess_exec(
        "curl", "--silent", "--max-time", "30", "--unix-socket", str(path), "-w", "\n%{http_code}", "-X", method, *more,
        f"http://localhost{target}",
        user=uid, group=uid, extra_groups=groups, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate()
    content, _, status = output.decode().rpartition("\n")
    return int(status), json.loads(content).get("error", "") if content else ""


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_on_the_unix_socket_root_may_everything_and_others_may_read(serve: Serve, public_folder: Path) -> None:
    path = public_folder / "api.sock"
    await serve("api-one", socket=str(path))

    assert await ask_as(path, CHANGE, uid=NOBODY) == (0, ""), "the socket's mode lets nobody else in"
    path.chmod(0o666)
    assert await ask_as(path, READ, uid=NOBODY) == (200, "")
    assert await ask_as(path, OPEN, uid=NOBODY) == (200, "")
    assert await ask_as(path, CHANGE, uid=NOBODY) == (403, "Forbidden")
    assert await ask_as(path, ("POST", "/api/models/servers/stop-all", None), uid=NOBODY) == (403, "Forbidden")
    assert await ask_as(path, CHANGE, uid=NOBODY, groups=(MEMBERS,)) == (403, "Forbidden"), "there is no group magi"
    assert await ask_as(path, CHANGE, uid=0) == (200, "")


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_members_of_the_group_may_do_everything(serve: Serve, public_folder: Path, group_magi: int) -> None:
    path = public_folder / "api.sock"
    await serve("api-one", socket=str(path))

    found = path.stat()
    assert (found.st_gid, found.st_mode & 0o777) == (group_magi, 0o660)
    assert await ask_as(path, CHANGE, uid=NOBODY, groups=(group_magi,)) == (200, "")
    assert await ask_as(path, CHANGE, uid=NOBODY, groups=(group_magi + 1,)) == (0, "")


@pytest.mark.parametrize(
    ("access", "read", "change"),
    [
        ("none", (401, "Unauthorized"), (401, "Unauthorized")),
        ("read", (200, ""), (403, "Forbidden")),
        ("full", (200, ""), (200, "")),
    ],
)
@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_on_loopback_tcp_the_setting_decides(
    serve: Serve, access: str, read: tuple[int, str], change: tuple[int, str]
) -> None:
    api = await serve("api-one", tcp_access=access)

    assert await outcome(api, READ) == read
    assert await outcome(api, CHANGE) == change
    assert await outcome(api, OPEN) == (200, "")
    assert await outcome(api, ("GET", "/health/ready", None)) == (200, "")
    for path in ("/", "/api/docs", "/api/openapi.json"):
        assert (await api.ask("GET", path)).status == read[0]
    nowhere = await api.ask("GET", "/nope")
    assert nowhere.status == (401 if access == "none" else 404)
    if read[0] == 401:
        refused = await api.ask(*READ)
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        assert "api.tcp_access" in refused.body["message"]


@pytest.mark.parametrize(
    ("proxies", "said"), [("root=none", "PUT .*: 403, refused"), ("198.51.100.1=none", "PUT .*: 200")]
)
@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_who_has_left_may_have_been_a_proxy(
    serve: Serve, proxies: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that its client has closed is no user's; where none is named as a proxy's, nobody needs to know."""
    caplog.set_level("INFO")
    api = await serve("api-one", tcp_access="full", proxy_access=proxies)
    tcp = api.agent.settings.tcp
    assert tcp is not None
    method, path, content = CHANGE
    body = json.dumps(content)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    # Nothing here gives way to the agent, so it sees the connection after its end.
    with socket.create_connection((tcp.host, tcp.port)) as left:
        left.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    async with asyncio.timeout(5):
        while not re.search(said, caplog.text):  # noqa: ASYNC110  # the log tells nobody
            await asyncio.sleep(0.01)


async def outcome(api: Api, request: tuple[str, str, object], headers: dict[str, str] | None = None) -> tuple[int, str]:
    method, path, body = request
    reply = await api.ask(method, path, body, headers=headers)
    if reply.status >= 400:
        reply.failure(reply.status, reply.body["error"])
    return reply.status, reply.body.get("error", "")


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_a_page_of_another_site_may_not_use_a_browser_on_this_host(serve: Serve) -> None:
    api = await serve("api-one", cors_origins="https://front.example")
    tcp = str(api.agent.settings.tcp)

    for host in ("evil.example", "evil.example:8000", "10.0.0.1", "127.0.0.1.evil.example", "::1"):
        for request in (READ, CHANGE):
            assert await outcome(api, request, {"Host": host}) == (403, "Forbidden")
        assert await outcome(api, OPEN, {"Host": host}) == (200, "")
    for host in (tcp, "localhost", "localhost:8000", "magi.localhost", "[::1]:8000", "127.9.9.9"):
        assert await outcome(api, READ, {"Host": host}) == (200, "")
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        for request in (READ, CHANGE):
            assert await outcome(api, request, {"Origin": origin}) == (403, "Forbidden")
        assert await outcome(api, OPEN, {"Origin": origin}) == (200, "")
    for origin in ("https://front.example", f"http://{tcp}"):
        for request in (READ, CHANGE):
            assert await outcome(api, request, {"Origin": origin}) == (200, "")


@pytest.mark.parametrize(
    "header",
    [
        *("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X-Forwarded-Port", "X-Forwarded-Server"),
        *("X-Forwarded-Host", "X-Real-IP", "X-Client-IP", "CF-Connecting-IP", "Forwarded", "Via"),
    ],
)
@pytest.mark.parametrize("trusted", ["", "unix 127.0.0.1"])
async def test_what_comes_through_a_proxy_has_the_rights_of_nobody(serve: Serve, header: str, trusted: str) -> None:
    api = await serve("api-one", trusted_proxies=trusted)

    for request in (READ, CHANGE):
        assert await outcome(api, request, {header: "127.0.0.1"}) == (401, "Unauthorized")
    assert await outcome(api, OPEN, {header: "127.0.0.1"}) == (200, "")


def own_address() -> str | None:
    """An IPv4 address of this host that is not loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None


@asynccontextmanager
async def listening(agent: Agent, application: web.Application, channel: socket.socket) -> AsyncIterator[None]:
    """Serve on a socket that stands in for one that systemd hands over."""
    listeners = Listeners(application, agent.settings, {}, has_tokens=lambda: True)
    listeners._open = lambda: [channel]  # type: ignore[method-assign]
    await listeners.start()
    try:
        yield
    finally:
        await listeners.stop()


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_beyond_loopback_nothing_is_allowed_whatever_the_setting_says(serve: Serve) -> None:
    """A start without any token refuses such an address; with one, it takes that token still."""
    address = own_address()
    if address is None:
        pytest.skip("this host has no address but loopback")
    api = await serve("api-one")
    channel = socket.create_server(("", 0))
    port = channel.getsockname()[1]
    async with listening(api.agent, make_application(api.services), channel):
        beyond = Api(api.agent, api.session, f"http://{address}:{port}")
        for headers in ({}, {"Host": "localhost"}, {"X-Forwarded-For": "127.0.0.1"}):
            assert await outcome(beyond, READ, headers) == (401, "Unauthorized")
            assert await outcome(beyond, OPEN, headers) == (200, "")
        assert await outcome(Api(api.agent, api.session, f"http://127.0.0.1:{port}"), CHANGE) == (200, "")


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_loopback_is_loopback_in_either_family(serve: Serve) -> None:
    api = await serve("api-one")
    channel = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = channel.getsockname()[1]
    async with listening(api.agent, make_application(api.services), channel):
        for host in ("127.0.0.1", "[::1]"):
            assert await outcome(Api(api.agent, api.session, f"http://{host}:{port}"), CHANGE) == (200, "")


@pytest.mark.parametrize(
    ("peer", "said", "whom"),
    [
        (Peer("uid 7 (pid 8)", 7), None, "uid 7"),
        (Peer("127.0.0.1 (uid 7)", 7, address=ip_address("127.0.0.1")), None, "uid 7"),
        (Peer("127.0.0.9", address=ip_address("127.0.0.9")), None, "loopback"),
        (Peer("192.0.2.1", address=ip_address("192.0.2.1")), None, "192.0.2.1"),
        (Peer("192.0.2.1", address=ip_address("192.0.2.1")), "10.0.0.9", "192.0.2.1"),
        (Peer("10.0.0.1", address=ip_address("10.0.0.1")), "192.0.2.7, 10.0.0.9", "10.0.0.9"),
        (Peer("10.0.0.1", address=ip_address("10.0.0.1")), "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        (Peer("10.0.0.1", address=ip_address("10.0.0.1")), "nobody", "10.0.0.1"),
        (Peer("uid 33 (pid 8)", 33), "192.0.2.7", "192.0.2.7"),
    ],
)
def test_whom_it_counts_for(peer: Peer, said: str | None, whom: str) -> None:
    request = make_mocked_request("GET", "/", headers={"X-Forwarded-For": said} if said else {})
    assert TrustedProxies(["unix", "10.0.0.0/8"]).whom(request, peer) == whom


@dataclass(frozen=True, slots=True)
class ProxyWithRights:
    """What a later way to identify callers will be: the proxy's caller is known, and the headers are read as ever."""

    proxies: TrustedProxies
    peers: Peers

    def identify(self, request: web.BaseRequest) -> Caller:
        peer = self.peers.of(request.transport)
        return Caller(self.proxies.client(request, peer), Access.ADMIN, self.proxies.place(request, peer))


@pytest.mark.parametrize(
    ("trusted", "said", "prefix"),
    [
        ("unix", "/magi", "/magi"),
        ("unix", "/a/b-c/", "/a/b-c"),
        ("unix", "magi", ""),
        ("unix", "//evil.example", ""),
        ("unix", "/..", ""),
        ("unix", "/a b", ""),
        ("unix", "/" + "x" * 300, ""),
        ("unix", "https://evil.example", ""),
        ("127.0.0.0/8", "/magi", ""),
        ("", "/magi", ""),
    ],
)
@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_a_trusted_proxy_says_below_which_path_the_api_is_seen(
    serve: Serve, tmp_path: Path, trusted: str, said: str, prefix: str
) -> None:
    api = await serve("api-one")
    identify = ProxyWithRights(TrustedProxies(trusted.split()), Peers()).identify
    settings = load_settings({"socket": str(tmp_path / "proxied.sock"), "tcp": "off"}, {})
    listeners = Listeners(make_application(api.services, identify=identify), settings, {})
    await listeners.start()
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(settings.socket))) as session:
        proxied = Api(api.agent, session, "http://localhost")
        headers = {"X-Forwarded-Prefix": said}

        root = (await proxied.ask("GET", "/", headers=headers)).success()
        created = await proxied.ask("POST", "/api/models/profiles", {"name": "day"}, headers=headers)
        (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})).success()
        begun = await proxied.ask("POST", "/api/models/servers/start-all", headers=headers)
        document = (await proxied.ask("GET", "/api/openapi.json", headers=headers)).success()

    await listeners.stop()
    assert root["docs"] == f"{prefix}/api/docs"
    assert created.headers["Location"] == f"{prefix}/api/models/profiles/day"
    assert begun.headers["Location"].startswith(f"{prefix}/api/operations/")
    assert document["servers"] == [{"url": prefix or "/"}]


@pytest.mark.parametrize(
    ("trusted", "told"),
    [
        ("127.0.0.1", ["203.0.113.9 through 127.0.0.1 (uid 0)"] * 2 + ["127.0.0.1 (uid 0)"] * 2),
        ("unix 192.0.2.0/24", ["127.0.0.1 (uid 0)"] * 4),
    ],
)
@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_the_log_names_the_client_behind_a_trusted_proxy(
    serve: Serve, caplog: pytest.LogCaptureFixture, trusted: str, told: list[str]
) -> None:
    api = await serve("api-one", trusted_proxies=trusted)
    caplog.set_level("DEBUG", "magi_agent.api")

    for said in ("203.0.113.9", "evil, 203.0.113.9", "203.0.113.9\tuid 0", "root"):
        await api.ask("GET", "/health/live", headers={"X-Forwarded-For": said})

    lines = [record.getMessage() for record in caplog.records if "/health/live" in record.getMessage()]
    assert [line.rpartition("for ")[2] for line in lines] == told


async def test_other_origins_are_told_nothing_by_default(serve: Serve) -> None:
    api = await serve()
    asking = {"Origin": "https://front.example", "Access-Control-Request-Method": "PUT"}

    preflight = await api.ask("OPTIONS", "/api/models/registry", headers=asking)
    reply = await api.ask("GET", "/api/models/registry", headers={"Origin": "https://front.example"})

    if api.base == "http://localhost":
        preflight.failure(405, "MethodNotAllowed")
    else:
        preflight.failure(403, "Forbidden")
    for answered in (preflight, reply):
        assert not [name for name in answered.headers if name.lower().startswith("access-control")]


async def test_named_origins_may_use_the_api_from_a_browser(serve: Serve) -> None:
    api = await serve("api-one", cors_origins="https://front.example", tcp_access="full")
    asking = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}

    preflight = await api.ask(
        "OPTIONS", "/api/models/api-one/tier", headers={**asking, "Origin": "https://front.example"}
    )
    refused = await api.ask("OPTIONS", "/api/models/api-one/tier", headers={**asking, "Origin": "https://evil.example"})
    reply = await api.ask("GET", "/api/models/registry", headers={"Origin": "https://front.example"})
    missing = await api.ask("GET", "/api/models/api-none", headers={"Origin": "https://front.example"})
    other = await api.ask("GET", "/api/models/registry", headers={"Origin": "https://evil.example"})

    assert (preflight.status, preflight.content) == (204, b"")
    assert "PUT" in preflight.headers["Access-Control-Allow-Methods"]
    assert "Content-Type" in preflight.headers["Access-Control-Allow-Headers"]
    for answered in (preflight, reply, missing):
        assert answered.headers["Access-Control-Allow-Origin"] == "https://front.example"
        assert answered.headers["Vary"] == "Origin"
        assert answered.headers["X-Request-ID"]
    for answered in (refused, other):
        assert "Access-Control-Allow-Origin" not in answered.headers
        assert answered.headers["Vary"] == "Origin"
