"""Forms: a recording is written down by the model that the form names, or by one that the agent chooses."""

from __future__ import annotations

import asyncio
import io
import json
import wave
from pathlib import Path

import aiohttp
import pytest
from toy_projector import write_toy_ear

from magi_agent.gateway.senses import Sense
from tests.api.client import Api, Reply
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel
from tests.gateway.test_gateway import on_demand, openai_failure, started

DEAF, MODEL = "api-deaf", "api-hears"
PATH = "/v1/audio/transcriptions"
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


def recording() -> bytes:
    """Half a second of next to nothing."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(range(256)) * 62)
    return file.getvalue()


@pytest.fixture
async def api(serve: Serve, models: Path, toy_model: MakeToyModel) -> Api:
    """An agent with a model that hears, and is not started."""
    toy_model(models / f"{MODEL}.gguf")
    write_toy_ear(models / f"mmproj-{MODEL}.gguf")
    api = await serve()
    (await api.ask("PUT", f"/api/models/{MODEL}/tier", {"tier": "fast"})).success()
    return api


def form(**fields: str) -> aiohttp.FormData:
    said = aiohttp.FormData({"max_tokens": "4", **fields})
    said.add_field("file", recording(), filename="a.wav", content_type="audio/wav")
    return said


async def ask(api: Api, **fields: str) -> Reply:
    return await api.ask("POST", PATH, data=form(**fields))


@ONE_LISTENER
@pytest.mark.parametrize("name", ["auto", "tier:fast", MODEL])
async def test_a_recording_is_written_down(api: Api, name: str) -> None:
    await started(api, MODEL)

    reply = await ask(api, model=name)

    assert len(reply.success()["text"]) == 4
    assert reply.headers["X-Magi-Model"] == MODEL
    assert (reply.headers.get("X-Magi-Tier"), reply.headers.get("X-Magi-Score")) == (
        ("fast", "0") if name == "auto" else (None, None)
    )


@ONE_LISTENER
@pytest.mark.parametrize("name", ["auto", "tier:fast", MODEL])
async def test_a_form_that_asks_for_a_stream_is_told_that_it_comes_while_its_model_starts(api: Api, name: str) -> None:
    await on_demand(api, MODEL)

    reply = await ask(api, model=name, stream="true")

    assert (reply.status, reply.headers["X-Magi-Model"]) == (200, MODEL)
    lines = [line for line in reply.content.split(b"\n") if line]
    assert lines[0] == f": {MODEL} is not ready yet".encode()
    assert [b"transcript.text.delta" in line for line in lines if line.startswith(b"data: {")] == [True] * 4 + [False]
    assert lines[-1] == b"data: [DONE]"


@ONE_LISTENER
async def test_one_that_hears_does_not_see_also_where_its_projector_is_set(api: Api, models: Path) -> None:
    for settings in ({}, {"projector": str(models / f"mmproj-{MODEL}.gguf")}):
        (await api.ask("PUT", f"/api/models/{MODEL}/settings", settings)).success()
        model = api.services.registry.models[MODEL]
        assert api.services.tiers.senses(model) == {Sense.AUDIO}
    elsewhere = models / "elsewhere" / "mmproj.gguf"
    elsewhere.parent.mkdir()
    write_toy_ear(elsewhere)
    (await api.ask("PUT", f"/api/models/{MODEL}/settings", {"projector": str(elsewhere)})).success()
    assert api.services.tiers.senses(api.services.registry.models[MODEL]) == {Sense.VISION}


@ONE_LISTENER
@pytest.mark.parametrize("name", ["auto", "tier:fast"])
async def test_a_recording_is_for_one_that_hears_and_where_none_does_no_model_is_asked(
    api: Api, models: Path, toy_model: MakeToyModel, name: str
) -> None:
    toy_model(models / f"{DEAF}.gguf")
    (await api.ask("POST", "/api/models/rescan")).success()
    (await api.ask("PUT", f"/api/models/{DEAF}/tier", {"tier": "fast"})).success()
    for model_id in (DEAF, MODEL):
        await started(api, model_id)
    replies = [await ask(api, model=name) for _ in range(4)]
    assert [reply.headers.get("X-Magi-Model") for reply in replies] == [MODEL] * 4
    # It passes a deaf one's answer on where that is asked by its name.
    assert (await ask(api, model=DEAF)).status == 501

    (await api.ask("POST", f"/api/models/servers/{MODEL}/stop?wait=60")).success()
    nobody = await ask(api, model=name)

    message = openai_failure(nobody, 404, "model_not_found")["message"]
    assert message.startswith("no model")
    assert "is enabled that is for completion, and hears the audio that the request has" in message


@ONE_LISTENER
async def test_a_form_that_asks_for_none_waits(api: Api) -> None:
    await on_demand(api, MODEL)

    replies = await asyncio.gather(ask(api, model="auto"), ask(api, model="auto", stream="false"))

    assert [len(reply.success()["text"]) for reply in replies] == [4, 4]


@ONE_LISTENER
@pytest.mark.parametrize("name", ["auto", "tier:fast"])
async def test_a_stream_whose_model_is_chosen_says_that_it_comes(api: Api, name: str) -> None:
    await on_demand(api, MODEL)
    body = {"model": name, "prompt": "a", "max_tokens": 3, "stream": True}

    reply = await api.ask("POST", "/v1/completions", body)

    assert (reply.status, reply.headers["X-Magi-Model"]) == (200, MODEL)
    assert ("X-Magi-Score" in reply.headers) is (name == "auto")
    assert reply.content.startswith(f": {MODEL} is not ready yet\n\n".encode())
    assert reply.content.endswith(b"data: [DONE]\n\n")
    assert f'"model":"{MODEL}"'.encode() in reply.content


@ONE_LISTENER
@pytest.mark.parametrize("boundary", [b"", b"; boundary=\xff", b'; boundary="\xe9"', b"; boundary="])
async def test_a_form_of_which_nobody_knows_the_parts_names_no_model(api: Api, boundary: bytes) -> None:
    body = b"--x\r\n\r\n--x--"
    # No client would send it.
    reader, writer = await asyncio.open_unix_connection(str(api.agent.settings.socket))
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: multipart/form-data%b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (PATH.encode(), boundary, len(body), body)
    )
    head, _, said = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()

    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(said)["error"]["code"] == "model_required"
