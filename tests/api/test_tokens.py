"""Bearer tokens on the wire: how one is brought, what is said of one that does not hold, and where none ever shows."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import locations
import pytest
from aiohttp import web

from magi_agent.api import answering
from magi_agent.api.about_routes import AboutRoutes
from magi_agent.api.application import make_application
from magi_agent.api.listeners import Listeners
from magi_agent.api.routes import Access, Route
from magi_agent.errors import ConfigurationError
from magi_agent.systemd.socket_activation import InheritedSocket
from magi_agent.tokens import Token, digest_of, line_of, new_secret, written
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, Answer, ended, remove_units, wait_until
from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

REGISTRY = "/api/models/registry"
TIER = "/api/models/api-one/tier"
RESCAN = "/api/models/rescan"
SECRET, OTHER = new_secret(), new_secret()
YESTERDAY = datetime.now(UTC) - timedelta(days=1)
UNIT = "tokens-agent.service"


def keep(folder: Path, *tokens: Token) -> Path:
    """Write a file of tokens, as `magictl token` would leave it."""
    path = folder / "tokens"
    path.write_text("".join(f"{line_of(token)}\n" for token in tokens))
    path.chmod(0o640)
    return path


def token(name: str, scope: TokenScope, secret: str, until: datetime | None = None) -> Token:
    return Token(name, scope, digest_of(secret), until)


@pytest.fixture
def two(tmp_path: Path) -> None:
    """A token that may do everything, and one that did until yesterday."""
    keep(tmp_path, token("ops", TokenScope.ADMIN, SECRET), token("old", TokenScope.ADMIN, OTHER, YESTERDAY))


async def with_authorization(api: Api, *values: str) -> Reply:
    """Ask for what reading is needed for, with these headers."""
    headers = [("Authorization", value) for value in values]
    async with api.session.get(api.base + REGISTRY, headers=headers) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


@pytest.mark.parametrize(
    "value",
    [f"Bearer {SECRET}", f"bearer {SECRET}", f"BEARER {SECRET}", f"BeArEr   {SECRET}", f"Bearer {SECRET} "],
    ids=["usual", "lower case", "upper case", "blanks before", "blank behind"],
)
@pytest.mark.usefixtures("two")
async def test_a_token_counts_however_its_scheme_is_written(serve: Serve, value: str) -> None:
    api = await serve(tcp_access="none")

    (await with_authorization(api, value)).success()


@pytest.mark.parametrize(
    "values",
    [
        (f"Bearer {OTHER}x",),
        (f"Bearer {SECRET[:-1]}",),
        (f"Bearer {SECRET}=",),
        (f"Bearer {SECRET} {SECRET}",),
        (f"Bearer {SECRET},{SECRET}",),
        ("Bearer",),
        ("Bearer ",),
        (f"Bearer\t{SECRET}",),
        (SECRET,),
        ("",),
        ("Bearer sha256:" + digest_of(SECRET).hex(),),
        ("Bearer " + digest_of(SECRET).hex(),),
        ("Bearer " + "x" * 5000,),
        (f"Bearer {SECRET}", f"Bearer {SECRET}"),
        ("Basic eDp5", f"Bearer {SECRET}"),
        (f"Bearer {SECRET}", "Basic eDp5"),
    ],
    ids=range(16),
)
@pytest.mark.usefixtures("two")
async def test_a_bad_token_never_falls_back_to_what_one_may_do_without_it(
    serve: Serve, values: tuple[str, ...]
) -> None:
    api = await serve(tcp_access="full")
    (await api.ask("GET", REGISTRY)).success()

    refused = await with_authorization(api, *values)

    assert refused.failure(401, "Unauthorized") == {}
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="magi-agent", error="invalid_token"'
    assert "magictl token list" in refused.body["message"]
    assert SECRET not in refused.content.decode()


@pytest.mark.parametrize(
    "value", ["Basic eDp5", "Negotiate YII", f"Digest {SECRET}"], ids=["Basic", "Negotiate", "Digest"]
)
@pytest.mark.usefixtures("two")
async def test_another_scheme_is_the_matter_of_a_proxy_and_says_nothing_here(serve: Serve, value: str) -> None:
    api = await serve(tcp_access="read")

    (await with_authorization(api, value)).success()
    (await api.ask("GET", REGISTRY, headers={"Authorization": value, "Via": "1.1 proxy"})).failure(401, "Unauthorized")


@pytest.mark.usefixtures("two")
async def test_a_token_past_its_end_is_said_to_be(serve: Serve) -> None:
    api = await serve()

    refused = await with_authorization(api, f"Bearer {OTHER}")

    refused.failure(401, "Unauthorized")
    assert refused.body["message"].startswith(f"the token old ended at {written(YESTERDAY)}")
    assert (await api.ask("GET", "/health/live", headers={"Authorization": f"Bearer {OTHER}"})).status == 200


async def test_a_token_ends_while_the_agent_runs(serve: Serve, tmp_path: Path) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=3)).replace(microsecond=0)
    keep(tmp_path, token("brief", TokenScope.READ, SECRET, soon))
    api = await serve()

    assert (await with_authorization(api, f"Bearer {SECRET}")).status == 200

    async def is_over() -> bool:
        return datetime.now(UTC) >= soon

    await until(is_over, "it ends")
    assert (await with_authorization(api, f"Bearer {SECRET}")).status == 401


async def test_what_is_not_allowed_says_what_is_needed_and_what_the_token_has(serve: Serve, tmp_path: Path) -> None:
    keep(tmp_path, token("front", TokenScope.READ, SECRET), token("chat", TokenScope.INFER, OTHER))
    api = await serve("api-one")

    change = await api.ask("PUT", TIER, {"tier": "fast"}, headers={"Authorization": f"Bearer {SECRET}"})
    reading = await api.ask("GET", REGISTRY, headers={"Authorization": f"Bearer {OTHER}"})

    assert change.failure(403, "Forbidden") == {"needs": "admin", "has": "read"}
    assert change.body["message"] == "this needs admin access: the token front has the scope read"
    assert change.headers["WWW-Authenticate"] == 'Bearer realm="magi-agent", error="insufficient_scope"'
    assert reading.failure(403, "Forbidden") == {"needs": "read", "has": "infer"}
    assert reading.body["message"] == "this needs read access: the token chat has the scope infer"


@pytest.mark.usefixtures("two")
async def test_without_a_token_nothing_is_said_of_a_bad_one(serve: Serve) -> None:
    api = await serve(tcp_access="none")

    refused = await api.ask("GET", REGISTRY, headers={"X-Forwarded-For": "203.0.113.9"})

    refused.failure(401, "Unauthorized")
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="magi-agent"'
    assert "api.proxy_access" in refused.body["message"]


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
@pytest.mark.usefixtures("two")
async def test_a_bearer_is_known_whatever_host_and_origin_are_asked_for(serve: Serve) -> None:
    api = await serve("api-one", tcp_access="none")
    headers = {"Authorization": f"Bearer {SECRET}", "Host": "gpu.example:8000", "Origin": "https://front.example"}

    (await api.ask("PUT", TIER, {"tier": "fast"}, headers=headers)).success()


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
@pytest.mark.parametrize(
    ("origin", "more", "status"),
    [
        ("https://magi.example", {"Host": "magi.example"}, 200),
        ("https://magi.example", {"X-Forwarded-Host": "magi.example"}, 200),
        ("https://front.example", {}, 200),
        ("https://evil.example", {"Host": "magi.example", "X-Forwarded-Host": "magi.example"}, 403),
        ("https://magi.example", {}, 403),
        ("null", {"Host": "magi.example"}, 403),
    ],
)
async def test_through_a_proxy_with_rights_no_page_of_another_site_does_anything(
    serve: Serve, origin: str, more: Mapping[str, str], status: int
) -> None:
    api = await serve(
        "api-one", proxy_access="unix=admin", trusted_proxies="unix", cors_origins="https://front.example"
    )
    headers = {"X-Forwarded-For": "203.0.113.9", "Origin": origin, **more}

    assert (await api.ask("PUT", TIER, {"tier": "fast"}, headers=headers)).status == status
    assert (await api.ask("GET", REGISTRY, headers=headers)).status == status
    assert (await api.ask("GET", "/health/live", headers=headers)).status == 200


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
async def test_a_host_that_an_untrusted_proxy_claims_counts_for_nothing(serve: Serve) -> None:
    api = await serve("api-one", proxy_access="unix=admin")
    headers = {"X-Forwarded-For": "1.2.3.4", "Origin": "https://evil.example", "X-Forwarded-Host": "evil.example"}

    assert (await api.ask("PUT", TIER, {"tier": "fast"}, headers=headers)).status == 403


MALFORMED = [
    f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\x01\r\n\r\n",
    f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {SECRET}\r\n\r\n",
    f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}{'x' * 9000}\r\n\r\n",
    f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\nfoo\r\n\r\n",
    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Api-Key: {SECRET}\x01\r\n\r\n",
    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Api-Key : {SECRET}\r\n\r\n",
    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Api-Key: {SECRET}{'x' * 9000}\r\n\r\n",
    f"GET /?access_token={SECRET} HTTP/9.1\r\nHost: x\r\n\r\n",
    f"{SECRET}\r\n\r\n",
]


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
@pytest.mark.usefixtures("two")
async def test_no_token_is_in_an_answer_or_in_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    api = await serve("api-one", tcp_access="full", trusted_proxies="127.0.0.1")
    logging.getLogger().setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    host, _, port = str(api.agent.settings.tcp).rpartition(":")
    said = b""
    for request in MALFORMED:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        said += await asyncio.wait_for(reader.read(), 30)
        writer.close()
    for value in (f"Bearer {SECRET}", f"Bearer {SECRET}x", f"Bearer {OTHER}", SECRET, f"Basic {SECRET}"):
        for headers in ({}, {"X-Forwarded-For": "203.0.113.9"}):
            for method, path in (("PUT", TIER), ("GET", REGISTRY), ("GET", f"/nope?access_token={SECRET}")):
                reply = await api.ask(method, path, {"tier": 5}, headers={"Authorization": value, **headers})
                said += reply.content + str(reply.headers).encode()
            for method, path in (("PUT", TIER), ("GET", "/v1/models"), ("POST", "/v1/messages"), ("GET", "/v1/nope")):
                for more in ({}, {"Authorization": f"Bearer {OTHER}"}):
                    key = {"X-Api-Key": value.removeprefix("Bearer "), **more}
                    reply = await api.ask(method, path, {"model": "nobody"}, headers={**key, **headers})
                    said += reply.content + str(reply.headers).encode()
    await api.ask("GET", "/api/models/registry", headers={"Authorization": f"Bearer {SECRET}", "Expect": "nonsense"})

    assert b'"BadRequest"' in said
    assert b"Invalid header value char" in said
    written_down = (
        said
        + "\n".join(
            [*(record.getMessage() + str(vars(record)) for record in caplog.records), *capfd.readouterr()]
        ).encode()
    )
    assert b"token ops from 127.0.0.1" in written_down
    for secret in (SECRET, OTHER):
        assert secret.encode() not in written_down
        assert digest_of(secret).hex().encode() not in written_down
        assert secret[5:25].encode() not in written_down


@pytest.mark.usefixtures("two")
async def test_refused_requests_are_logged_but_leave_room_for_others(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-one")
    caplog.set_level(logging.INFO, "magi_agent.api")
    headers = {"Authorization": f"Bearer {OTHER}x"}

    for _ in range(40):
        await api.ask("GET", REGISTRY, headers=headers)
    (await api.ask("PUT", TIER, {"tier": "fast"})).success()

    lines = [record.getMessage() for record in caplog.records]
    refused = [line for line in lines if ": 401, refused to " in line]
    assert len(refused) == 30
    assert refused[0].endswith(", who brought a token that does not hold")
    assert any(line.startswith(f'PUT {TIER} {{"tier": "fast"}}: 200 in ') for line in lines)
    monkeypatch.setattr(answering, "_MINUTE", 0.0)
    await api.ask("GET", REGISTRY, headers=headers)
    assert "10 more requests were refused in that minute" in [record.getMessage() for record in caplog.records]


async def test_a_change_that_was_broken_off_is_logged_too(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        arrived.set()
        await asyncio.Event().wait()
        return web.Response()

    routes = AboutRoutes.routes
    slow = Route("POST", "/api/hang", hang, Access.ADMIN, "Never end", "agent", {200: None})
    monkeypatch.setattr(AboutRoutes, "routes", lambda self: (*routes(self), slow))
    monkeypatch.setattr("magi_agent.api.listeners._END_OF_REQUESTS", 0.1)
    api = await serve()
    caplog.set_level(logging.INFO, "magi_agent.api")

    asking = asyncio.create_task(api.ask("POST", "/api/hang"))
    await arrived.wait()
    await api.agent._listeners.stop()
    _ = await asyncio.gather(asking, return_exceptions=True)

    [line] = [record.getMessage() for record in caplog.records if "/api/hang" in record.getMessage()]
    assert line.startswith("POST /api/hang: broken off, for ")


async def refusal(api: Api, channel: socket.socket) -> str:
    """What a start says that is handed this socket and has no tokens."""
    listeners = Listeners(make_application(api.services), api.agent.settings, {})
    listeners._open = lambda: [channel]  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError) as refused:
        await listeners.start()
    assert channel.fileno() == -1, "it is closed"
    return str(refused.value)


@pytest.mark.parametrize("listener", ["unix"], indirect=True)
@pytest.mark.parametrize("address", ["0.0.0.0", "::", "::ffff:0.0.0.0"])
async def test_no_socket_that_others_reach_is_listened_on_without_a_token(serve: Serve, address: str) -> None:
    api = await serve()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    for kind in (socket.socket, InheritedSocket):
        channel = kind(family, socket.SOCK_STREAM)
        channel.bind((address, 0))
        socket.socket.listen(channel)
        said = await refusal(api, channel)
        assert "\n" not in said
        assert str(api.agent.settings.tokens_path) in said
        for word in ("api.tokens_path", "magictl token add", "127.0.0.1"):
            assert word in said
        assert ("systemd handed over" in said) is (kind is InheritedSocket)
        assert ("api.tcp (MAGI_TCP)" in said) is (kind is socket.socket)


@dataclass
class TokenAgent(AgentProcess):
    """An agent that other hosts reach."""

    port: int = 0

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    def over_tcp(self, method: str, path: str, secret: str | None = None, **headers: str) -> Answer:
        """Ask over TCP."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if secret is not None:
            given["Authorization"] = f"Bearer {secret}"
        try:
            connection.request(method, path, headers=given)
            response = connection.getresponse()
            content = response.read()
            return Answer(response.status, {}, json.loads(content) if content else None)
        finally:
            connection.close()

    def status(self, secret: str) -> int:
        """What a bearer is answered who wants to read."""
        return self.over_tcp("GET", REGISTRY, secret).status

    def reload(self) -> list[str]:
        """Have it read its configuration again; what it then has to say."""
        assert self.process is not None
        before = self.log.read_text().count("the configuration was ")
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log.read_text().count("the configuration was ") > before, "it has read it again")
        problems: list[str] = self.ask("GET", "/health/ready").body["problems"]
        return [problem for problem in problems if "token" in problem]


@pytest.fixture
def elsewhere(
    systemd_user: SystemdUser, tmp_path: Path, unused_ports: PortRanges, llama_server: Path
) -> Iterator[TokenAgent]:
    """An agent on all addresses of a port, not started yet, with one token."""
    (tmp_path / "models").mkdir()
    port, _ = unused_ports()
    agent = TokenAgent(tmp_path, tmp_path / "models", unused_ports(4), llama_server, port=port)
    agent.settings = {
        "MAGI_TCP": f"0.0.0.0:{port}",
        "MAGI_TCP_ACCESS": "none",
        "MAGI_SYSTEMD_SCOPE": "user",
        "MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal),
    }
    keep(tmp_path, token("one", TokenScope.READ, SECRET))
    with ended(agent, "magi-llama-tokens-*"):
        yield agent


def fails(agent: TokenAgent) -> str:
    """The one line that a start ends with that must not succeed."""
    agent.spawn()
    assert agent.process is not None
    assert agent.process.wait(60) == 78
    agent.process = None
    [line] = [line for line in agent.log.read_text().splitlines() if line.startswith("magi-agent: ")]
    return line


@pytest.mark.parametrize("content", [None, "", "# none yet\n"])
def test_a_start_that_others_would_reach_without_any_token_is_refused(
    elsewhere: TokenAgent, content: str | None
) -> None:
    if content is None:
        elsewhere.tokens.unlink()
    else:
        elsewhere.tokens.write_text(content)

    line = fails(elsewhere)

    assert line == (
        f"magi-agent: api.tcp (MAGI_TCP): http://0.0.0.0:{elsewhere.port} can be reached from other hosts, which needs "
        f"a token, and {elsewhere.tokens} (api.tokens_path) holds none; make one with 'magictl token add NAME --scope "
        "read', or listen on a loopback address, such as 127.0.0.1:8000"
    )
    assert not elsewhere.socket.exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"front read {SECRET}\n", ":1: the hash of front wants sha256: and 64 hexadecimal digits, never the token"),
        (f"# one\n\n{SECRET}\n", ":3: wants a name, a scope, sha256: with 64 hexadecimal digits and, maybe, an end"),
        ("x" * 70_000, ": larger than 65536 bytes"),
    ],
    ids=["the token itself", "a token alone", "too large"],
)
def test_a_bad_file_of_tokens_is_a_clear_error_at_the_start(elsewhere: TokenAgent, content: str, said: str) -> None:
    elsewhere.tokens.write_text(content)

    line = fails(elsewhere)

    assert line.startswith(f"magi-agent: {elsewhere.tokens}{said}")
    assert SECRET not in elsewhere.log.read_text()


def test_others_reach_it_by_token_alone(elsewhere: TokenAgent) -> None:
    elsewhere.start()

    assert elsewhere.over_tcp("GET", REGISTRY).status == 401
    assert elsewhere.status(SECRET) == 200
    assert elsewhere.status(OTHER) == 401
    assert elsewhere.over_tcp("GET", "/health/live").status == 200


def test_a_start_with_ended_tokens_only_succeeds_and_lets_nobody_in(elsewhere: TokenAgent) -> None:
    """What ended overnight must not keep the models from being looked after."""
    keep(elsewhere.folder, token("one", TokenScope.READ, SECRET, YESTERDAY))
    elsewhere.start()

    assert elsewhere.status(SECRET) == 401


def test_a_reload_takes_new_tokens_and_lets_go_of_old_ones(elsewhere: TokenAgent) -> None:
    elsewhere.start()
    keep(elsewhere.folder, token("one", TokenScope.READ, SECRET), token("two", TokenScope.ADMIN, OTHER))
    assert elsewhere.status(OTHER) == 401

    assert elsewhere.reload() == []
    assert (elsewhere.status(SECRET), elsewhere.status(OTHER)) == (200, 200)
    assert elsewhere.over_tcp("POST", RESCAN, OTHER).status == 200
    assert "the configuration was reloaded; changed: the tokens (two added)" in elsewhere.log.read_text()

    keep(elsewhere.folder, token("two", TokenScope.READ, OTHER))
    assert elsewhere.reload() == []
    assert (elsewhere.status(SECRET), elsewhere.status(OTHER)) == (401, 200)
    assert "changed: the tokens (two added, one taken back, two taken back)" in elsewhere.log.read_text()
    assert elsewhere.over_tcp("POST", RESCAN, OTHER).status == 403


@pytest.mark.parametrize("content", [f"front read {OTHER}", "front read", "\xff", "one read sha256:xyz"], ids=range(4))
def test_a_reload_that_finds_a_bad_file_keeps_what_held_and_says_why(elsewhere: TokenAgent, content: str) -> None:
    elsewhere.start()
    elsewhere.tokens.write_bytes(content.encode("latin-1"))

    [problem] = elsewhere.reload()

    assert problem.startswith(f"the tokens were not reloaded: {elsewhere.tokens}:")
    assert OTHER not in elsewhere.log.read_text()
    assert f"WARNING {problem}" in elsewhere.log.read_text()
    assert elsewhere.status(SECRET) == 200
    keep(elsewhere.folder, token("two", TokenScope.READ, OTHER))
    assert elsewhere.reload() == []
    assert (elsewhere.status(SECRET), elsewhere.status(OTHER)) == (401, 200)


def test_a_file_that_is_gone_keeps_what_held_where_others_reach_the_agent(elsewhere: TokenAgent) -> None:
    elsewhere.start()
    elsewhere.tokens.unlink()

    [problem] = elsewhere.reload()

    assert problem.startswith(f"the tokens were not reloaded: {elsewhere.tokens} (api.tokens_path) is gone")
    assert elsewhere.status(SECRET) == 200


def test_the_last_token_that_was_taken_back_ends_all_the_same_and_what_follows_is_said(elsewhere: TokenAgent) -> None:
    elsewhere.start()
    keep(elsewhere.folder)

    [problem] = elsewhere.reload()

    assert problem.startswith("no start would succeed as things are: ")
    assert elsewhere.status(SECRET) == 401


def test_a_token_that_was_taken_back_ends_whatever_else_is_wrong(elsewhere: TokenAgent) -> None:
    elsewhere.start()
    keep(elsewhere.folder, token("two", TokenScope.READ, OTHER))
    (elsewhere.folder / "agent.toml").write_text("no TOML")

    elsewhere.reload()

    assert "the configuration was not reloaded: " in elsewhere.log.read_text()
    assert (elsewhere.status(SECRET), elsewhere.status(OTHER)) == (401, 200)


def test_on_loopback_a_file_that_is_gone_holds_no_tokens(elsewhere: TokenAgent) -> None:
    elsewhere.settings["MAGI_TCP"] = f"127.0.0.1:{elsewhere.port}"
    elsewhere.start()
    assert elsewhere.status(SECRET) == 200
    elsewhere.tokens.unlink()

    assert elsewhere.reload() == []
    assert elsewhere.status(SECRET) == 401


def test_who_else_may_read_the_file_is_said_and_who_may_write_it_is_refused(elsewhere: TokenAgent) -> None:
    elsewhere.tokens.chmod(0o644)
    elsewhere.start()
    said = f"{elsewhere.tokens}: every user of this host may read it; to change that: chmod 0640 {elsewhere.tokens}"
    assert f"WARNING {said}" in elsewhere.log.read_text()
    assert elsewhere.ask("GET", "/health/ready").body["problems"][-1:] == [said]

    elsewhere.tokens.chmod(0o646)
    [problem] = elsewhere.reload()
    assert "every user of this host may write it" in problem
    assert elsewhere.status(SECRET) == 200

    elsewhere.tokens.chmod(0o640)
    assert elsewhere.reload() == []


def test_a_token_that_a_newer_agent_limits_lets_nobody_in_and_the_start_succeeds(elsewhere: TokenAgent) -> None:
    newer = line_of(replace(token("newer", TokenScope.ADMIN, OTHER), unknown=("hosts=10.0.0.0/8",)))
    elsewhere.tokens.write_text(f"{elsewhere.tokens.read_text()}{newer}\n")
    elsewhere.start()

    assert [elsewhere.status(secret) for secret in (SECRET, OTHER)] == [200, 401]
    message = elsewhere.over_tcp("GET", REGISTRY, OTHER).body["message"]
    assert message.startswith("the token newer has a key that this agent does not know")
    (problem,) = elsewhere.reload()
    assert problem.startswith(f"{elsewhere.tokens}: the token newer has a key that this agent does not know")


def test_an_address_that_others_reach_waits_for_a_restart_that_would_fail(elsewhere: TokenAgent) -> None:
    elsewhere.tokens.unlink()
    del elsewhere.settings["MAGI_TCP"]
    config = elsewhere.folder / "agent.toml"
    config.write_text(f'[api]\ntcp = "127.0.0.1:{elsewhere.port}"\n')
    environment = elsewhere.environment()
    del environment["MAGI_TCP"]
    elsewhere.environment = lambda: environment  # type: ignore[method-assign]
    elsewhere.start()
    config.write_text(f'[api]\ntcp = "0.0.0.0:{elsewhere.port}"\n')

    problems = elsewhere.reload()

    assert any(problem.startswith("no restart would succeed as things are: 0.0.0.0") for problem in problems)


@pytest.fixture
def unit(elsewhere: TokenAgent, toy_model: MakeToyModel) -> Iterator[TokenAgent]:
    """The agent as systemd runs it, with a model, and with as little in its log as can be chosen."""
    toy_model(elsewhere.models / "tokens-one.gguf")
    elsewhere.settings |= {"MAGI_LOG_LEVEL": "error", "MAGI_TRUSTED_PROXIES": "127.0.0.1"}
    keep(elsewhere.folder, token("ops", TokenScope.ADMIN, SECRET), token("front", TokenScope.READ, OTHER))
    names = ("MAGI_", "MODEL_", "REGISTRY_", "PROFILES_", "LLAMA_", "ACTIVE_", "XDG_RUNTIME_DIR", "DBUS_")
    variables = [
        f"--setenv={name}={value}" for name, value in elsewhere.environment().items() if name.startswith(names)
    ]
    agent = str(locations.VENV / "bin" / "magi-agent")
    run = ["systemd-run", "--user", "--quiet", "--unit", UNIT, "-p", "Type=notify", *variables, agent]
    subprocess.run(run, check=True, timeout=60)
    yield elsewhere
    remove_units(UNIT)


def entries(systemd_user: SystemdUser, *matches: str) -> list[dict[str, Any]]:
    command = ["journalctl", "-D", str(systemd_user.journal), "-o", "json", "SYSLOG_IDENTIFIER=magi-agent", *matches]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_every_change_is_in_the_journal_with_who_made_it(unit: TokenAgent, systemd_user: SystemdUser) -> None:
    wait_until(lambda: "tokens-one" in unit.must("GET", REGISTRY)["models"], "the model is found")

    def made(request_id: str) -> dict[str, Any]:
        found = wait_until(lambda: entries(systemd_user, f"MAGI_REQUEST_ID={request_id}"), "the journal has it")
        assert len(found) == 1
        one: dict[str, Any] = found[0]
        assert SECRET not in json.dumps(one)
        return one

    assert unit.over_tcp("POST", RESCAN, SECRET, X_Request_ID="by-token").status == 200
    assert unit.over_tcp("POST", RESCAN, SECRET, X_Request_ID="by-proxy", X_Forwarded_For="203.0.113.9").status == 200
    assert unit.ask("POST", RESCAN).status == 200
    peer = f"uid {os.geteuid()}"

    by_token = made("by-token")
    assert (by_token["MAGI_TOKEN"], by_token["MAGI_CALLER"]) == ("ops", f"token ops from 127.0.0.1 ({peer})")
    assert by_token["PRIORITY"] == "6"
    assert re.fullmatch(rf"POST {RESCAN}: 200 in [\d.]+ ms, for token ops from 127\.0\.0\.1 \({peer}\)",
                        by_token["MESSAGE"])  # fmt: skip
    by_proxy = made("by-proxy")
    assert by_proxy["MAGI_CALLER"] == f"token ops from 203.0.113.9 through 127.0.0.1 ({peer})"
    [by_peer] = wait_until(lambda: entries(systemd_user, f"MAGI_CALLER={peer} (pid {os.getpid()})"), "it is there")[-1:]
    assert "MAGI_TOKEN" not in by_peer
    assert by_peer["MESSAGE"].startswith(f"POST {RESCAN}: 200 in ")


def test_what_only_reads_is_not_in_the_journal_of_an_agent_that_says_little(
    unit: TokenAgent, systemd_user: SystemdUser
) -> None:
    assert unit.over_tcp("GET", REGISTRY, OTHER, X_Request_ID="only-read").status == 200
    assert unit.over_tcp("POST", RESCAN, OTHER, X_Request_ID="refused").status == 403
    assert unit.over_tcp("POST", RESCAN, SECRET, X_Request_ID="changed").status == 200

    wait_until(lambda: entries(systemd_user, "MAGI_REQUEST_ID=changed"), "the change is there")
    assert entries(systemd_user, "MAGI_REQUEST_ID=only-read") == []
    assert entries(systemd_user, "MAGI_REQUEST_ID=refused") == []
