"""The official client of Anthropic's API against the gateway and a real llama-server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
import pytest_asyncio

from magi_agent.tokens import new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.client import Api
from tests.api.conftest import Serve, systemctl
from tests.api.test_tokens import keep, token
from tests.conftest import SampleModels
from tests.gateway.test_gateway import ONE, on_demand, started
from tests.servers.system import script

KEY, OTHER_KEY = new_secret(), new_secret()
ASKED: dict[str, Any] = {"model": ONE, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
Connect = Callable[..., anthropic.AsyncAnthropic]

BY_KEY: dict[str, Any] = {"default_headers": {"X-Api-Key": KEY}}
"""What releases before 2.0 make of an ``api_key``."""


@pytest_asyncio.fixture
async def connect(options: dict[str, str], listener: str, tmp_path: Path) -> AsyncIterator[Connect]:
    """Makes clients of the listener that the test runs for, with a key that may use the models and no more."""
    infer = token("program", TokenScope.INFER, KEY), token("other", TokenScope.INFER, OTHER_KEY)
    options |= {"tokens_path": str(keep(tmp_path, *infer)), "tcp_access": "none"}
    made: list[anthropic.AsyncAnthropic] = []

    def client(api: Api, **given: Any) -> anthropic.AsyncAnthropic:
        transport = httpx2.AsyncHTTPTransport(uds=options["socket"] if listener == "unix" else None)
        settings: dict[str, Any] = {"max_retries": 0, "timeout": 60, **(given or BY_KEY)}
        # What comes through a proxy has no right of its own on either listener: it is the key that counts.
        http = httpx2.AsyncClient(transport=transport, headers={"X-Forwarded-For": "192.0.2.1"})
        made.append(anthropic.AsyncAnthropic(base_url=api.base, http_client=http, **settings))
        return made[-1]

    yield client
    for each in made:
        await each.close()


@pytest.fixture
async def talking(connect: Connect, serve: Serve, models: Path, sample_models: SampleModels) -> Api:
    """An agent whose model has something to say, and is up."""
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    await started(api)
    return api


@pytest.mark.parametrize(
    "given",
    [BY_KEY, {"api_key": KEY}, {"auth_token": KEY}, {"api_key": KEY, **BY_KEY}],
    ids=["X-Api-Key", "api_key", "auth_token", "both"],
)
@ONE_LISTENER
async def test_it_talks(talking: Api, connect: Connect, given: dict[str, Any]) -> None:
    client = connect(talking, **given)

    whole = await client.messages.create(**ASKED, extra_body={"temperature": 0})
    async with client.messages.stream(**ASKED, extra_body={"temperature": 0}) as stream:
        pieces = [piece async for piece in stream.text_stream]
        final = await stream.get_final_message()
    counted = await client.messages.count_tokens(model=ONE, messages=ASKED["messages"])

    [said] = whole.content
    assert said.type == "text"
    assert (whole.model, whole.stop_reason, whole.usage.output_tokens) == (ONE, "max_tokens", 8)
    assert "".join(pieces) == said.text != ""
    assert len(pieces) > 1
    assert (final.model, final.stop_reason, final.usage.output_tokens) == (ONE, "max_tokens", 8)
    assert counted.input_tokens == whole.usage.input_tokens > 0


async def test_it_knows_the_errors(connect: Connect, serve: Serve) -> None:
    api = await serve(ONE)
    client = connect(api)

    with pytest.raises(anthropic.NotFoundError) as unknown:
        await client.messages.create(**{**ASKED, "model": "nobody"})
    assert unknown.value.type == "not_found_error"
    assert "no model is called 'nobody'" in (unknown.value.api_message or "")
    with pytest.raises(anthropic.BadRequestError) as unreadable:
        await client.post("/v1/messages", cast_to=object, content=b"[")
    assert unreadable.value.type == "invalid_request_error"
    with pytest.raises(anthropic.ServiceUnavailableError, match="magictl start") as down:
        await client.messages.create(**ASKED)
    assert down.value.type == "overloaded_error"
    with pytest.raises(anthropic.ServiceUnavailableError):
        await client.messages.create(**ASKED, stream=True)
    by_path = client.with_options(base_url=f"{api.base}/api/proxy/{ONE}")
    with pytest.raises(anthropic.ServiceUnavailableError) as down:
        await by_path.messages.create(**ASKED)
    assert down.value.type == "overloaded_error"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"api_key": "unused"}, "not known"),
        ({"default_headers": {"X-Api-Key": "unused"}}, "not known"),
        ({"api_key": OTHER_KEY, **BY_KEY}, "bring different tokens"),
        ({"api_key": "unused", **BY_KEY}, "bring different tokens"),
        ({"auth_token": KEY, "default_headers": {"X-Api-Key": "unused"}}, "bring different tokens"),
    ],
)
async def test_a_key_that_does_not_hold_is_refused(
    connect: Connect, serve: Serve, given: dict[str, Any], why: str
) -> None:
    client = connect(await serve(ONE), **given)

    for asked in (client.messages.create(**ASKED), client.models.retrieve(ONE)):
        with pytest.raises(anthropic.AuthenticationError, match=why) as refused:
            await asked
        assert refused.value.response.json()["error"]["code"] == "invalid_api_key"
        assert refused.value.type == "authentication_error"


@ONE_LISTENER
async def test_it_is_told_that_too_many_wait(connect: Connect, serve: Serve, tmp_path: Path) -> None:
    silent = script(tmp_path / "silent", "sleep 1000")
    api = await serve(ONE, gateway_queue="1", llama_server_path=str(silent))
    await on_demand(api)
    client = connect(api)
    waiting = asyncio.ensure_future(client.messages.create(**ASKED))
    await asyncio.sleep(0.5)

    with pytest.raises(anthropic.RateLimitError) as refused:
        await client.messages.create(**ASKED, timeout=5)

    assert refused.value.type == "rate_limit_error"
    assert float(refused.value.response.headers["Retry-After"]) > 0
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


@ONE_LISTENER
async def test_what_goes_wrong_in_a_stream_that_began_is_raised(connect: Connect, serve: Serve) -> None:
    api = await serve(ONE)
    await on_demand(api)
    client = connect(api)
    image = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    seen: Any = [{"role": "user", "content": [{"type": "image", "source": image}]}]

    # By the server, once it has come up.
    refused = await client.messages.create(model=ONE, max_tokens=2, messages=seen, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="image input is not supported"):
        await anext(refused)

    # By the agent.
    (await api.ask("POST", f"/api/models/servers/{ONE}/stop?wait=60")).success()
    (await api.ask("PUT", "/api/drain", {"draining": True})).success()
    drained = await client.messages.create(**ASKED, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the host is being drained") as error:
        await anext(drained)
    assert error.value.type == "conflict_error"


@ONE_LISTENER
async def test_a_server_that_dies_in_the_middle_of_a_stream_is_an_error(talking: Api, connect: Connect) -> None:
    long: dict[str, Any] = {**ASKED, "max_tokens": 6000, "extra_body": {"ignore_eos": True}}
    said = await connect(talking).messages.create(**long, stream=True)

    async def read_on() -> None:
        async for event in said:
            if event.type == "content_block_delta":
                systemctl("kill", "--signal=KILL", f"magi-llama-{ONE}.service")

    with pytest.raises(anthropic.APIStatusError, match="broke off in the middle") as error:
        await asyncio.wait_for(read_on(), 30)
    assert error.value.type == "api_error"
