"""Each model's own metrics and the list of them for Prometheus, on real units with a real llama-server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from magi_agent.gateway import opening as opening_module
from magi_agent.servers import self_reports as self_reports_module
from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.client import Api, until
from tests.api.conftest import Serve, systemctl

ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
TARGETS = "/metrics/targets"
ONE = "/metrics/models/api-one"
LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
SECRETS = {scope: new_secret() for scope in TokenScope}


@pytest.fixture
def tokens(tmp_path: Path) -> None:
    lines = [line_of(Token(scope, scope, digest_of(secret))) for scope, secret in SECRETS.items()]
    (tmp_path / "tokens").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "tokens").chmod(0o640)


def bearer(scope: TokenScope) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[scope]}"}


async def start(api: Api, model_id: str) -> None:
    assert (await api.ask("POST", f"/api/models/servers/{model_id}/start?wait=60")).success()["server"]["isReady"]


async def targets(api: Api, **headers: str) -> list[dict[str, Any]]:
    reply = await api.ask("GET", TARGETS, headers={name.replace("_", "-"): value for name, value in headers.items()})
    found: list[dict[str, Any]] = reply.success()
    return found


async def test_a_servers_metrics_pass_as_they_are(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    await start(api, "api-one")
    url = (await api.get("/api/models/servers/api-one"))["url"]
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as direct:
        told = await direct.read()

    reply = await api.ask("GET", ONE)

    assert reply.status == 200
    assert reply.content == told
    assert b"\nllamacpp:requests_processing 0\n" in told
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Cache-Control"] == "no-store"


@ONE_LISTENER
@pytest.mark.parametrize("access", ["socket", "key"])
async def test_also_those_of_a_server_that_nobody_else_reaches(serve: Serve, access: str) -> None:
    api = await serve("api-one", server_access=access)
    await start(api, "api-one")

    assert b"\nllamacpp:requests_processing 0\n" in (await api.ask("GET", ONE)).content


@ONE_LISTENER
async def test_what_is_not_ready_has_no_metrics_and_is_not_started_for_them(serve: Serve) -> None:
    api = await serve("api-one")
    await api.ask("PUT", "/api/models/api-one/settings", {"startPolicy": "onDemand"})
    await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})

    refused = await api.ask("GET", ONE)

    assert refused.failure(503, "ServiceUnavailable") == {"service": "api-one"}
    assert "api-one is stopped" in refused.body["message"]
    (await api.ask("GET", "/metrics/models/api-none")).failure(404, "ModelNotFound")
    (await api.ask("GET", "/metrics/models/..%2F..%2Fetc")).failure(404, "ModelNotFound")
    (await api.ask("GET", "/metrics/models/api-one/slots")).failure(404, "NotFound")
    assert await api.state("api-one") == "stopped"
    assert not systemctl("list-units", "--all", "--plain", "--no-legend", "magi-llama-api-one.service")


@ONE_LISTENER
async def test_a_server_that_stands_still_is_a_504_of_its_own(serve: Serve) -> None:
    api = await serve("api-one", "api-two")
    await asyncio.gather(start(api, "api-one"), start(api, "api-two"))
    pid = (await api.get("/api/models/servers/api-one"))["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        silent, other = await asyncio.gather(api.ask("GET", ONE), api.ask("GET", "/metrics/models/api-two"))
        took = time.monotonic() - began
    finally:
        os.kill(pid, signal.SIGCONT)

    assert silent.failure(504, "ServerSilent") == {"modelId": "api-one"}
    assert "did not answer within 2 seconds" in silent.body["message"]
    assert 1.9 < took < 6
    assert other.status == 200

    async def answers() -> bool:
        return (await api.ask("GET", ONE)).status == 200

    await until(answers, "it tells its metrics again")


@ONE_LISTENER
async def test_an_answer_that_is_too_large_is_not_passed_on(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_reports_module, "_MOST_BYTES", 1000)
    api = await serve("api-one")
    await start(api, "api-one")

    assert (await api.ask("GET", ONE)).failure(502, "ServerFailed") == {"modelId": "api-one"}


@ONE_LISTENER
async def test_a_server_is_idle_though_it_is_scraped_all_the_time(serve: Serve) -> None:
    api = await serve("api-one")
    await api.ask("PUT", "/api/models/api-one/settings", {"startPolicy": "onDemand", "idleTimeoutSeconds": 2})
    await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})
    (await api.ask("POST", "/v1/completions", {"model": "api-one", "prompt": "a", "max_tokens": 2})).success()
    answered = time.monotonic()

    scrapes = 0
    while (reply := await api.ask("GET", ONE)).status == 200:
        assert time.monotonic() - answered < 20
        scrapes += 1
        await asyncio.sleep(0.1)

    assert reply.status == 503
    assert scrapes > 5
    assert 1.9 < time.monotonic() - answered < 8
    await api.until_state("api-one", "stopped")
    wish = api.agent._desired["api-one"]
    assert wish is not None
    assert wish.by == "idle timeout"


async def test_each_ready_model_is_a_target(serve: Serve) -> None:
    two = "api-two-qwen3-7b"
    api = await serve("api-one", two, "api-three")
    assert await targets(api) == []
    await asyncio.gather(start(api, "api-one"), start(api, two))
    await api.ask("PUT", f"/api/models/{two}/tier", {"tier": "powerful"})
    await api.ask("PUT", f"/api/models/{two}/settings", {"startPolicy": "manual"})
    host = "localhost" if api.base == "http://localhost" else api.base.removeprefix("http://")

    reply = await api.ask("GET", TARGETS)
    first, second = reply.success()

    assert reply.headers["Content-Type"] == "application/json; charset=utf-8"
    assert first["targets"] == second["targets"] == [host]
    facts = api.services.registry.models["api-one"].facts
    assert first["labels"] == {
        "model": "api-one",
        "__metrics_path__": ONE,
        "__meta_magi_tier": "balanced",
        "__meta_magi_family": facts.family,
        "__meta_magi_quantization": facts.quantization,
        "__meta_magi_start_policy": "alwaysOn",
    }
    assert second["labels"] == {
        "model": two,
        "__metrics_path__": f"/metrics/models/{two}",
        "__meta_magi_tier": "powerful",
        "__meta_magi_family": "qwen",
        "__meta_magi_quantization": "f32",
        "__meta_magi_parameters": "7B",
        "__meta_magi_start_policy": "manual",
    }
    for group in (first, second):
        assert all(LABEL_NAME.fullmatch(name) for name in group["labels"])
        assert (await api.ask("GET", group["labels"]["__metrics_path__"])).status == 200

    (await api.ask("POST", "/api/models/servers/api-one/stop?wait=60")).success()
    assert [group["labels"]["model"] for group in await targets(api)] == [two]


@ONE_LISTENER
@pytest.mark.parametrize(
    "host",
    ["gpu1.example.org:8000", "gpu1", "192.0.2.1:1", "[2001:db8::1]:65535", "[::1]", "a_b.example.", "MAGI.example"],
)
async def test_the_address_is_the_callers_own_word(serve: Serve, host: str) -> None:
    api = await serve("api-one")
    await start(api, "api-one")

    [group] = await targets(api, Host=host)

    assert group["targets"] == [host]


@ONE_LISTENER
async def test_a_word_that_is_no_address_is_refused(serve: Serve) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    hostile = [
        "", " ", ":", ":80", "a:", "a:0", "a:65536", "a:80:90", "a:8a", "a:-1", "a:٣", "a:080808",
        "a b", "a/b", "a/../b", "a?b", "a#b", "a@b", "user:word@a", "a,b", "a;b", "a\\b", 'a"b', "a'b", "a}]", "{a}",
        "a%00b", "a%2fb", "${a}", "<a>", "a..b", ".a", "münchen", "x" * 254, "[", "[]", "[::1", "::1", "[::1]]",
        "[fe80::1%eth0]:80", "[127.0.0.1]", "[a]", "http://a",
    ]  # fmt: skip
    for said in hostile:
        reply = await api.ask("GET", TARGETS, headers={"Host": said})
        assert reply.failure(400, "InvalidHost") == {"header": "Host"}, said


@ONE_LISTENER
async def test_what_no_client_of_ours_would_send(serve: Serve) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    for head in ("Host: a\r\nHost: b\r\n", "Host: a\r\nhost: a\r\n", "", "Host: a\tb\r\n", "Host: a\x0bb\r\n"):
        reader, writer = await asyncio.open_unix_connection(api.services.settings.socket)
        writer.write(f"GET {TARGETS} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode())
        said = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert said.split()[1] == b"400", (head, said)
        assert b"__metrics_path__" not in said


PROXIED = {
    "X-Forwarded-For": "192.0.2.7",
    "X-Forwarded-Host": "magi.example.org:8443",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/magi",
}


@ONE_LISTENER
@pytest.mark.parametrize(
    ("trusted", "changed", "host", "path", "scheme"),
    [
        ("unix", {}, "magi.example.org:8443", f"/magi{ONE}", "https"),
        ("unix", {"X-Forwarded-Proto": "http"}, "magi.example.org:8443", f"/magi{ONE}", None),
        ("unix", {"X-Forwarded-Proto": "https, http"}, "magi.example.org:8443", f"/magi{ONE}", None),
        ("unix", {"X-Forwarded-Host": None}, "inner", f"/magi{ONE}", "https"),
        ("unix", {"X-Forwarded-Prefix": "//evil.example"}, "magi.example.org:8443", ONE, "https"),
        ("unix", {"X-Forwarded-Host": "a, b"}, None, None, None),
        ("unix", {"X-Forwarded-Host": 'a"}]'}, None, None, None),
        ("unix", {"X-Forwarded-Host": ""}, None, None, None),
        ("127.0.0.1", {}, "inner", ONE, None),
        ("", {"X-Forwarded-Host": "a, b"}, "inner", ONE, None),
    ],
)
async def test_behind_a_proxy_it_is_where_the_client_sees_it(
    serve: Serve, tokens: None, trusted: str, changed: dict[str, str | None], host: str | None, path: str | None,
    scheme: str | None,
) -> None:  # fmt: skip
    api = await serve("api-one", trusted_proxies=trusted)
    await start(api, "api-one")
    said = {name: value for name, value in {**PROXIED, **changed}.items() if value is not None}

    reply = await api.ask("GET", TARGETS, headers={**bearer(TokenScope.READ), "Host": "inner", **said})

    if host is None:
        assert reply.failure(400, "InvalidHost") == {"header": "X-Forwarded-Host"}
        return
    [group] = reply.success()
    assert group["targets"] == [host]
    assert group["labels"]["__metrics_path__"] == path
    assert group["labels"].get("__scheme__") == scheme


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_who_may_read_may_scrape(serve: Serve, tokens: None) -> None:
    api = await serve("api-one", tcp_access="none")
    everything = {"headers": bearer(TokenScope.ADMIN)}
    (await api.ask("POST", "/api/models/servers/api-one/start?wait=60", **everything)).success()

    for path in (TARGETS, ONE, "/metrics"):
        assert (await api.ask("GET", path, headers=bearer(TokenScope.READ))).status == 200
        (await api.ask("GET", path, headers=bearer(TokenScope.INFER))).failure(403, "Forbidden")
        (await api.ask("GET", path)).failure(401, "Unauthorized")


@ONE_LISTENER
async def test_no_list_is_given_that_nobody_knows(serve: Serve) -> None:
    """Prometheus forgets the models that a list does not have, and keeps them where it got none."""
    (await (await serve(loaded=False)).ask("GET", TARGETS)).failure(503, "ServiceUnavailable")


@ONE_LISTENER
async def test_the_list_waits_until_it_is_known_which_servers_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    opening = api.services.opening
    await opening.wait()
    opening._open.clear()
    waiting = asyncio.create_task(targets(api))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    opening._open.set()
    assert len(await waiting) == 1

    opening._open.clear()
    monkeypatch.setattr(opening_module, "_LONGEST", 0.1)
    (await api.ask("GET", TARGETS)).failure(503, "ServiceUnavailable")
