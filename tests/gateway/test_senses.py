"""Requests with images go to models that see, and those with sound to ones that hear, of whatever tier."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from toy_projector import write_toy_ear, write_toy_eye

from magi_agent.gateway.senses import NOTHING, Sense, needed
from tests.api.client import Api, Reply
from tests.api.conftest import Serve
from tests.conftest import MakeToyModel
from tests.gateway.test_forms import recording
from tests.gateway.test_gateway import openai_failure, started

BLIND, SEEING, HEARING = "api-blind", "api-seeing", "api-hearing"
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_PIXELS = zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8)
_HEAD = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", _HEAD) + _chunk(b"IDAT", _PIXELS) + _chunk(b"IEND", b"")
).decode()
"""Eight red pixels a side."""
DATA = f"data:image/png;base64,{PNG}"
ANTHROPIC = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}


def said(*parts: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, *parts]}]


IMAGE = {"type": "image_url", "image_url": {"url": DATA}}
SOUND = {"type": "input_audio", "input_audio": {"data": base64.b64encode(recording()).decode(), "format": "wav"}}
CHAT = {"messages": said(IMAGE)}
RESPONSE = {
    "input": [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "what is it?"}, {"type": "input_image", "image_url": DATA}],
        }
    ]
}
MESSAGES = {"messages": said(ANTHROPIC)}
MARKER = "<__media__>"
PROMPT = {"prompt": {"prompt_string": f"{MARKER} what is it?", "multimodal_data": [PNG]}}
FORMS = pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSE), ("/v1/messages", MESSAGES), ("/completion", PROMPT)],
    ids=["chat", "responses", "messages", "llama-server's own"],
)


@pytest.fixture
async def api(serve: Serve, models: Path, toy_model: MakeToyModel) -> Api:
    """A small model that sees nothing, and a large one that does: both are up."""
    for model_id in (BLIND, SEEING):
        toy_model(models / f"{model_id}.gguf")
    write_toy_eye(models / f"mmproj-{SEEING}.gguf")
    api = await serve()
    for model_id, tier in ((BLIND, "fast"), (SEEING, "powerful")):
        (await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})).success()
        await started(api, model_id)
    return api


async def ask(api: Api, path: str, name: str, body: dict[str, Any]) -> Reply:
    if path == "/completion":
        # Each server has a word of its own for where in a prompt something is to be seen.
        marker = (await api.get(f"/api/proxy/{SEEING}/props")).get("media_marker", MARKER)
        body = json.loads(json.dumps(body).replace(MARKER, marker))
    most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return await api.ask("POST", path, {"model": name, most: 2, **body})


@ONE_LISTENER
@FORMS
async def test_an_image_is_for_one_that_sees_of_whatever_tier(api: Api, path: str, body: dict[str, Any]) -> None:
    plain = {name: said() if name == "messages" else "hi" for name in body}

    assert (await ask(api, path, "auto", plain)).headers["X-Magi-Model"] == BLIND
    reply = await ask(api, path, "auto", body)

    reply.success()
    assert (reply.headers["X-Magi-Model"], reply.headers["X-Magi-Tier"]) == (SEEING, "powerful")


@ONE_LISTENER
async def test_one_that_sees_is_found_below_the_tier_too_and_within_a_tier(api: Api) -> None:
    for model_id, tier in ((BLIND, "powerful"), (SEEING, "fast")):
        (await api.ask("PUT", f"/api/models/{model_id}/tier", {"tier": tier})).success()
    hard = {"messages": [*CHAT["messages"], {"role": "user", "content": "Prove it step by step, and compare?" * 200}]}
    reply = await ask(api, "/v1/chat/completions", "auto", {**hard, "max_tokens": 1})
    assert (reply.headers["X-Magi-Model"], reply.headers["X-Magi-Tier"]) == (SEEING, "fast")

    # Both in one: whose turn it would be does not count.
    (await api.ask("PUT", f"/api/models/{BLIND}/tier", {"tier": "fast"})).success()
    asked = [await ask(api, "/v1/chat/completions", "tier:fast", CHAT) for _ in range(4)]
    assert [reply.success()["model"] for reply in asked] == [SEEING] * 4


@ONE_LISTENER
async def test_who_sees_nothing_is_asked_for_no_draft_of_an_image(api: Api) -> None:
    profile = {"name": "staged", "enabledModels": [BLIND, SEEING], "twoStage": {"enabled": True, "stage1Tier": "fast"}}
    assert (await api.ask("POST", "/api/models/profiles", profile)).status == 201
    (await api.ask("POST", "/api/models/profiles/staged/activate")).success()
    hard = {"type": "text", "text": "Prove step by step that it is one."}

    for parts, drafts in (([hard], 1), ([hard, IMAGE], 1), ([hard], 2)):
        reply = await ask(api, "/v1/chat/completions", "auto", {"messages": [{"role": "user", "content": parts}]})
        assert reply.success()["model"] == SEEING
        assert sum(api.services.tallies.taken()[BLIND].outcomes.values()) == drafts


@ONE_LISTENER
async def test_where_none_sees_that_is_said_and_no_model_is_asked(api: Api) -> None:
    nobody = await ask(api, "/v1/chat/completions", "tier:fast", CHAT)
    assert "of tier fast" in openai_failure(nobody, 404, "model_not_found")["message"]

    # A projector that is not used is none.
    (await api.ask("PUT", f"/api/models/{SEEING}/settings", {"projector": "none"})).success()
    nobody = await ask(api, "/v1/chat/completions", "auto", CHAT)
    message = openai_failure(nobody, 404, "model_not_found")["message"]
    assert message.startswith("no model is enabled that is for completion, and sees the images that the request has")
    entries = {entry["id"]: entry["capabilities"] for entry in (await api.get("/v1/models"))["data"]}
    assert "vision" not in [*entries[SEEING], *entries["auto"]]
    # By its own name, each model says itself what it makes of that.
    assert "image input is not supported" in (await ask(api, "/v1/chat/completions", BLIND, CHAT)).content.decode()


@ONE_LISTENER
async def test_sound_is_for_one_that_hears_and_who_only_sees_is_not_asked(
    api: Api, models: Path, toy_model: MakeToyModel
) -> None:
    chat = {"messages": said(SOUND)}
    for name in ("auto", "tier:powerful"):
        nobody = await ask(api, "/v1/chat/completions", name, chat)
        message = openai_failure(nobody, 404, "model_not_found")["message"]
        assert ", and hears the audio that the request has: GET" in message

    toy_model(models / f"{HEARING}.gguf", seed=2)
    write_toy_ear(models / f"mmproj-{HEARING}.gguf")
    (await api.ask("POST", "/api/models/rescan")).success()
    (await api.ask("PUT", f"/api/models/{HEARING}/tier", {"tier": "powerful"})).success()
    await started(api, HEARING)
    for name in ("auto", "tier:powerful"):
        asked = [await ask(api, "/v1/chat/completions", name, chat) for _ in range(3)]
        assert [reply.success()["model"] for reply in asked] == [HEARING] * 3
        assert (await ask(api, "/v1/chat/completions", name, CHAT)).success()["model"] == SEEING
    both = await ask(api, "/v1/chat/completions", "auto", {"messages": said(SOUND, IMAGE)})
    message = openai_failure(both, 404, "model_not_found")["message"]
    assert "sees the images and hears the audio that the request has" in message

    entries = {entry["id"]: entry["capabilities"] for entry in (await api.get("/v1/models"))["data"]}
    senses = {name: set(has) & {"vision", "audio"} for name, has in entries.items()}
    assert (senses[BLIND], senses[SEEING], senses[HEARING]) == (set(), {"vision"}, {"audio"})
    assert senses["tier:powerful"] == senses["auto"] == {"vision", "audio"}
    registry = (await api.get("/api/models/registry"))["models"]
    assert {model_id: model["hasAudio"] for model_id, model in registry.items()} == {
        model_id: model_id == HEARING for model_id in (BLIND, SEEING, HEARING)
    }


def needs(body: object) -> frozenset[Sense]:
    return needed("/v1/chat/completions", json.dumps(body).encode())


def test_images_are_found_wherever_a_request_has_them() -> None:
    back = {"type": "tool_result", "tool_use_id": "x", "content": [ANTHROPIC]}
    output = {"type": "function_call_output", "call_id": "x", "output": [{"type": "input_image", "image_url": DATA}]}
    earlier = {"messages": [*said(ANTHROPIC), *({"role": "user", "content": "and?"} for _ in range(5000))]}
    for body in (CHAT, RESPONSE, MESSAGES, PROMPT, {"messages": said(back)}, {"input": [output]}, earlier):
        assert needs(body) == {Sense.VISION}


def test_sounds_are_found_as_images_are_and_both_together() -> None:
    back: object = {"type": "tool_result", "tool_use_id": "x", "content": [SOUND]}
    for parts in ([SOUND], [back]):
        assert needs({"messages": said(*parts)}) == needs({"input": said(*parts)}) == {Sense.AUDIO}
    for parts in ([SOUND, IMAGE], [ANTHROPIC, SOUND], [back, IMAGE, IMAGE]):
        assert needs({"messages": said(*parts)}) == {Sense.AUDIO, Sense.VISION}
    assert needed("/v1/audio/transcriptions", b"") == {Sense.AUDIO}


@pytest.mark.parametrize("name", ["prompt", "input", "content"])
@pytest.mark.parametrize(
    ("data", "senses"),
    [
        ([PNG], {Sense.VISION}),
        ([base64.b64encode(b"RIFF\0\0\0\0WEBPVP8 ").decode()], {Sense.VISION}),
        ([base64.b64encode(b"\xff\xd8\xff\xe0\0\x10JFIF").decode()], {Sense.VISION}),
        (["no base64, and so what else may it be?"], {Sense.VISION}),
        (["\u0430"], {Sense.VISION}),
        ([base64.b64encode(b"RIFF\0\0\0\0WAVEfmt ").decode()], {Sense.AUDIO}),
        ([base64.b64encode(b"ID3\4").decode(), base64.b64encode(b"\xff\xfb\x90").decode()], {Sense.AUDIO}),
        ([base64.b64encode(b"fLaC").decode()], {Sense.AUDIO}),
        ([base64.b64encode(b"fLaC").decode(), PNG], {Sense.AUDIO, Sense.VISION}),
        ([], set()),
        (PNG, set()),
        ([None, 3, [PNG], {"x": PNG}], set()),
    ],
)
def test_what_is_beside_a_prompt_is_an_image_or_a_sound(name: str, data: object, senses: set[Sense]) -> None:
    prompt = {"prompt_string": f"{MARKER}?", "multimodal_data": data}

    for body in ({name: prompt}, {name: ["a text", [1, 2], prompt]}):
        assert needs(body) == senses


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": 'hear {"type": "input_audio"}'}]},
        {"messages": said({"type": "text", "text": "input_audio"}, {"type": ["input_audio"]})},
        {"messages": said(), "modalities": ["text", "audio"], "input_audio": {"data": "x"}},
        {"messages": [{"role": "user", "content": 'draw {"type": "image"}'}]},
        {"messages": said({"type": "text", "text": "image_url"}, {"type": ["image"]}, None, 3)},
        {"messages": said(), "tools": [{"type": "image"}], "image": "x"},
        {"input": "an image", "messages": None},
        {"prompt": {"prompt_string": "multimodal_data"}, "multimodal_data": [PNG]},
        ["image"],
        "image",
    ],
)
def test_what_only_speaks_of_images_and_sounds_has_none(body: object) -> None:
    assert needs(body) == NOTHING


@pytest.mark.parametrize(
    "body", [b"image", b'{"messages": "image', b"[" * 1_000_000 + b"image", b'--x\r\nname="image"\r\n\r\n\xff']
)
def test_what_is_no_json_has_none(body: bytes) -> None:
    assert needed("/v1/chat/completions", body) == NOTHING
