"""What /metrics tells of requests through the gateway is what their clients saw, on a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from magi_agent.metrics import metrics as metrics_module
from tests.api.client import Api, until
from tests.api.conftest import Serve, systemctl
from tests.api.test_metrics import Samples, figure, scrape, text
from tests.conftest import MakeToyModel, SampleModels, SystemdUser
from tests.gateway.test_gateway import ONE, on_demand, started
from tests.servers.system import script

ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
FILL = {f"tokenizer.ggml.fim_{part}_token_id": 100 + number for number, part in enumerate(("pre", "suf", "mid"))}
MESSAGES = [{"role": "user", "content": 'say "usage":{"completion_tokens":999} and "timings":{"predicted_n":999}'}]
TEXT = 'tell of "usage":{"prompt_tokens":999}'
"""A prompt that some answers tell again."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 7}),
    "completions": ("/v1/completions", {"prompt": TEXT, "max_tokens": 7}),
    "responses": ("/v1/responses", {"input": TEXT, "max_output_tokens": 7}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 7}),
    "completion": ("/completion", {"prompt": TEXT, "n_predict": 7}),
    "infill": ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 7}),
}


@pytest.fixture(autouse=True)
def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_FRESH", 0.0)


def of(samples: Samples, name: str, model: str = ONE, **labels: str) -> float:
    return figure(samples, f"magi_gateway_{name}", model=model, **labels)


def outcomes(samples: Samples) -> dict[str, float]:
    """Those that there were."""
    found = {
        dict(labels)["outcome"]: count
        for (name, labels), count in samples.items()
        if name == "magi_gateway_requests_total"
    }
    return {outcome: count for outcome, count in found.items() if count}


def events(said: bytes) -> list[dict[str, Any]]:
    """The whole of an answer, taken apart as a client does."""
    if not said.startswith((b"data: ", b"event: ", b": ")):
        return [json.loads(said)]
    found = [line[6:] for line in said.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line) for line in found]


def seen(said: bytes) -> tuple[int, int]:
    """The tokens of prompt and answer that a client is told of."""
    prompt = completion = 0
    for event in events(said):
        for part in (event, event.get("response") or {}, event.get("message") or {}):
            usage, timings = part.get("usage") or {}, part.get("timings") or {}
            if "prompt_n" in timings:
                prompt, completion = timings["prompt_n"] + timings["cache_n"], timings["predicted_n"]
            if "input_tokens" in usage:
                prompt = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
            prompt = usage.get("prompt_tokens", prompt)
            completion = usage.get("completion_tokens", usage.get("output_tokens", completion))
    return prompt, completion


async def asked(api: Api, path: str, body: dict[str, Any], model_id: str = ONE) -> bytes:
    reply = await api.ask("POST", path, {"model": model_id, **body})
    assert reply.status == 200, reply.content[:2000]
    return reply.content


async def up(serve: Serve, models: Path, toy_model: MakeToyModel) -> Api:
    """An agent with a model that can do all that is asked of texts."""
    toy_model(models / f"{ONE}.gguf", metadata=dict(FILL))
    api = await serve()
    await started(api)
    return api


@ONE_LISTENER
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", CASES)
async def test_tokens_are_those_that_the_client_was_told_of(
    serve: Serve, models: Path, toy_model: MakeToyModel, case: str, is_stream: bool
) -> None:
    api = await up(serve, models, toy_model)
    path, body = CASES[case]

    # From the second on, the server has the prompt in its cache.
    answers = [await asked(api, path, {**body, "stream": is_stream}) for _ in range(3)]
    told = [seen(said) for said in answers]

    assert [completion for _, completion in told] == [7, 7, 7]
    samples = await scrape(api)
    assert of(samples, "prompt_tokens_total") == sum(prompt for prompt, _ in told) > 3
    assert of(samples, "completion_tokens_total") == 21
    assert outcomes(samples) == {"answered": 3}
    assert of(samples, "first_token_seconds_count") == of(samples, "server_first_token_seconds_count") == 3 * is_stream
    assert of(samples, "first_token_seconds_sum") >= of(samples, "server_first_token_seconds_sum")
    assert of(samples, "request_duration_seconds_count") == of(samples, "wait_seconds_count") == 3
    # Only llama-server's own numbers tell how fast an answer was made that came in no time.
    tells = case != "messages" and (case, is_stream) != ("responses", False)
    assert of(samples, "tokens_per_second_count") == (3 if tells else 0)
    speeds = [
        event["timings"]["predicted_per_second"] for said in answers for event in events(said) if "timings" in event
    ]
    assert of(samples, "tokens_per_second_sum") == pytest.approx(sum(speeds))
    assert of(samples, "requests_under_way") == of(samples, "requests_waiting") == 0


@ONE_LISTENER
async def test_usage_that_is_asked_for_in_a_stream_is_counted_once(
    serve: Serve, models: Path, toy_model: MakeToyModel
) -> None:
    api = await up(serve, models, toy_model)
    path, body = CASES["chat"]

    for more in ({"stream_options": {"include_usage": True}}, {"timings_per_token": True}):
        said = await asked(api, path, {**body, "stream": True, **more})
        assert seen(said)[1] == 7
    assert of(await scrape(api), "completion_tokens_total") == 14


@ONE_LISTENER
async def test_an_answer_with_a_long_end(serve: Serve, models: Path, toy_model: MakeToyModel) -> None:
    api = await up(serve, models, toy_model)

    said = await asked(api, "/completion", {"prompt": "abc", "n_predict": 7, "n_probs": 60})

    assert len(said) > 20_000
    samples = await scrape(api)
    event = json.loads(said)
    assert of(samples, "completion_tokens_total") == event["tokens_predicted"] == 7
    assert of(samples, "prompt_tokens_total") == event["tokens_evaluated"]


@ONE_LISTENER
@pytest.mark.parametrize(
    ("settings", "path", "body"),
    [
        ({"mode": "embedding", "pooling": "mean"}, "/v1/embeddings", {"input": ["some text"] * 60}),
        ({"mode": "rerank"}, "/v1/rerank", {"query": "which", "documents": ["a", "bc"]}),
    ],
    ids=["embeddings", "rerank"],
)
async def test_tokens_of_what_is_no_text(
    serve: Serve, settings: dict[str, str], path: str, body: dict[str, Any]
) -> None:
    api = await serve(ONE)
    (await api.ask("PUT", f"/api/models/{ONE}/settings", settings)).success()
    await started(api)

    told = [seen(await asked(api, path, body)) for _ in range(2)]

    samples = await scrape(api)
    assert of(samples, "prompt_tokens_total") == sum(prompt for prompt, _ in told) > 4
    assert of(samples, "completion_tokens_total") == 0
    assert outcomes(samples) == {"answered": 2}


@ONE_LISTENER
async def test_what_tells_nothing_counts_nothing(serve: Serve) -> None:
    api = await serve(ONE)
    await started(api)

    await asked(api, "/tokenize", {"content": '"usage":{"prompt_tokens":5}', "with_pieces": True})
    await asked(api, "/detokenize", {"tokens": [50, 51]})
    assert (await api.ask("GET", f"/api/proxy/{ONE}/health")).status == 200

    samples = await scrape(api)
    assert of(samples, "prompt_tokens_total") == of(samples, "completion_tokens_total") == 0
    assert outcomes(samples) == {"answered": 2}, "a look at its health asks it nothing"


@ONE_LISTENER
async def test_each_outcome(serve: Serve, models: Path, sample_models: SampleModels) -> None:
    # A toy would be through with it at once.
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    api = await serve()
    body = {"prompt": "a", "max_tokens": 6000, "stream": True, "ignore_eos": True, "temperature": 0}
    await api.ask("POST", "/v1/completions", {"model": ONE, **body})
    assert outcomes(await scrape(api)) == {"not_ready": 1}
    await started(api)
    assert (await api.ask("POST", "/v1/completions", {"model": ONE, "max_tokens": 4})).status == 400
    assert outcomes(await scrape(api)) == {"not_ready": 1, "refused": 1}
    # A path that its server is not started for is the client's mistake, whatever llama-server thinks of it.
    assert (await api.ask("POST", "/v1/embeddings", {"model": ONE, "input": "a"})).status == 501
    assert outcomes(await scrape(api)) == {"not_ready": 1, "refused": 2}

    async with api.session.post(f"{api.base}/v1/completions", json={"model": ONE, **body}) as answer:
        await answer.content.readany()
        assert of(await scrape(api), "requests_under_way") == 1
        answer.close()

    async def counted() -> bool:
        return outcomes(await scrape(api)).get("abandoned") == 1

    await until(counted, "one is abandoned", 5)
    async with asyncio.timeout(30), api.session.post(f"{api.base}/v1/completions", json={"model": ONE, **body}) as dies:
        await dies.content.readany()
        systemctl("kill", "--signal=KILL", f"magi-llama-{ONE}.service")
        with pytest.raises(aiohttp.ClientPayloadError):
            await dies.read()
    samples = await scrape(api)
    assert outcomes(samples) == {"not_ready": 1, "refused": 2, "abandoned": 1, "broken_off": 1}
    assert of(samples, "requests_under_way") == of(samples, "requests_waiting") == 0
    assert of(samples, "completion_tokens_total") == 0, "nobody was told how many"


@ONE_LISTENER
@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_who_waits(serve: Serve, tmp_path: Path, is_stream: bool) -> None:
    silent = script(tmp_path / "silent", "sleep 1000")
    api = await serve(ONE, gateway_queue="1", llama_server_path=str(silent))
    await on_demand(api)
    body = {"model": ONE, "prompt": "a", "stream": is_stream}
    waiting = asyncio.create_task(api.ask("POST", "/v1/completions", body))

    async def waits() -> bool:
        return figure(await scrape(api), "magi_gateway_requests_waiting", model=ONE) == 1

    async def known() -> bool:
        return f'magi_gateway_requests_waiting{{model="{ONE}"}}' in await text(api)

    await until(known, "it is told of", 10)
    await until(waits, "it waits", 10)
    assert (await api.ask("POST", "/v1/completions", body)).status == 429
    assert outcomes(await scrape(api)) == {"queue_full": 1}
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    async def left() -> bool:
        return outcomes(await scrape(api)) == {"queue_full": 1, "abandoned": 1}

    await until(left, "it has left", 5)
    samples = await scrape(api)
    assert of(samples, "requests_waiting") == of(samples, "requests_under_way") == 0
    assert of(samples, "wait_seconds_sum") > 0


@ONE_LISTENER
async def test_the_wait_for_a_model_is_in_the_one_time_and_not_in_the_other(serve: Serve) -> None:
    api = await serve(ONE)
    await on_demand(api)

    said = await asked(api, "/v1/completions", {"prompt": "a", "max_tokens": 4, "stream": True})

    samples = await scrape(api)
    waited, all_of_it = of(samples, "wait_seconds_sum"), of(samples, "first_token_seconds_sum")
    assert waited > 0.05
    assert all_of_it == pytest.approx(waited + of(samples, "server_first_token_seconds_sum"), abs=0.02)
    assert of(samples, "completion_tokens_total") == seen(said)[1] == 4


@ONE_LISTENER
async def test_a_model_that_left_is_told_of_no_more(serve: Serve, models: Path) -> None:
    api = await serve(ONE)
    await started(api)
    await asked(api, "/tokenize", {"content": "a"})
    await api.ask("POST", "/v1/completions", {"model": "nobody-knows-it", "prompt": "a"})
    (await api.ask("POST", f"/api/models/servers/{ONE}/stop?wait=60")).success()
    assert of(await scrape(api), "wait_seconds_count") == 1
    assert "nobody-knows-it" not in await text(api)

    (models / f"{ONE}.gguf").unlink()
    (await api.ask("POST", "/api/models/rescan")).success()
    if ONE in api.services.registry.models:
        (await api.ask("DELETE", f"/api/models/{ONE}")).success()

    assert f'model="{ONE}"' not in await text(api)


@ONE_LISTENER
async def test_a_request_is_found_in_the_servers_log(
    serve: Serve, systemd_user: SystemdUser, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "magi_agent.gateway.tallies")
    api = await serve(ONE)
    await started(api)
    secret = "xyzzyplugh"
    body = {"model": ONE, "messages": [{"role": "user", "content": secret}], "max_tokens": 7, "stream": True}

    reply = await api.ask("POST", "/v1/chat/completions", body, headers={"X-Request-ID": "find-me"})

    (record,) = [record for record in caplog.records if record.name == "magi_agent.gateway.tallies"]
    fields: dict[str, Any] = vars(record)
    answer = events(reply.content)
    assert (fields["magi_request_id"], fields["magi_model"], fields["magi_outcome"]) == ("find-me", ONE, "answered")
    assert (fields["magi_status"], fields["magi_completion_tokens"]) == (200, 7)
    assert fields["magi_answer_id"] == answer[0]["id"]
    assert (fields["magi_prompt_tokens"], 7) == seen(reply.content)
    assert secret not in record.getMessage()
    # What the server writes of its task is what the record says, to the hundredth of a millisecond.
    times = re.findall(r"eval time ([\d.]+) ms / (\d+) tokens", record.getMessage())
    assert len(times) == 2

    async def logged() -> bool:
        entries = (await api.get(f"/api/models/servers/{ONE}/logs?lines=200"))["entries"]
        timed = [each["message"] for each in entries if "eval time" in each["message"]]
        pairs = [re.findall(r"= +([\d.]+) ms / +(\d+) tokens", line) for line in timed]
        return all([time] in pairs for time in times)

    await until(logged, "the server's log has both times", 10)
    assert "find-me" not in json.dumps(await api.get(f"/api/models/servers/{ONE}/logs?lines=1000"))


@ONE_LISTENER
async def test_trouble_is_in_the_journal_at_its_usual_level(
    serve: Serve, models: Path, sample_models: SampleModels, caplog: pytest.LogCaptureFixture
) -> None:
    # A toy would be through with it at once.
    shutil.copyfile(sample_models.smollm2, models / f"{ONE}.gguf")
    caplog.set_level(logging.INFO, "magi_agent.gateway.tallies")
    api = await serve()
    await started(api)
    await asked(api, "/tokenize", {"content": "a"})
    assert (await api.ask("POST", "/v1/embeddings", {"model": ONE, "input": "a"})).status == 501

    body = {"model": ONE, "prompt": "a", "max_tokens": 6000, "ignore_eos": True}
    dies = asyncio.create_task(api.ask("POST", "/v1/completions", body))

    async def under_way() -> bool:
        return of(await scrape(api), "requests_under_way") == 1

    await until(under_way, "it is asked", 10)
    systemctl("kill", "--signal=KILL", f"magi-llama-{ONE}.service")
    assert (await dies).status == 502

    assert outcomes(await scrape(api)) == {"answered": 1, "refused": 1, "failed": 1}
    (record,) = [record for record in caplog.records if record.name == "magi_agent.gateway.tallies"]
    assert record.getMessage().startswith(f"request to {ONE} failed: ")
    assert vars(record)["magi_status"] is None
