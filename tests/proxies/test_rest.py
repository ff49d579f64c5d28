"""The API through TLS and below a path: what the agent says arrives as it is, with the path before it."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.agent_process import AgentProcess
from tests.proxies.conftest import MODEL, Bearer
from tests.proxies.proxy_process import Proxy, running
from tests.proxies.shipped import NAME, Surroundings


def test_the_agent_says_where_things_are_as_the_client_sees_it(proxy: Proxy, bearer: Bearer) -> None:
    root = proxy.ask("GET", "/magi/", headers=bearer("read"))
    document = proxy.ask("GET", f"{root.body['docs'].removesuffix('docs')}openapi.json", headers=bearer("read"))
    created = proxy.ask("POST", "/magi/api/models/profiles", {"name": f"By {proxy.kind}"}, bearer())
    found = proxy.ask("GET", created.headers["location"], headers=bearer("read"))
    started = proxy.ask("POST", "/magi/api/models/servers/start-all", headers=bearer())
    removed = proxy.ask("DELETE", created.headers["location"], headers=bearer())

    assert (root.status, root.body["docs"]) == (200, "/magi/api/docs")
    assert document.body["servers"] == [{"url": "/magi"}]
    assert (created.status, created.headers["location"]) == (201, f"/magi/api/models/profiles/by-{proxy.kind}")
    assert (found.status, found.body["name"]) == (200, f"By {proxy.kind}")
    assert started.status == 200 or started.headers["location"].startswith("/magi/api/operations/")
    assert removed.status == 200


def test_prometheus_is_told_to_scrape_models_where_it_found_the_list(
    proxy: Proxy, agent: AgentProcess, bearer: Bearer
) -> None:
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")
    host = f"{NAME}:{proxy.here.port}"

    listed = proxy.ask("GET", "/magi/metrics/targets", headers={"Host": host, **bearer("read")})
    [group] = listed.body
    told = proxy.ask("GET", group["labels"]["__metrics_path__"], headers={"Host": host, **bearer("read")})

    assert group["targets"] == [host]
    assert group["labels"]["__scheme__"] == "https"
    assert group["labels"]["__metrics_path__"] == f"/magi/metrics/models/{MODEL}"
    assert told.status == 200
    assert told.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\nllamacpp:requests_processing 0\n" in told.body


def test_the_page_for_people_finds_its_document_and_fetches_nothing_elsewhere(proxy: Proxy, bearer: Bearer) -> None:
    page = proxy.ask("GET", "/magi/api/docs", headers=bearer("read"))

    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"location.pathname.replace" in page.body
    assert b"</html>" in page.body


def test_a_body_may_come_in_pieces_and_a_choice_arrives(proxy: Proxy, agent: AgentProcess, bearer: Bearer) -> None:
    connection = proxy.connect()
    headers = {"Host": "magi.example.org", "Content-Type": "application/json", **bearer()}
    pieces = iter([b'{"ti', b'er": ', b'"balanced"}'])
    connection.request("PUT", f"/magi/api/models/{MODEL}/tier", pieces, headers, encode_chunked=True)
    answered = connection.getresponse()
    answered.read()
    connection.close()

    assert answered.status == 200
    assert agent.must("GET", f"/api/models/{MODEL}")["tierOverride"] == "balanced"
    assert proxy.ask("PUT", f"/magi/api/models/{MODEL}/tier", {"tier": None}, bearer()).status == 200


def test_what_has_not_changed_is_not_sent_again(proxy: Proxy, bearer: Bearer) -> None:
    first = proxy.ask("GET", "/magi/api/models/registry", headers={"Accept-Encoding": "gzip", **bearer("read")})
    known = {"If-None-Match": first.headers["etag"], **bearer("read")}

    assert (first.status, first.headers["etag"][:2]) == (200, "W/") or first.headers["etag"][0] == '"'
    assert MODEL in first.body["models"]
    again = proxy.ask("GET", "/magi/api/models/registry", headers=known)
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize("offered", ["order-66", "a.b:c_d+e=f@g/h", "x" * 128])
def test_a_request_has_one_name_on_the_whole_way(proxy: Proxy, offered: str) -> None:
    assert proxy.ask("GET", "/magi/health/live", None, {"X-Request-ID": offered}).headers["x-request-id"] == offered


@pytest.mark.parametrize("offered", [None, "not a token", "x" * 129, "<script>"])
def test_a_request_without_a_sane_name_gets_one(proxy: Proxy, offered: str | None) -> None:
    headers = {} if offered is None else {"X-Request-ID": offered}

    [first, second] = [proxy.ask("GET", "/magi/health/live", None, headers).headers["x-request-id"] for _ in range(2)]

    assert first != second
    assert offered not in (first, second)
    assert len(first) >= 16


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("GET", "/api/nowhere", None, 404, "NotFound"),
        ("GET", f"/api/models/{quote('näme mit % ? #', safe='')}", None, 404, None),
        ("DELETE", "/health/live", None, 405, "MethodNotAllowed"),
        ("PUT", f"/api/models/{MODEL}/tier", {"tier": "huge"}, 400, "InvalidTier"),
        ("PUT", f"/api/models/{MODEL}/enabled", {"enabled": "maybe"}, 422, "ValidationError"),
        ("GET", "/api/models/profiles/none-such", None, 404, "ProfileNotFound"),
    ],
)
def test_what_the_agent_refuses_arrives_as_the_agent_says_it(
    proxy: Proxy, agent: AgentProcess, bearer: Bearer, method: str, path: str, body: object, status: int,
    error: str | None,
) -> None:  # fmt: skip
    through = proxy.ask(method, f"/magi{path}", body, bearer())
    direct = agent.ask(method, path, body)

    assert through.status == status
    assert through.body == direct.body
    assert error is None or through.body["error"] == error
    assert through.headers.get("allow") == direct.headers.get("allow")
    assert set(direct.headers) <= {*through.headers, "connection", "transfer-encoding"}


def test_a_scope_that_does_not_suffice_is_a_403(proxy: Proxy, bearer: Bearer) -> None:
    refused = proxy.ask("PUT", f"/magi/api/models/{MODEL}/tier", {"tier": "fast"}, bearer("read"))

    assert (refused.status, refused.body["error"]) == (403, "Forbidden")
    assert refused.body["details"] == {"needs": "admin", "has": "read"}
    assert "insufficient_scope" in refused.headers["www-authenticate"]


def test_an_agent_that_is_away_is_told_in_the_form_of_all_errors(
    kind: str, tmp_path: Path, surroundings: Surroundings
) -> None:
    nowhere = Surroundings(surroundings.port, surroundings.certificate, surroundings.key, tmp_path / "no.sock")
    with running(Proxy(kind, tmp_path / "proxy", nowhere)) as proxy:
        began = time.monotonic()
        for path in ("/magi/health/live", "/magi/api/models/registry"):
            away = proxy.ask("GET", path, headers={"X-Request-ID": "order-66"})
            assert (away.status, away.body["error"]) == (503, "ServiceUnavailable")
            assert set(away.body) == {"error", "message", "details"}
            assert away.body["details"] == {"service": "magi-agent"}
            assert away.headers["x-request-id"] == "order-66"
            assert away.headers["retry-after"]
        assert time.monotonic() - began < 5


def test_an_agent_that_comes_back_is_found_at_once(proxy: Proxy, agent: AgentProcess, bearer: Bearer) -> None:
    agent.stop()
    assert [proxy.ask("GET", "/magi/health/live").status for _ in range(3)] == [503] * 3

    agent.start()

    assert [proxy.ask("GET", "/magi/", headers=bearer("read")).status for _ in range(3)] == [200] * 3


def test_the_path_alone_leads_to_the_path_with_its_slash(proxy: Proxy) -> None:
    led = proxy.ask("GET", "/magi")

    assert led.status in (301, 308)
    assert led.headers["location"].removeprefix(f"https://magi.example.org:{proxy.here.port}") == "/magi/"
