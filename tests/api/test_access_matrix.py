"""Who may what, as a table: where a request comes from, the token it brings, what it asks for, and the answer."""

from __future__ import annotations

import asyncio
import json
import pwd
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from magi_agent.api.access import AccessDenied, Caller, Forbidden, Unauthorized, require
from magi_agent.api.routes import Access
from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.conftest import Serve
from tests.conftest import PortRanges

NOBODY = pwd.getpwnam("nobody").pw_uid
PROXY = pwd.getpwnam("www-data").pw_uid
MEMBERS = 64_999
"""The id that the group magi has in these tests."""
SECRETS = {name: new_secret() for name in ("read", "infer", "admin", "ended", "newer", "unknown")}
TOKENS = (
    Token("read", TokenScope.READ, digest_of(SECRETS["read"]), datetime.now(UTC) + timedelta(hours=1)),
    Token("infer", TokenScope.INFER, digest_of(SECRETS["infer"])),
    Token("admin", TokenScope.ADMIN, digest_of(SECRETS["admin"])),
    Token("ended", TokenScope.ADMIN, digest_of(SECRETS["ended"]), datetime.now(UTC) - timedelta(seconds=1)),
    # What it is held to, a newer agent knows.
    Token("newer", TokenScope.ADMIN, digest_of(SECRETS["newer"]), unknown=("hosts=10.0.0.0/8",)),
)

REQUESTS = {
    "health": ("GET", "/health/live", None),
    "root": ("GET", "/", None),
    "nowhere": ("GET", "/nope", None),
    "read": ("GET", "/api/models/registry", None),
    "head": ("HEAD", "/api/models/servers", None),
    "infer": ("POST", "/v1/completions", {}),
    "put": ("PUT", "/api/models/api-one/tier", {"tier": "fast"}),
    "post": ("POST", "/api/models/rescan", None),
    "delete": ("DELETE", "/api/models/profiles/none", None),
}
COLUMNS = tuple(REQUESTS)
#                    health root nowhere read head infer put  post delete
NOTHING = dict(zip(COLUMNS, (200, 401, 401, 401, 401, 401, 401, 401, 401), strict=True))
REFUSED = {what: 403 if status == 401 else status for what, status in NOTHING.items()}
READING = dict(zip(COLUMNS, (200, 200, 404, 200, 200, 403, 403, 403, 403), strict=True))
# Who may use models is told that the request names none.
USING = dict(zip(COLUMNS, (200, 200, 404, 403, 403, 400, 403, 403, 403), strict=True))
BOTH = dict(zip(COLUMNS, (200, 200, 404, 200, 200, 400, 403, 403, 403), strict=True))
EVERYTHING = dict(zip(COLUMNS, (200, 200, 404, 200, 200, 400, 200, 200, 404), strict=True))

BY_TOKEN = {
    "read": READING,
    "infer": USING,
    "admin": EVERYTHING,
    "ended": NOTHING,
    "newer": NOTHING,
    "unknown": NOTHING,
}
"""Wherever a request comes from."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where requests come from, and what is configured there."""

    entry: str
    """``unix``, ``loopback`` or ``beyond``."""
    without_token: Mapping[str, int]
    uid: int = 0
    groups: tuple[int, ...] = ()
    headers: Mapping[str, str] | None = None
    settings: Mapping[str, str] | None = None


PASSED_ON = {"X-Forwarded-For": "203.0.113.9"}
PLACES = {
    "unix, root": Place("unix", EVERYTHING),
    "unix, group": Place("unix", EVERYTHING, NOBODY, (MEMBERS,)),
    "unix, other": Place("unix", READING, NOBODY),
    "unix, proxy's user": Place("unix", NOTHING, PROXY),
    "unix, proxy's user in the group": Place("unix", NOTHING, PROXY, (MEMBERS,)),
    "unix, proxy's user, named none": Place("unix", NOTHING, PROXY, settings={"proxy_access": "www-data=none"}),
    "unix, proxy's user, named read": Place("unix", READING, PROXY, settings={"proxy_access": "www-data=read"}),
    "unix, proxy's user, named infer": Place("unix", USING, PROXY, settings={"proxy_access": "www-data=infer"}),
    "unix, proxy's user, named admin": Place(
        "unix", EVERYTHING, PROXY, headers=PASSED_ON, settings={"proxy_access": "unix=read www-data=admin"}
    ),
    "unix, a user that is no proxy's": Place("unix", READING, PROXY, settings={"proxy_access": ""}),
    "unix, passed on by root": Place("unix", NOTHING, headers=PASSED_ON),
    "unix, passed on by the group": Place("unix", NOTHING, NOBODY, (MEMBERS,), headers=PASSED_ON),
    "unix, passed on by root, unix named": Place(
        "unix", READING, headers=PASSED_ON, settings={"proxy_access": "127.0.0.1=admin unix=read"}
    ),
    "unix, root, unix named": Place("unix", EVERYTHING, settings={"proxy_access": "unix=read"}),
    "unix, passed on by root, another named": Place(
        "unix", NOTHING, headers=PASSED_ON, settings={"proxy_access": "www-data=admin 127.0.0.1=admin"}
    ),
    "loopback, none": Place("loopback", NOTHING, settings={"tcp_access": "none"}),
    "loopback, read": Place("loopback", READING, settings={"tcp_access": "read"}),
    "loopback, infer": Place("loopback", BOTH, settings={"tcp_access": "infer"}),
    "loopback, full": Place("loopback", EVERYTHING, settings={"tcp_access": "full"}),
    "loopback, foreign host": Place("loopback", REFUSED, headers={"Host": "evil.example"}),
    "loopback, foreign page": Place("loopback", REFUSED, headers={"Origin": "https://evil.example"}),
    "loopback, proxy's user": Place("loopback", NOTHING, PROXY),
    "loopback, proxy's user, named": Place("loopback", READING, PROXY, settings={"proxy_access": "www-data=read"}),
    "loopback, passed on": Place("loopback", NOTHING, headers=PASSED_ON),
    "loopback, passed on, named": Place(
        "loopback", READING, headers=PASSED_ON, settings={"proxy_access": "10.0.0.0/8=admin 127.0.0.1=read"}
    ),
    "loopback, not passed on, named": Place(
        "loopback", READING, settings={"proxy_access": "127.0.0.1=admin", "tcp_access": "read"}
    ),
    "loopback, passed on, unix named": Place(
        "loopback", NOTHING, headers=PASSED_ON, settings={"proxy_access": "unix=admin"}
    ),
    "beyond": Place("beyond", NOTHING, settings={"tcp_access": "full"}),
    "beyond, says localhost": Place("beyond", NOTHING, headers={"Host": "localhost"}, settings={"tcp_access": "full"}),
    "beyond, passed on": Place("beyond", NOTHING, headers=PASSED_ON, settings={"proxy_access": "127.0.0.1=admin"}),
    "beyond, passed on, named": Place(
        "beyond", READING, headers=PASSED_ON, settings={"proxy_access": "0.0.0.0/0=read"}
    ),
}


def own_address() -> str | None:
    """An IPv4 address of this host that is not loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are for root alone."""
    folder = Path(tempfile.mkdtemp(prefix="magi-api-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with the group magi."""
    monkeypatch.setattr("magi_agent.api.application.group_id", lambda: MEMBERS)


async def statuses(place: Place, socket_path: Path, tcp: str, token: str | None) -> dict[str, int]:
    """Ask for everything from one place; the status of each answer."""
    host = "localhost" if place.entry == "unix" else tcp
    common = ["--silent", "--max-time", "30", "-o", "/dev/null", "-w", "%{http_code}\n"]
    common += ["--unix-socket", str(socket_path)] if place.entry == "unix" else []
    for name, value in (place.headers or {}).items():
        common += ["-H", f"{name}: {value}"]
    if token is not None:
        common += ["-H", f"Authorization: Bearer {SECRETS[token]}"]
    words: list[str] = []
    for method, path, body in REQUESTS.values():
        words += ["--next"] if words else []
        words += [*common, *(["--head"] if method == "HEAD" else ["-X", method])]
        if body is not None:
            words += ["-H", "Content-Type: application/json", "--data", json.dumps(body)]
        words.append(f"http://{host}{path}")
    process = await asyncio.create_subprocess_exec(
        "curl", *words, user=place.uid, group=place.uid, extra_groups=place.groups, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return dict(zip(REQUESTS, map(int, output.split()), strict=True))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_the_table_of_who_may_what(
    serve: Serve, public_folder: Path, tmp_path: Path, unused_ports: PortRanges, where: str
) -> None:
    place = PLACES[where]
    path, (port, _) = public_folder / "api.sock", unused_ports()
    host = own_address() if place.entry == "beyond" else "127.0.0.1"
    if host is None:
        pytest.skip("this host has no address but loopback")
    tcp = f"0.0.0.0:{port}" if place.entry == "beyond" else f"127.0.0.1:{port}"
    (tmp_path / "tokens").write_text("".join(f"{line_of(token)}\n" for token in TOKENS))
    (tmp_path / "tokens").chmod(0o640)
    settings = {"tcp_access": "read", "socket": str(path), "tcp": tcp, **(place.settings or {})}
    await serve("api-one", loaded=True, **settings)
    path.chmod(0o666)

    seen = {token: await statuses(place, path, f"{host}:{port}", token) for token in (None, *BY_TOKEN)}

    assert seen.pop(None) == place.without_token
    assert seen == BY_TOKEN


@pytest.mark.parametrize(
    ("access", "asks", "refusal"),
    [
        *((access, Access.OPEN, None) for access in (Access.OPEN, Access.READ, Access.INFER, Access.ADMIN)),
        *((Access.OPEN, asks, Unauthorized) for asks in (Access.KNOWN, Access.READ, Access.INFER, Access.ADMIN)),
        (Access.READ, Access.KNOWN, None),
        (Access.INFER, Access.KNOWN, None),
        (Access.ADMIN, Access.KNOWN, None),
        (Access.READ, Access.READ, None),
        (Access.READ, Access.INFER, Forbidden),
        (Access.READ, Access.ADMIN, Forbidden),
        (Access.INFER, Access.READ, Forbidden),
        (Access.INFER, Access.INFER, None),
        (Access.INFER, Access.ADMIN, Forbidden),
        (Access.ADMIN, Access.READ, None),
        (Access.ADMIN, Access.INFER, None),
        (Access.ADMIN, Access.ADMIN, None),
    ],
)
def test_what_a_right_includes(access: Access, asks: Access, refusal: type[AccessDenied] | None) -> None:
    caller = Caller("somebody", access, hint="as it is")
    if refusal is None:
        require(caller, asks)
        return
    with pytest.raises(refusal) as refused:
        require(caller, asks)
    if refusal is Forbidden:
        assert refused.value.details == {"needs": str(asks.name).lower(), "has": str(access.name).lower()}
        assert f"this needs {str(asks.name).lower()} access" in str(refused.value)
