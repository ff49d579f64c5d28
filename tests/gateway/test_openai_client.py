"""The official client of the OpenAI API against the gateway and a real llama-server."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionToolParam

from magi_agent.tokens import new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.api.test_tokens import keep, token
from tests.conftest import MakeToyModel, SampleModels
from tests.gateway.test_gateway import ONE, OTHER, on_demand, started
from tests.gateway.test_staged import BUDGET, FIRST, HARD, SECOND, configured
from tests.servers.system import script

KEY = new_secret()
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "now", "description": "the time", "parameters": {"type": "object", "properties": {}}},
}
TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"
Connect = Callable[..., openai.AsyncOpenAI]


@pytest_asyncio.fixture
async def connect(options: dict[str, str], listener: str, tmp_path: Path) -> AsyncIterator[Connect]:
    """Makes clients of the listener that the test runs for, with a key that may use the models and no more."""
    options["tokens_path"] = str(keep(tmp_path, token("program", TokenScope.INFER, KEY)))
    made: list[openai.AsyncOpenAI] = []

    def client(api: Api, **given: Any) -> openai.AsyncOpenAI:
        transport = httpx2.AsyncHTTPTransport(uds=options["socket"] if listener == "unix" else None)
        settings: dict[str, Any] = {"api_key": KEY, "max_retries": 0, "timeout": 60, **given}
        http = httpx2.AsyncClient(transport=transport)
        made.append(openai.AsyncOpenAI(base_url=f"{api.base}/v1", http_client=http, **settings))
        return made[-1]

    yield client
    for each in made:
        await each.close()


async def test_it_finds_out_about_a_model(serve: Serve, connect: Connect) -> None:
    api = await serve(ONE, OTHER)
    await on_demand(api)
    (await api.ask("PUT", f"/api/models/{ONE}/settings", {"startPolicy": "onDemand", "aliases": ["a/nick"]})).success()
    client = connect(api)
    listed = {model.id: model async for model in client.models.list()}
    assert listed.keys() >= {ONE, "auto"}

    for name, model in listed.items():
        assert await client.models.retrieve(name) == model
    assert await client.models.retrieve("a/nick") == listed[ONE]
    for name in (OTHER, "nobody", "tier:nobody"):
        with pytest.raises(openai.NotFoundError) as error:
            await client.models.retrieve(name)
        assert error.value.code == "model_not_found"
    assert await api.state(ONE) == "stopped"


async def test_it_talks(serve: Serve, connect: Connect, models: Path, sample_models: SampleModels) -> None:
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    await started(api)
    client = connect(api)

    assert [each.id async for each in client.models.list()] == [ONE, "tier:fast", "auto"]
    whole = await client.chat.completions.create(
        model=ONE, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0
    )
    pieces = await client.chat.completions.create(
        model=ONE, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0, stream=True
    )
    said = "".join([piece.choices[0].delta.content or "" async for piece in pieces if piece.choices])
    assert whole.usage is not None
    assert (whole.model, whole.usage.completion_tokens) == (ONE, 8)
    assert said == whole.choices[0].message.content != ""


async def test_its_tools_reach_the_model(serve: Serve, connect: Connect, models: Path, toy_model: MakeToyModel) -> None:
    toy_model(models / f"{ONE}.gguf", chat_template=TEMPLATE)
    api = await serve()
    url = await started(api)
    directly = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY)

    async def lengths(client: openai.AsyncOpenAI) -> list[int]:
        """Of the prompts that the template makes, without and with tools."""
        offered: list[openai.Omit | list[ChatCompletionToolParam]] = [openai.omit, [TOOL]]
        answers = [
            await client.chat.completions.create(
                model=ONE, messages=[{"role": "user", "content": "Hello"}], max_tokens=2, tools=tools
            )
            for tools in offered
        ]
        return [answer.usage.prompt_tokens for answer in answers if answer.usage is not None]

    without, with_tools = await lengths(connect(api))
    assert without < with_tools
    assert await lengths(directly) == [without, with_tools]
    await directly.close()


async def test_it_sees_a_draft_as_thinking_and_gets_one_answer(
    serve: Serve, connect: Connect, models: Path, toy_model: MakeToyModel
) -> None:
    for number, model_id in enumerate((FIRST, SECOND)):
        toy_model(models / f"{model_id}.gguf", chat_template=TEMPLATE, context_length=2048, seed=1 + number)
    api = await serve()
    await configured(api, tiers={FIRST: "fast", SECOND: "powerful"})
    await started(api, FIRST)
    await started(api, SECOND)
    asked: dict[str, Any] = {
        "model": "auto", "messages": [{"role": "user", "content": HARD}], "max_tokens": 12, "temperature": 0
    }  # fmt: skip
    client = connect(api)

    whole = await client.chat.completions.create(**asked)
    pieces = [piece async for piece in await client.chat.completions.create(**asked, stream=True)]
    async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        async for _ in stream:
            # Toys never stop by themselves, and to ask for the whole is an error where an answer was cut.
            final = stream.current_completion_snapshot

    deltas = [choice.delta.to_dict() for piece in pieces for choice in piece.choices]
    kinds = [name for delta in deltas for name in ("reasoning_content", "content") if delta.get(name)]
    assert kinds == sorted(kinds, reverse=True), "the draft comes first"
    draft = "".join(str(delta.get("reasoning_content") or "") for delta in deltas)
    assert len(draft.strip()) == BUDGET
    assert [choice.finish_reason for choice in pieces[-1].choices] == ["length"]
    answer = "".join(str(delta.get("content") or "") for delta in deltas)
    message = final.choices[0].message
    assert len(answer) == 12
    assert answer == whole.choices[0].message.content == message.content
    assert (message.role, final.model) == ("assistant", SECOND)
    assert final.usage is not None
    assert final.usage.completion_tokens == 12
    assert message.to_dict()["reasoning_content"] == draft


async def test_it_embeds(serve: Serve, connect: Connect) -> None:
    api = await serve(ONE)
    await api.ask("PUT", f"/api/models/{ONE}/settings", {"mode": "embedding", "pooling": "mean"})
    await started(api)

    made = await connect(api).embeddings.create(model=ONE, input=["a", "b"])

    assert [each.index for each in made.data] == [0, 1]
    assert all(any(each.embedding) for each in made.data)


async def test_it_knows_the_errors(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(ONE))

    with pytest.raises(openai.NotFoundError, match="no model is called 'nobody'") as unknown:
        await client.completions.create(model="nobody", prompt="a")
    assert (unknown.value.code, unknown.value.type) == ("model_not_found", "not_found_error")
    with pytest.raises(openai.BadRequestError) as unreadable:
        await client.post("/completions", cast_to=object, content=b"[")
    assert unreadable.value.code == "invalid_json"
    with pytest.raises(openai.InternalServerError, match="magictl start") as down:
        await client.completions.create(model=ONE, prompt="a")
    assert (down.value.status_code, down.value.code) == (503, "service_unavailable")


async def test_a_key_that_is_no_token_is_refused_where_none_is_needed(serve: Serve, connect: Connect) -> None:
    client = connect(await serve(ONE), api_key="unused")

    with pytest.raises(openai.AuthenticationError) as refused:
        await client.models.list()
    assert refused.value.code == "invalid_api_key"

    assert (await client.models.list(extra_headers={"Authorization": openai.Omit()})).object == "list"


async def test_it_is_told_that_too_many_wait(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    silent = script(tmp_path / "silent", "sleep 1000")
    api = await serve(ONE, gateway_queue="1", llama_server_path=str(silent))
    await on_demand(api)
    client = connect(api)
    waiting = asyncio.ensure_future(client.completions.create(model=ONE, prompt="a"))
    await asyncio.sleep(0.5)

    with pytest.raises(openai.RateLimitError) as refused:
        await client.completions.create(model=ONE, prompt="a", timeout=5)

    assert refused.value.code == "queue_full"
    assert float(refused.value.response.headers["Retry-After"]) > 0
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_it_asks_again_when_it_is_told_to(serve: Serve, connect: Connect) -> None:
    api = await serve(ONE)
    client = connect(api, max_retries=1)
    asked = asyncio.ensure_future(
        client.completions.with_raw_response.create(model=ONE, prompt="a", max_tokens=4, stream=False)
    )
    await asyncio.sleep(0.5)
    await started(api)

    answer = await asked

    assert answer.retries_taken == 1
    assert answer.parse().model == ONE


async def test_its_time_limit_frees_the_slot(
    serve: Serve, connect: Connect, models: Path, sample_models: SampleModels
) -> None:
    # A toy would be through with it at once.
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    url = await started(api)

    async def is_free() -> bool:
        # llama-server looks for who has left a whole answer after a second without a word to anybody: this is one.
        await asyncio.sleep(1.5)
        async with aiohttp.ClientSession() as direct, direct.get(f"{url}/slots") as slots:
            return not any(slot["is_processing"] for slot in await slots.json())

    begun = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        await connect(api, timeout=1).completions.create(
            model=ONE, prompt="a", max_tokens=6000, extra_body={"ignore_eos": True}
        )

    assert time.monotonic() - begun < 10
    await until(is_free, "the slot is free", 5)


async def test_its_time_limit_in_the_middle_of_a_stream_frees_the_slot(
    serve: Serve, connect: Connect, models: Path, sample_models: SampleModels
) -> None:
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    url = await started(api)

    async def is_free() -> bool:
        async with aiohttp.ClientSession() as direct, direct.get(f"{url}/slots") as slots:
            return not any(slot["is_processing"] for slot in await slots.json())

    pieces = await connect(api).completions.create(
        model=ONE, prompt="a", max_tokens=6000, extra_body={"ignore_eos": True}, stream=True
    )
    async with asyncio.timeout(10):
        async for _ in pieces:
            break
    await pieces.close()

    await until(is_free, "the slot is free", 5)
