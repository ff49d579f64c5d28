"""What holds for every request: one form of errors, ids, times, limits; raw connections say what no client would."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from magi_agent.registry.registry import Registry
from tests.api.client import Api, until
from tests.api.conftest import Serve

TIER = "/api/models/api-one/tier"


async def connect(api: Api) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of its own to the listener that the test runs for."""
    settings = api.agent.settings
    if api.base == "http://localhost":
        return await asyncio.open_unix_connection(str(settings.socket))
    assert settings.tcp is not None
    return await asyncio.open_connection(settings.tcp.host, settings.tcp.port)


async def handled(api: Api) -> bool:
    """Whether a request has reached its handler."""
    runner = api.agent._listeners._runner
    assert runner is not None
    assert runner.server is not None
    return bool(runner.server.requests_count)


async def raw(api: Api, sent: bytes) -> tuple[str, dict[str, str], bytes]:
    """Send bytes over a connection of their own; the status line, the headers and the body of the answer."""
    reader, writer = await connect(api)
    try:
        writer.write(sent)
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            content = await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.close()
    return status, headers, content


@pytest.mark.parametrize(
    "path", ["/", "/health/live", "/api/models/registry", "/nope", "/api/docs", "/api/operations/x"]
)
async def test_every_answer_has_an_id_and_a_time(serve: Serve, path: str) -> None:
    api = await serve()

    first, second = await api.ask("GET", path), await api.ask("GET", path)

    for reply in (first, second):
        assert re.fullmatch(r"[0-9a-f]{16}", reply.headers["X-Request-ID"])
        assert re.fullmatch(r"\d+\.\d\dms", reply.headers["X-Response-Time"])
    assert first.headers["X-Request-ID"] != second.headers["X-Request-ID"]


@pytest.mark.parametrize(
    ("offered", "kept"),
    [
        ("abc-123_X.y:z", True),
        ("0b1c5b3e-5a44-4d0c-8a2e-0f6a9e2a7f10", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("<script>", False),
        ("ünicode", False),
    ],
)
async def test_a_callers_id_is_kept_where_it_is_a_sane_token(serve: Serve, offered: str, kept: bool) -> None:
    api = await serve()

    for path in ("/health/live", "/nope"):
        reply = await api.ask("GET", path, headers={"X-Request-ID": offered})
        assert (reply.headers["X-Request-ID"] == offered) is kept


async def test_the_log_carries_the_id_and_who_changed_what(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    api = await serve("api-one")
    caplog.set_level(logging.DEBUG, "magi_agent.api")

    (await api.ask("PUT", TIER, {"tier": "fast"}, headers={"X-Request-ID": "change-1"})).success()
    (await api.ask("GET", "/health/live", headers={"X-Request-ID": "read-1"})).success()

    change, read = (
        next(record for record in caplog.records if getattr(record, "magi_request_id", None) == request_id)
        for request_id in ("change-1", "read-1")
    )
    assert (change.levelno, read.levelno) == (logging.INFO, logging.DEBUG)
    who = r"uid 0 \(pid \d+\)" if api.base == "http://localhost" else r"127\.0\.0\.1 \(uid 0\)"
    assert re.fullmatch(rf'PUT {TIER} \{{"tier": "fast"\}}: 200 in \d+\.\d ms, for {who}', change.getMessage())
    assert re.fullmatch(rf"GET /health/live: 200 in \d+\.\d ms, for {who}", read.getMessage())


@pytest.mark.parametrize("path", ["/nope", "/api/models", "/api/models/registry/", "/api//models/registry", "/%00"])
async def test_a_path_that_leads_nowhere(serve: Serve, path: str) -> None:
    api = await serve()

    assert (await api.ask("GET", path)).failure(404, "NotFound") == {"path": path}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/api/models/registry", "GET, HEAD"),
        ("GET", "/api/models/rescan", "POST"),
        ("DELETE", "/api/models/profiles", "GET, HEAD, POST"),
        ("PATCH", "/api/models/profiles/day", "DELETE, GET, HEAD, PUT"),
        ("OPTIONS", "/api/models/servers", "GET, HEAD"),
        ("GET", "/api/models/api-one/tier", "PUT"),
        ("POST", "/health/live", "GET, HEAD"),
    ],
)
async def test_a_method_that_a_path_does_not_take(serve: Serve, method: str, path: str, allowed: str) -> None:
    api = await serve()

    reply = await api.ask(method, path)

    assert reply.failure(405, "MethodNotAllowed") == {"method": method, "allowedMethods": allowed.split(", ")}
    assert reply.headers["Allow"] == allowed


async def test_head_answers_as_get_without_a_body(serve: Serve) -> None:
    api = await serve("api-one")

    head, get = await api.ask("HEAD", "/api/models/registry"), await api.ask("GET", "/api/models/registry")

    assert (head.status, head.content) == (200, b"")
    assert head.headers["Content-Length"] == str(len(get.content))
    missing = await api.ask("HEAD", "/nope")
    assert (missing.status, missing.content) == (404, b"")


@pytest.mark.parametrize("sent", [b"", b"{", b"{'tier': 1}", b"\xff", b'{"tier": NaN}', b"{} {}", b"[" * 100_000])
async def test_a_body_that_is_no_json(serve: Serve, sent: bytes) -> None:
    api = await serve("api-one")

    reply = await api.ask("PUT", TIER, data=sent, headers={"Content-Type": "application/json"})

    reply.failure(400, "InvalidJson")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream"])
async def test_a_body_of_another_type(serve: Serve, kind: str) -> None:
    api = await serve("api-one")

    reply = await api.ask("PUT", TIER, data=b'{"tier": "fast"}', headers={"Content-Type": kind})

    assert reply.failure(415, "UnsupportedMediaType") == {"contentType": kind}


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "application/merge-patch+json"]
)
async def test_a_body_of_json_under_any_of_its_names(serve: Serve, kind: str) -> None:
    api = await serve("api-one")

    (await api.ask("PUT", TIER, data=b'{"tier": "fast"}', headers={"Content-Type": kind})).success()


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (TIER, {}, "tier"),
        (TIER, {"tier": 7}, "tier"),
        (TIER, {"tier": "fast", "extra": 1}, "extra"),
        (TIER, [], ""),
        (TIER, "fast", ""),
        ("/api/models/api-one/thinking", {"thinking": "yes"}, "thinking"),
        ("/api/models/api-one/thinking", {"thinking": 1}, "thinking"),
        ("/api/models/api-one/enabled", {"enabled": None}, "enabled"),
        ("/api/models/api-one/enabled", {"enabled": "true"}, "enabled"),
    ],
)
async def test_a_body_that_does_not_say_what_it_should(serve: Serve, path: str, body: object, field: str) -> None:
    api = await serve("api-one")

    details = (await api.ask("PUT", path, body)).failure(422, "ValidationError")

    assert details["errors"][0]["field"] == field
    assert details["errors"][0]["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x", "twoStage": {"stage1MaxTokens": 0}}, "twoStage.stage1MaxTokens"),
        ({"name": "x", "two_stage": {"stage1_tier": "huge"}}, "twoStage.stage1Tier"),
        ({"name": "x", "loadBalancing": {"strategy": "best"}}, "loadBalancing.strategy"),
        ({"name": "x", "tierConfig": [{"name": "fast"}, {"name": ""}]}, "tierConfig.1.name"),
        ({"name": "x", "runtimeSettings": {"api-one": {"n_gpu_layers": -7}}}, "runtimeSettings.api-one.nGpuLayers"),
        ({"name": "x", "enabledModels": [1]}, "enabledModels.0"),
        ({}, "name"),
    ],
)
async def test_a_field_is_named_as_on_the_wire(serve: Serve, body: object, field: str) -> None:
    api = await serve()

    details = (await api.ask("POST", "/api/models/profiles", body)).failure(422, "ValidationError")

    assert [error["field"] for error in details["errors"]] == [field]


async def test_a_body_that_is_too_large(serve: Serve) -> None:
    api = await serve("api-one")
    large = json.dumps({"tier": "x" * (1 << 20)}).encode()

    async def chunked() -> Any:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for data in (io.BytesIO(large), chunked()):
        reply = await api.ask("PUT", TIER, data=data, headers={"Content-Type": "application/json"})
        assert reply.failure(413, "PayloadTooLarge") == {"maxBytes": 1 << 20}


@pytest.mark.parametrize("query", ["apply=maybe", "wait=soon"])
async def test_a_query_that_makes_no_sense(serve: Serve, query: str) -> None:
    api = await serve("api-one")

    reply = await api.ask("PUT", f"/api/models/api-one/enabled?{query}", {"enabled": True})

    assert reply.failure(422, "ValidationError")["errors"][0]["field"] == query.partition("=")[0]
    assert (await api.model("api-one"))["enabled"] is False


async def test_unknown_keys_of_the_query_are_ignored(serve: Serve) -> None:
    api = await serve()

    (await api.ask("GET", "/api/models/registry?colour=blue&_=1")).success()


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_the_same_form_of_error(serve: Serve, sent: bytes) -> None:
    api = await serve()

    status, headers, content = await raw(api, sent)

    assert re.match(r"HTTP/1\.[01] 400 ", status)
    body = json.loads(content)
    assert (body["error"], body["details"]) == ("BadRequest", {})
    assert "\n" not in body["message"]
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["x-request-id"]
    assert headers["x-response-time"]


@pytest.mark.parametrize("path", ["/health/live", "/nope"])
async def test_an_expectation_that_cannot_be_met(serve: Serve, path: str) -> None:
    api = await serve()
    sent = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nExpect: a-miracle\r\nX-Request-ID: expect-1\r\n\r\n"

    status, headers, content = await raw(api, sent.encode())

    assert status.startswith("HTTP/1.1 417 ")
    assert json.loads(content)["error"] == "ExpectationFailed"
    assert headers["x-request-id"] == "expect-1"


async def test_a_body_that_is_chunked_wrongly(serve: Serve) -> None:
    api = await serve("api-one")
    head = f"PUT {TIER} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    status, headers, content = await raw(api, f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode())

    assert re.match(r"HTTP/1\.[01] 400 ", status)
    assert json.loads(content)["error"] == "BadRequest"
    assert headers["x-request-id"]


async def test_a_client_that_breaks_off_is_no_defect(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    api = await serve("api-one")
    caplog.set_level(logging.INFO, "magi_agent.api")
    _, writer = await connect(api)
    writer.write(
        f"PUT {TIER} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        'Content-Length: 100\r\n\r\n{"tier":'.encode()
    )
    await until(lambda: handled(api), "the request is being handled")
    writer.close()

    async def over() -> bool:
        return any(record.getMessage().startswith(f"PUT {TIER}: 400 ") for record in caplog.records)

    await until(over, "the request is over")


async def test_a_body_that_is_compressed(serve: Serve) -> None:
    api = await serve("api-one")

    reply = await api.ask(
        "PUT",
        TIER,
        data=gzip.compress(b'{"tier": "fast"}'),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )

    assert reply.failure(415, "UnsupportedMediaType") == {"contentEncoding": "gzip"}


async def test_a_body_that_does_not_come(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve("api-one")
    monkeypatch.setattr("magi_agent.api.exchange._BODY_SECONDS", 0.2)
    sent = (
        f"PUT {TIER} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        'Content-Length: 100\r\n\r\n{"tier":'
    )

    status, _, content = await raw(api, sent.encode())

    assert status.startswith("HTTP/1.1 408 ")
    assert json.loads(content)["error"] == "RequestTimeout"


async def test_a_crash_tells_nothing_on_the_wire_and_all_to_the_journal(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-one")

    def broken(_: Registry) -> object:
        raise RuntimeError("a secret of the inside")

    # No request makes the real handler crash, as far as anybody knows.
    monkeypatch.setattr(Registry, "models", property(broken))
    reply = await api.ask("GET", "/api/models/registry", headers={"X-Request-ID": "crash-1"})
    monkeypatch.undo()

    assert reply.failure(500, "InternalServerError") == {}
    assert reply.headers["X-Request-ID"] == "crash-1"
    assert reply.headers["X-Response-Time"]
    assert b"secret" not in reply.content
    assert b"Traceback" not in reply.content
    (record,) = [record for record in caplog.records if record.exc_info]
    assert vars(record)["magi_request_id"] == "crash-1"
    assert record.exc_info is not None
    assert "a secret of the inside" in str(record.exc_info[1])
    caplog.clear()
    (await api.ask("GET", "/api/models/registry")).success()


async def test_the_root_says_what_answers(serve: Serve) -> None:
    api = await serve()

    root = await api.get("/")

    assert list(root) == ["name", "version", "docs", "status"]
    assert (root["name"], root["docs"], root["status"]) == ("magi-agent", "/api/docs", "running")
    assert (await api.ask("GET", root["docs"])).status == 200


async def test_health(serve: Serve, tmp_path: Path) -> None:
    api = await serve("api-one")

    assert await api.get("/health/live") == {"status": "alive"}
    ready = await api.get("/health/ready")
    assert (ready["status"], ready["models"], ready["enabledModels"], ready["problems"]) == ("ready", 1, 0, [])
    assert (ready["serversWanted"], ready["serversReady"], ready["missing"]) == (0, 0, {})
    begun = await api.ask("POST", "/api/models/servers/api-one/start")
    begun.success(202)
    waiting = await api.ask("GET", "/health/ready")
    assert (waiting.status, waiting.body["status"], list(waiting.body["missing"])) == (503, "not_ready", ["api-one"])
    await api.until_state("api-one", "ready")
    ready = await api.get("/health/ready")
    assert (ready["serversWanted"], ready["serversReady"], ready["missing"]) == (1, 1, {})


async def test_an_active_profile_that_is_not_there_is_a_problem_and_no_failure(serve: Serve) -> None:
    api = await serve(active_profile="absent")

    async def told() -> bool:
        return bool((await api.get("/health/ready"))["problems"])

    await until(told, "the problem is told")
    (problem,) = (await api.get("/health/ready"))["problems"]
    assert "absent" in problem


async def test_the_log_says_what_was_asked_for_in_one_short_line(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    api = await serve("api-one")
    long = "x" * 5000

    (
        await api.ask(
            "PUT", "/api/models/api-one/tier", data=b'{\n"tier":\t"fast"}', headers={"Content-Type": "application/json"}
        )
    ).success()
    (await api.ask("POST", "/api/models/profiles", {"name": "noted", "description": long})).success(201)

    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith('PUT /api/models/api-one/tier { "tier": "fast"}: 200 in ') for line in said)
    [profile] = [line for line in said if line.startswith("POST /api/models/profiles ")]
    assert len(profile) < 350
    assert "xxx…: 201 in" in profile
