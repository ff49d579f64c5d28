"""What the benchmarks stand on: that they are found, compare rightly and count rightly. Their times are not judged."""

import asyncio
import dataclasses
from pathlib import Path

import gguf
import numpy
import pytest
from aiohttp import web

from magi_agent.api.schemas import ModelAnswer, RegistryAnswer
from magi_agent.discovery.scanner import Scanner
from magi_agent.gguf.reading import read_facts
from magi_agent.vocabulary import ModelStatus
from tests.bench import (
    bench_agent,
    bench_discovery,
    bench_events,
    bench_gateway,
    bench_idle,
    bench_watching,
    fastapi_registry,
    run,
)
from tests.bench.asking import Asker, Said, question, unchunked
from tests.bench.bench_header import differences
from tests.bench.header_reading import read_by_agent, read_by_reference
from tests.bench.launches import Launch
from tests.bench.load import WrongAnswer, ask
from tests.bench.many_models import MAX_MODELS, write_models
from tests.bench.router import has_router, presets
from tests.bench.same_answers import differing, told


def test_the_peer_of_the_registry_answers_with_the_same_fields():
    """Each in its place, so that both say the same bytes."""
    assert [*fastapi_registry.Model.model_fields] == [*ModelAnswer.model_fields]
    assert [*fastapi_registry.Registry.model_fields] == [*RegistryAnswer.model_fields]


def test_every_benchmark_is_found_by_its_name():
    names = [
        "agent",
        "discovery",
        "events",
        "gateway",
        "header",
        "idle",
        "memory",
        "metrics",
        "registry",
        "start",
        "watching",
    ]
    assert [path.stem for path in run.find([])] == [f"bench_{name}" for name in names]
    assert [path.stem for path in run.find(["start"])] == ["bench_start"]
    with pytest.raises(SystemExit, match="no such benchmark: nothing"):
        run.find(["nothing"])


@pytest.mark.parametrize(
    "name",
    ["agent", "discovery", "events", "gateway", "header", "idle", "memory", "metrics", "registry", "start", "watching"],
)
def test_a_benchmark_can_be_loaded(name):
    (path,) = run.find([name])
    benchmark = run.load(path)
    assert benchmark.name == name
    assert callable(benchmark.measure)
    assert callable(benchmark.print_table)


def write_mixture(path: Path) -> None:
    """A small file with a value behind as many facts as the reference writer can state."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_type("model")
    writer.add_name("Mixture")
    writer.add_basename("mix")
    writer.add_finetune("Thinking")
    writer.add_version("2507")
    writer.add_size_label("30B-A3B")
    writer.add_tags(["text-generation", "moe"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(40960)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_head_count([4, 8])
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_sliding_window(512)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_causal_attention(value=True)
    writer.add_chat_template("{% if tools %}{% endif %}{% if enable_thinking %}<think>{% endif %}")
    writer.add_token_list([f"token {number}" for number in range(100)])
    writer.add_tensor("token_embd.weight", numpy.ones((100, 32), dtype=numpy.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", numpy.ones((8, 4, 32), dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_both_readers_tell_the_same_facts(tmp_path, toy_model):
    write_mixture(tmp_path / "mixture.gguf")
    toy_model(tmp_path / "toy.gguf")
    for path in tmp_path.iterdir():
        ours, theirs = read_by_agent(str(path), 1), read_by_reference(str(path), 0)
        assert differences(ours["facts"], theirs["facts"]) == []
        assert len(ours["millisecondsAgain"]) == 1
    facts = read_facts(tmp_path / "mixture.gguf")
    assert facts.active_parameter_count == 100 * 32 + 8 * 4 * 32 // 4
    assert facts.quantization == "q4_k_m"


def test_facts_that_differ_are_named(tmp_path, toy_model):
    facts = dataclasses.asdict(read_facts(toy_model(tmp_path / "toy.gguf")))
    other = {**facts, "context_length": 1, "tags": ("one",), "fingerprint": "not compared"}
    assert differences(facts, other) == ["context_length", "tags"]
    del other["name"]
    assert differences(facts, other) == ["context_length", "name", "tags"]


def test_as_many_models_are_written_as_were_asked_for_and_each_is_one(tmp_path):
    write_models(tmp_path, 30)
    models = Scanner([tmp_path]).scan().models
    assert len(models) == 30
    assert {model.status for model in models} == {ModelStatus.OK}
    assert MAX_MODELS >= 10_000
    assert len({model.filename for model in models}) == 30


def test_a_vocabulary_is_as_the_reference_writer_would_have_written_it(tmp_path):
    write_models(tmp_path / "ours", 2, vocabulary_size=300)
    for path in (tmp_path / "ours").rglob("*.gguf"):
        reader = gguf.GGUFReader(path)
        assert reader.fields["tokenizer.ggml.tokens"].contents()[299] == "\u258112b"
        assert reader.fields["tokenizer.ggml.scores"].contents()[299] == -299.0
        assert reader.fields["tokenizer.ggml.token_type"].contents() == [1] * 300
        assert len(reader.tensors) == 1
        assert differences(read_by_agent(str(path), 0)["facts"], read_by_reference(str(path), 0)["facts"]) == []
    models = Scanner([tmp_path / "ours"]).scan().models
    assert [model.status for model in models] == [ModelStatus.OK] * 2


def test_scanning_many_is_measured(capsys):
    figures = bench_discovery.measure(at_first=3, vocabulary=500, later=200, rounds=3)
    assert figures["targets"][0]["met"]
    assert figures["again"]["models"] == 200
    assert figures["again"]["lookUnchanged"]["median"] < figures["again"]["scanChanged"]["median"]
    bench_discovery.print_table(figures)
    assert "200 known models" in capsys.readouterr().out


def test_an_agent_at_rest_is_measured(systemd_user, capsys):
    figures = bench_agent.measure(models=5, starts=1, idle_seconds=0.2, idle_rounds=2)
    assert figures["models"] == 5
    assert figures["targets"][0]["met"]
    assert figures["floor"]["ready"]["median"] > 0
    assert figures["agent"]["settled"]["median"] >= figures["agent"]["ready"]["median"]
    assert 10 < figures["floor"]["megabytes"]["median"] < figures["agent"]["megabytes"]["median"] < 500
    assert figures["idle"]["percent"]["runs"] == 2
    assert figures["idle"]["megabytesScraped"] > figures["idle"]["megabytes"]
    bench_agent.print_table(figures)
    assert "5 known models" in capsys.readouterr().out


def test_an_agent_with_servers_that_nobody_asks_is_measured(systemd_user, capsys):
    figures = bench_idle.measure(servers=2, seconds=0.5, rounds=2, rest=0.0)
    assert figures["agentPercent"]["runs"] == 2
    assert figures["agentPercent"]["median"] > 0
    assert 10 < figures["agentMegabytes"] < 500
    bench_idle.print_table(figures)
    assert "2 toy servers ready" in capsys.readouterr().out


def test_events_are_measured(systemd_user, capsys):
    figures = bench_events.measure(listeners=5, changes=3, deaths=1, last_deaths=1)
    assert 0 < figures["toFirst"]["median"] <= figures["toLast"]["median"]
    assert figures["death"]["median"] < figures["lastDeath"]["median"]
    assert figures["deathInAnswers"]["median"] > 0
    assert figures["cpuPerChange"]["alone"] > 0
    bench_events.print_table(figures)
    assert "to the last of 5 listeners" in capsys.readouterr().out


def test_arriving_files_are_measured(systemd_user, capsys):
    figures = bench_watching.measure(models=3, arrivals=1, copy_gigabytes=1, copy_seconds=1.0)
    assert set(figures["visible"]) == {"renamed", "copied", "reserved"}
    assert all(spread["median"] > 0 for spread in figures["visible"].values())
    assert figures["copies"]["writes"] == 1000
    assert figures["copies"]["growing"]["bare"] > figures["copies"]["idle"]["bare"] > 0
    bench_watching.print_table(figures)
    assert "copy of 1 GB" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_the_gateway_is_measured_beside_its_peers(memory_to_itself, systemd_user, capsys):
    figures = bench_gateway.measure(first_bytes=20, tokenize=(1, 0.3), streams={2: (1, 4)}, starts=1, switches=1)
    assert figures["router"]
    assert figures["differing"] == []
    assert len(figures["first"]) == 3
    for first in figures["first"].values():
        assert set(first) == {"direct", "agent", "bare", "router", "added", "runs"}
        assert all(0 < first["direct"]["p50"] < first[side]["p50"] for side in ("agent", "bare", "router"))
    rates = figures["tokenize"]["perSecond"]
    assert rates["direct"]["median"] > rates["agent"]["median"] > 0
    assert figures["streams"]["2"]["share"]["agent"]["median"] > 0.1
    assert set(figures["cold"]) == {"direct", "agent", "router", "toldRouter"}
    assert set(figures["switch"]) == {"agent", "router"}
    assert 10 < figures["processes"]["agent"]["megabytes"] < 500
    bench_gateway.print_table(figures)
    assert "switch to first token" in capsys.readouterr().out
    without_router(figures)
    bench_gateway.print_table(figures)
    shown = capsys.readouterr().out
    assert "skipped" in shown
    assert "router's" not in shown


def without_router(figures):
    """Make of figures those of a llama-server that cannot be a router."""
    for key in ("cold", "switch", "processes"):
        del figures[key]["router"]
    for first in figures["first"].values():
        del first["router"], first["added"]["router"]
    del figures["cold"]["toldRouter"]
    for one in (figures["tokenize"], *figures["streams"].values()):
        for spreads in one.values():
            spreads.pop("router")
    figures["router"] = False
    figures["targets"] = bench_gateway.targets(figures)


def test_a_llama_server_that_cannot_be_a_router_is_known(tmp_path):
    old = tmp_path / "llama-server"
    old.write_text("#!/bin/sh\necho '--model FNAME   model path'\n")
    old.chmod(0o755)
    assert not has_router(old)


def test_a_router_is_told_the_settings_of_the_agents_servers():
    arguments = ["llama-server", "--host", "127.0.0.1", "--port", "1", "--alias", "m", "--metrics", "--threads", "-1"]
    launch = Launch(arguments, {"LLAMA_ARG_MODEL": "/m.gguf"})
    assert presets({"m": launch.settings()}) == "version = 1\n\n[m]\nmodel = /m.gguf\nmetrics = true\nthreads = -1\n"


def said(body, status=200, content_type=b"text/event-stream"):
    return Said(status, content_type, body, 0.1, 0.2)


def test_answers_are_the_same_but_for_their_ids_and_times():
    one = b'data: {"id":"a","created":1,"content":" x","timings":{"prompt_ms":1.5,"predicted_per_second":9e2}}\n\n'
    other = one.replace(b'"a"', b'"b"').replace(b":1,", b":2,").replace(b"1.5", b"20.25").replace(b"9e2", b"7")
    assert told(said(one)) == told(said(other))
    for changed in (one.replace(b" x", b"x"), one[:-1], one + b"\n", one.replace(b"created", b"Created")):
        assert told(said(one)) != told(said(changed))
    assert told(said(one)) != told(said(one, status=201))
    assert told(said(one)) != told(said(one, content_type=b"application/json"))


@pytest.fixture
async def saying():
    """Servers on loopback, each of which answers everything with one body, streamed."""
    runners = []

    async def serve(body, *, whole=True, kind="text/event-stream"):
        async def answer(request):
            response = web.StreamResponse(headers={"Content-Type": kind})
            await response.prepare(request)
            await response.write(b": wait\n\n")
            await asyncio.sleep(0.05)
            await response.write(body)
            if not whole:
                request.transport.abort()
            return response

        app = web.Application()
        app.router.add_post("/{path:.*}", answer)
        runners.append(web.AppRunner(app, access_log=None))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        return runners[-1].addresses[0][1]

    yield serve
    for runner in runners:
        await runner.cleanup()


async def test_a_way_that_changes_one_byte_is_named(saying):
    ports = {side: await saying(body) for side, body in {"direct": b"ab", "same": b"ab", "agent": b"aB"}.items()}
    assert await differing(ports, "m") == [f"{what}: agent" for what in ("tokens", "talk", "streamed", "refused")]


async def test_the_first_event_is_what_counts_and_not_a_comment(saying):
    asker = Asker(await saying(b"data: 1\n\n"))
    for _ in range(2):
        answer = await asker.must(question("/v1/completions", {}))
        assert answer.body == b": wait\n\ndata: 1\n\n"
        assert 0.05 <= answer.first <= answer.whole < 5
    asker.close()


async def test_without_events_the_first_byte_of_chunks_is_what_counts(saying):
    asker = Asker(await saying(b"data: 1\n\n", kind="application/json"))
    answer = await asker.must(question("/tokenize", {}))
    asker.close()
    assert 0 < answer.first < 0.05 <= answer.whole


async def test_half_an_answer_is_none(saying):
    with pytest.raises(WrongAnswer, match="broke off"):
        await Asker(await saying(b"data: 1\n\n", whole=False)).ask(question("/v1/completions", {}))


def test_a_stream_has_to_have_all_its_tokens_and_an_end():
    whole = b'data: {"usage":{"completion_tokens":4,"prompt_tokens":1}}\n\ndata: [DONE]\n\n'
    bench_gateway.check_whole(said(whole), 4)
    for body, tokens in ((whole, 5), (whole.replace(b"data: [DONE]\n\n", b""), 4)):
        with pytest.raises(WrongAnswer):
            bench_gateway.check_whole(said(body), tokens)


@pytest.mark.parametrize("body", [b"2\r\na\r\n0\r\n\r\n", b"1\r\na\r\n0\r\n\r\n1", b"1\r\na\r\n"])
def test_chunks_that_are_not_whole_are_refused(body):
    assert unchunked(b"1\r\na\r\n2;x\r\nbc\r\n0\r\n\r\n") == b"abc"
    with pytest.raises(ValueError, match=r"chunk|found|literal"):
        unchunked(body)


@pytest.fixture
async def listening(tmp_path):
    """A server on a unix socket that answers with a body larger than any one read."""

    async def body(_request):
        await asyncio.sleep(0.01)
        return web.Response(body=b"x" * 3_000_000)

    async def chunks(request):
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"x")
        return response

    app = web.Application()
    app.router.add_get("/body", body)
    app.router.add_get("/chunks", chunks)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "socket")).start()
    yield str(tmp_path / "socket")
    await runner.cleanup()


async def test_the_load_counts_whole_answers(listening):
    result = await ask(listening, "/body", connections=3, seconds=0.5)
    assert result["bytes"] == 3_000_000
    assert result["requests"] == result["perSecond"] * 0.5
    # Each answer takes 10 ms and more, on three connections.
    assert 2 <= result["requests"] <= 3 * 50
    assert 10 <= result["p50"] <= result["p99"]


@pytest.mark.parametrize("path", ["/missing", "/chunks"])
async def test_the_load_takes_nothing_else_for_an_answer(listening, path):
    with pytest.raises(WrongAnswer, match="not 200 with a Content-Length"):
        await ask(listening, path, connections=2, seconds=0.5)
