"""Requests to models through the agent's own listeners."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.api.client import Api, Reply, until
from tests.api.conftest import Serve, systemctl
from tests.conftest import SampleModels
from tests.servers.system import script

ONE = "api-gate"
OTHER = "api-other"
PROMPT = {"prompt": "a", "max_tokens": 4, "temperature": 0}


async def started(api: Api, model_id: str = ONE) -> str:
    """Where a model's server is, once it is ready."""
    reply = await api.ask("POST", f"/api/models/servers/{model_id}/start?wait=60")
    return str(reply.success()["server"]["url"])


def openai_failure(reply: Reply, status: int, code: str) -> dict[str, Any]:
    """The error of an answer that must be this one, in the form of the OpenAI API."""
    error = reply.body["error"]
    assert (reply.status, error["code"]) == (status, code), f"{reply.status}: {reply.content[:2000]!r}"
    assert list(error) == ["message", "type", "param", "code", "details"]
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize("name", [ONE, "API-Gate", "nick/name:latest"])
async def test_a_model_is_asked_by_each_of_its_names(serve: Serve, name: str) -> None:
    api = await serve(ONE, OTHER)
    await api.ask("PUT", f"/api/models/{ONE}/settings", {"aliases": ["nick/name:latest"]})
    await started(api)

    answer = (await api.ask("POST", "/v1/completions", {"model": name, **PROMPT})).success()

    assert answer["model"] == ONE
    assert answer["usage"]["completion_tokens"] == 4


async def test_the_answer_is_the_servers_own(serve: Serve) -> None:
    api = await serve(ONE)
    url = await started(api)
    body = {"content": "some text", "with_pieces": True}
    async with aiohttp.ClientSession() as direct, direct.post(f"{url}/tokenize", json=body) as said:
        expected, headers = await said.read(), said.headers

    by_body = await api.ask("POST", "/tokenize", {"model": ONE, **body}, headers={"X-Request-ID": "mine"})
    by_path = await api.ask("POST", f"/api/proxy/{ONE}/tokenize", body)

    assert by_body.content == by_path.content == expected
    assert by_body.headers["Content-Type"] == headers["Content-Type"]
    assert by_body.headers["X-Request-ID"] == "mine"
    assert "Server" not in by_body.headers or "llama" not in by_body.headers["Server"]
    assert "Access-Control-Allow-Origin" not in by_body.headers


@pytest.mark.parametrize("access", ["port", "socket", "key"])
async def test_a_server_is_asked_however_it_is_reached(serve: Serve, access: str) -> None:
    api = await serve(ONE, server_access=access)
    await started(api)

    for _ in range(3):
        answer = await api.ask("POST", "/v1/completions", {"model": ONE, **PROMPT})
        assert answer.success()["model"] == ONE


async def test_an_image_or_two_pass(serve: Serve) -> None:
    api = await serve(ONE)
    await started(api)
    image = "A" * 20_000_000
    body = json.dumps({"content": "some text", "image": image, "model": ONE}).encode()

    answer = await api.ask("POST", "/tokenize", data=io.BytesIO(body))

    assert (
        answer.success()["tokens"]
        == (await api.ask("POST", "/tokenize", {"content": "some text", "model": ONE})).body["tokens"]
    )


async def test_an_answer_comes_as_it_is_made(serve: Serve) -> None:
    api = await serve(ONE)
    await started(api)
    body = {"model": ONE, **PROMPT, "max_tokens": 20, "stream": True, "ignore_eos": True}

    async with api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        assert "Content-Length" not in answer.headers
        pieces = [line async for line in answer.content if line.startswith(b"data: ")]

    assert pieces[-1] == b"data: [DONE]\n"
    assert sum("text" in json.loads(piece[6:])["choices"][0] for piece in pieces[:-1]) >= 20


async def test_a_client_that_leaves_frees_its_slot(serve: Serve, models: Path, sample_models: SampleModels) -> None:
    # A toy would be through with it at once.
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    url = await started(api)
    body = {"model": ONE, **PROMPT, "max_tokens": 6000, "stream": True, "ignore_eos": True}

    async def busy() -> int:
        async with aiohttp.ClientSession() as direct, direct.get(f"{url}/slots") as slots:
            return sum(slot["is_processing"] for slot in await slots.json())

    async with api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        await answer.content.readany()
        assert await busy() == 1
        answer.close()

    await until(lambda: _is(busy, 0), "the slot is free", 5)


async def _is(value: Any, wanted: object) -> bool:
    return bool(await value() == wanted)


async def test_a_server_that_dies_breaks_the_answer_off(
    serve: Serve, models: Path, sample_models: SampleModels
) -> None:
    # A toy would be through with it at once.
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    await started(api)
    body = {"model": ONE, **PROMPT, "max_tokens": 6000, "stream": True, "ignore_eos": True}

    async with asyncio.timeout(30), api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        said = [await answer.content.readany()]
        systemctl("kill", "--signal=KILL", f"magi-llama-{ONE}.service")
        with pytest.raises(aiohttp.ClientPayloadError):
            await _read_all(answer.content, said)

    assert b'"code":"server_failed"' in said[-1]


async def _read_all(content: aiohttp.StreamReader, said: list[bytes]) -> None:
    while piece := await content.readany():
        said.append(piece)


async def test_errors_are_in_the_form_that_clients_know(serve: Serve) -> None:
    api = await serve(ONE)

    unknown = await api.ask("POST", "/v1/chat/completions", {"model": "nobody", "messages": []})
    assert ONE in openai_failure(unknown, 404, "model_not_found")["message"]
    none = await api.ask("POST", "/v1/embeddings", {"input": "x"})
    assert openai_failure(none, 400, "model_required")["type"] == "invalid_request_error"
    no_json = await api.ask("POST", "/v1/chat/completions", data=b"[")
    openai_failure(no_json, 400, "invalid_json")
    down = await api.ask("POST", "/v1/chat/completions", {"model": ONE, "messages": []})
    assert "magictl start" in openai_failure(down, 503, "service_unavailable")["message"]
    assert down.headers["Retry-After"]
    openai_failure(await api.ask("DELETE", "/v1/completions"), 405, "method_not_allowed")
    large = await api.ask("POST", "/v1/completions", data=io.BytesIO(b"x" * (65 << 20)))
    openai_failure(large, 413, "payload_too_large")


async def test_what_the_server_refuses_is_its_own_answer(serve: Serve) -> None:
    api = await serve(ONE)
    await started(api)

    reply = await api.ask("POST", "/v1/completions", {"model": ONE, "max_tokens": 4})

    assert reply.status == 400
    assert reply.body["error"]["message"]
    assert (await api.ask("POST", "/v1/nonesuch", {"model": ONE})).status == 404


async def test_one_that_starts_for_requests_is_started(serve: Serve) -> None:
    api = await serve(ONE)
    await api.ask("PUT", f"/api/models/{ONE}/settings", {"startPolicy": "onDemand"})
    await api.ask("PUT", f"/api/models/{ONE}/enabled", {"enabled": True})

    assert (await api.ask("POST", "/v1/completions", {"model": ONE, **PROMPT})).success()["model"] == ONE


async def on_demand(api: Api, model_id: str = ONE) -> None:
    await api.ask("PUT", f"/api/models/{model_id}/settings", {"startPolicy": "onDemand"})
    await api.ask("PUT", f"/api/models/{model_id}/enabled", {"enabled": True})


async def test_a_stream_says_that_it_comes_while_its_model_starts(serve: Serve) -> None:
    api = await serve(ONE)
    await on_demand(api)
    body = {"model": ONE, **PROMPT, "stream": True}

    async with api.session.post(f"{api.base}/v1/completions", json=body) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        lines = [line async for line in answer.content if line.strip()]

    assert lines[0] == f": {ONE} is not ready yet\n".encode()
    assert lines[-1] == b"data: [DONE]\n"
    assert all(line.startswith((b": ", b"data: ")) for line in lines)


async def test_a_stream_that_began_tells_what_went_wrong_in_it(serve: Serve) -> None:
    api = await serve(ONE)
    await on_demand(api)
    refused = {"model": ONE, "stream": True}
    async with api.session.post(f"{api.base}/v1/completions", json=refused) as answer:
        said = [line async for line in answer.content if line.startswith(b"data: ")]
    assert json.loads(said[-1][6:])["error"]["message"]

    await api.ask("POST", f"/api/models/servers/{ONE}/stop?wait=60")
    await api.ask("PUT", "/api/drain", {"draining": True})
    async with api.session.post(f"{api.base}/v1/completions", json={**refused, **PROMPT}) as answer:
        (event,) = [line async for line in answer.content if line.startswith(b"data: ")]
    assert json.loads(event[6:])["error"]["code"] == "draining"


async def test_what_is_no_stream_is_whole_in_one_that_began(serve: Serve) -> None:
    api = await serve(ONE)
    await on_demand(api)
    long = {"model": ONE, "stream": True, "content": "a" * 60_000}

    said = (await api.ask("POST", "/tokenize", long)).content

    (event,) = [line for line in said.split(b"\n") if line.startswith(b"data: ")]
    assert json.loads(event[6:]) == (await api.ask("POST", "/tokenize", long)).success()
    assert said.endswith(b"]}\n\n")


async def test_no_more_requests_wait_for_a_model_than_may(serve: Serve, tmp_path: Path) -> None:
    silent = script(tmp_path / "silent", "sleep 1000")
    api = await serve(ONE, gateway_queue="2", llama_server_path=str(silent))
    await on_demand(api)
    body = {"model": ONE, **PROMPT}
    waiting = [asyncio.create_task(api.ask("POST", "/v1/completions", body)) for _ in range(2)]

    async def refused() -> bool:
        reply = await asyncio.wait_for(api.ask("POST", "/v1/completions", body), 0.5)
        return reply.status == 429 and openai_failure(reply, 429, "queue_full")["type"] == "rate_limit_error"

    await until(lambda: _is_soon(refused), "the queue is full", 10)
    # Who leaves makes room for others.
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    waiting.append(asyncio.create_task(api.ask("POST", "/v1/completions", body)))
    await until(lambda: _is_soon(refused), "the queue is full again", 10)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def _is_soon(asked: Any) -> bool:
    with contextlib.suppress(TimeoutError):
        return bool(await asked())
    return False


async def test_the_list_says_what_can_be_asked_for(serve: Serve) -> None:
    api = await serve(ONE, OTHER)
    await api.ask("PUT", f"/api/models/{ONE}/settings", {"aliases": ["nick"], "startPolicy": "manual"})
    await api.ask("PUT", f"/api/models/{ONE}/enabled", {"enabled": True})

    listed = await api.get("/v1/models")

    assert listed["object"] == "list"
    entry, tier, auto = listed["data"]
    assert (auto["id"], auto["tier"], auto["models"]) == ("auto", None, tier["models"])
    assert (entry["id"], entry["object"], entry["state"], entry["aliases"]) == (ONE, "model", "stopped", ["nick", ONE])
    assert (tier["id"], tier["object"], tier["state"], tier["models"]) == ("tier:balanced", "model", "stopped", [ONE])
    assert (tier["aliases"], tier["capabilities"]) == ([], ["completion"])


@pytest.mark.parametrize(
    "path",
    ["/v1/..%2fslots", "/v1/%2e%2e/slots", "/v1//slots", "/v1/x.y", "/v1/x%00", f"/api/proxy/{ONE}/v1/..%2fprops"],
)
async def test_a_path_that_may_be_taken_for_another_is_none(serve: Serve, path: str) -> None:
    api = await serve(ONE)
    await started(api)

    openai_failure(await api.ask("POST", path, {"model": ONE}), 404, "not_found")


async def test_a_path_that_shows_how_a_server_is_run_is_for_admins(serve: Serve) -> None:
    api = await serve(ONE, tcp_access="read")
    await started(api) if api.base == "http://localhost" else None

    reply = await api.ask("GET", f"/api/proxy/{ONE}/slots")

    if api.base == "http://localhost":
        assert reply.status == 200
    else:
        openai_failure(reply, 403, "forbidden")
