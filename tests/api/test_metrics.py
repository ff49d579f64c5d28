"""GET /metrics, on real units with a real llama-server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import locations
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from magi_agent.metrics import metrics as module
from magi_agent.metrics.forms import Form
from magi_agent.servers import record as record_module
from magi_agent.servers import self_reports as self_reports_module
from tests.api.client import Api, until
from tests.api.conftest import Serve
from tests.metrics.monitoring import run_promtool
from tests.metrics.test_monitoring import names_in, queries, rules

ONE_LISTENER = pytest.mark.parametrize("listener", ["unix"], indirect=True)
WAIT = "wait=60"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scrape looks and asks anew."""
    monkeypatch.setattr(module, "_FRESH", 0.0)
    monkeypatch.setattr(self_reports_module, "_FRESH", 0.0)


async def start(api: Api, model_id: str) -> None:
    assert (await api.ask("POST", f"/api/models/servers/{model_id}/start?{WAIT}")).success()["server"]["isReady"]


async def text(api: Api, accept: str = "*/*") -> str:
    reply = await api.ask("GET", "/metrics", headers={"Accept": accept})
    assert reply.status == 200, reply.content[:2000]
    return reply.content.decode()


async def scrape(api: Api) -> Samples:
    """Every sample, by its name and labels, as a strict reader of OpenMetrics has it."""
    found: Samples = {}
    for family in read_openmetrics(await text(api)):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = float(sample.value)
    return found


def figure(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def labelled(samples: Samples, name: str) -> list[Mapping[str, str]]:
    return [dict(labels) for found, labels in samples if found == name]


async def test_a_server_that_runs_is_told_with_its_unit_and_its_own_metrics(serve: Serve, always_fresh: None) -> None:
    api = await serve("api-one", "api-two")
    before = await scrape(api)
    assert labelled(before, "magi_server_ready") == []
    await start(api, "api-one")
    port = (await api.get("/api/models/servers/api-one"))["port"]
    body = {"prompt": "hello", "n_predict": 5}
    url = f"http://127.0.0.1:{port}/completion"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as done:
        assert done.status == 200

    samples = await scrape(api)

    one = {"model": "api-one"}
    assert labelled(samples, "magi_server_ready") == [one]
    assert figure(samples, "magi_server_ready", **one) == 1
    assert figure(samples, "magi_server_wanted", **one) == 1
    states = {
        labels["state"]: figure(samples, "magi_server_state", **labels)
        for labels in labelled(samples, "magi_server_state")
    }
    assert [state for state, value in states.items() if value] == ["ready"]
    assert len(states) == 9
    assert figure(samples, "magi_server_memory_bytes", **one) > 1 << 20
    assert figure(samples, "magi_server_cpu_seconds_total", **one) > 0
    assert figure(samples, "magi_server_restarts_total", **one) == 0
    assert figure(samples, "magi_server_scrape_success", **one) == 1
    assert figure(samples, "llamacpp:tokens_predicted_total", **one) == 5
    assert figure(samples, "llamacpp:requests_processing", **one) == 0
    assert figure(samples, "llamacpp:n_tokens_max", **one) > 0, "a counter that is none keeps its name"
    assert figure(samples, "magi_server_failures_total", result="oom-kill", **one) == 0
    (about,) = labelled(samples, "magi_server_info")
    assert about["unit"] == "magi-llama-api-one.service"
    assert (about["start_policy"], about["tier"]) == ("alwaysOn", "balanced")


@ONE_LISTENER
@pytest.mark.parametrize("access", ["socket", "key"])
async def test_a_server_that_only_the_agent_may_use_tells_the_agent(
    serve: Serve, always_fresh: None, access: str
) -> None:
    api = await serve("api-one", server_access=access)
    await start(api, "api-one")

    samples = await scrape(api)

    assert figure(samples, "magi_server_scrape_success", model="api-one") == 1
    assert figure(samples, "llamacpp:requests_processing", model="api-one") == 0


@ONE_LISTENER
async def test_the_agent_and_its_host(serve: Serve, always_fresh: None) -> None:
    api = await serve("api-one", "api-two")
    await api.get("/api/models/servers")
    (await api.ask("GET", "/api/models/nobody")).failure(404, "ModelNotFound")
    (await api.ask("GET", "/elsewhere/%20%22")).failure(404, "NotFound")
    (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})).success()

    samples = await scrape(api)

    requests = {
        (labels["method"], labels["route"], labels["status"]): figure(samples, "magi_http_requests_total", **labels)
        for labels in labelled(samples, "magi_http_requests_total")
    }
    assert requests == {
        ("GET", "/api/models/servers", "200"): 1,
        ("GET", "/api/models/{modelId}", "404"): 1,
        ("GET", "none", "404"): 1,
        ("PUT", "/api/models/{modelId}/enabled", "200"): 1,
    }
    assert figure(samples, "magi_http_request_duration_seconds_count", method="GET", route="none") == 1
    assert figure(samples, "magi_http_requests_under_way") == 1
    assert figure(samples, "magi_http_connections") >= 1
    assert figure(samples, "magi_models", status="ok", enabled="true") == 1
    assert figure(samples, "magi_models", status="ok", enabled="false") == 1
    assert figure(samples, "magi_models", status="missing", enabled="true") == 0
    assert figure(samples, "magi_agent_systemd_connected") == figure(samples, "magi_agent_settled") == 1
    assert figure(samples, "magi_host_memory_bytes") > figure(samples, "magi_host_memory_available_bytes") > 0
    room, there = figure(samples, "magi_host_memory_room_bytes"), (await api.get("/api/host"))["memory"]["roomBytes"]
    assert room == pytest.approx(there, rel=0.2)
    assert figure(samples, "magi_scans_total", outcome="succeeded") >= 1
    assert figure(samples, "magi_scan_duration_seconds") > 0
    assert figure(samples, "process_resident_memory_bytes") > 10 << 20
    assert figure(samples, "process_cpu_seconds_total") > 0
    assert figure(samples, "magi_agent_tasks") > 5
    (about,) = labelled(samples, "magi_agent_info")
    assert about["systemd_scope"] == "user"


@ONE_LISTENER
async def test_problems_are_as_many_as_health_names(serve: Serve, always_fresh: None, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir(exist_ok=True)
    (tmp_path / "profiles" / "broken.yaml").write_text("name: [")
    api = await serve("api-one", model_scan_path=f"{tmp_path / 'models'}:{tmp_path / 'gone'}")
    problems = (await api.ask("GET", "/health/ready")).body["problems"]
    assert [any(word in each for each in problems) for word in ("broken.yaml", str(tmp_path / "gone"))] == [True, True]
    assert figure(await scrape(api), "magi_agent_problems") == len(problems)
    (tmp_path / "profiles" / "broken.yaml").unlink()
    assert figure(await scrape(api), "magi_agent_problems") == len(problems) - 1


@ONE_LISTENER
async def test_a_model_that_should_be_up_and_fails(
    serve: Serve, always_fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "_FIRST_COOLDOWN", 300.0)
    api = await serve("api-one", llama_server_path="/bin/false")
    assert figure(await scrape(api), "magi_agent_ready") == 1
    (await api.ask("POST", "/api/models/servers/api-one/start")).success(202)
    await api.until_state("api-one", "cooldown")

    async def counted() -> bool:
        return figure(await scrape(api), "magi_server_failures_total", model="api-one", result="exit-code") == 1

    await until(counted, "the failure is counted")
    samples = await scrape(api)
    assert figure(samples, "magi_server_state", model="api-one", state="cooldown") == 1
    assert figure(samples, "magi_server_ready", model="api-one") == 0
    assert figure(samples, "magi_server_wanted", model="api-one") == 1
    assert figure(samples, "magi_agent_ready") == 0
    assert labelled(samples, "magi_server_scrape_success") == [], "who is not ready is not asked"


@ONE_LISTENER
async def test_a_server_that_stands_still_costs_its_two_seconds_and_nothing_of_the_others(
    serve: Serve, always_fresh: None, caplog: pytest.LogCaptureFixture
) -> None:
    api = await serve("api-one", "api-two")
    await asyncio.gather(start(api, "api-one"), start(api, "api-two"))
    pid = (await api.get("/api/models/servers/api-one"))["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        loop = asyncio.get_running_loop()
        began = loop.time()
        samples = await scrape(api)
        assert 1.9 < loop.time() - began < 5
        await scrape(api)
    finally:
        os.kill(pid, signal.SIGCONT)

    assert figure(samples, "magi_server_scrape_success", model="api-one") == 0
    assert figure(samples, "magi_server_scrape_success", model="api-two") == 1
    assert labelled(samples, "llamacpp:requests_processing") == [{"model": "api-two"}]
    assert caplog.text.count("the metrics of api-one cannot be had: it did not answer within 2 seconds") == 1
    assert figure(await scrape(api), "magi_server_scrape_success", model="api-one") == 1


@ONE_LISTENER
async def test_a_server_that_is_not_ready_is_not_asked(serve: Serve, always_fresh: None, tmp_path: Path) -> None:
    program = tmp_path / "models" / "sleeping-server"
    program.write_text('#!/bin/sh\ncase "$*" in *--port*) exec sleep 1000 ;; esac\n')
    program.chmod(0o755)
    api = await serve("api-one", llama_server_path=str(program))
    (await api.ask("POST", "/api/models/servers/api-one/start")).success(202)
    await api.until_state("api-one", "loading")

    samples = await scrape(api)

    assert figure(samples, "magi_server_state", model="api-one", state="loading") == 1
    assert figure(samples, "magi_server_start_time_seconds", model="api-one") > 1e9
    assert labelled(samples, "magi_server_scrape_success") == []


@ONE_LISTENER
async def test_several_scrapers_cost_one_look(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await serve("api-one")
    looks = 0
    take = module.Metrics._take

    async def counted(self: module.Metrics) -> module._Look:
        nonlocal looks
        looks += 1
        return await take(self)

    monkeypatch.setattr(module.Metrics, "_take", counted)
    texts = await asyncio.gather(*(text(api) for _ in range(20)), text(api, "text/plain"))

    assert await text(api) == texts[0]
    assert looks == 1
    assert len(set(texts[:20])) == 1
    monkeypatch.setattr(module, "_FRESH", 0.0)
    await text(api)
    assert looks == 2


@ONE_LISTENER
async def test_who_leaves_does_not_take_the_look_away_from_the_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = await serve("api-one")
    go = asyncio.Event()
    take = module.Metrics._take

    async def slow(self: module.Metrics) -> module._Look:
        await go.wait()
        return await take(self)

    monkeypatch.setattr(module.Metrics, "_take", slow)
    first = asyncio.create_task(api.services.metrics.text(Form.OPEN_METRICS))
    second = asyncio.create_task(api.services.metrics.text(Form.OPEN_METRICS))
    await asyncio.sleep(0.05)
    first.cancel()
    go.set()
    assert (await second).endswith(b"# EOF\n")


@ONE_LISTENER
async def test_both_forms(serve: Serve, always_fresh: None) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    newest = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    for accept, media_type, end in (
        ("*/*", "application/openmetrics-text", "# EOF\n"),
        (newest, "application/openmetrics-text", "# EOF\n"),
        ("text/plain", "text/plain", ""),
    ):
        reply = await api.ask("GET", "/metrics", headers={"Accept": accept})
        assert reply.headers["Content-Type"].startswith(f"{media_type}; version="), accept
        assert reply.content.decode().endswith(f"\n{end}"), accept
        assert reply.headers["Cache-Control"] == "no-store"
        assert ("# TYPE magi_http_requests_total counter" in reply.content.decode()) == (media_type == "text/plain")


@ONE_LISTENER
async def test_rules_and_dashboard_ask_for_what_a_real_server_tells(serve: Serve, always_fresh: None) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    there = {name for name, _ in await scrape(api)}
    asked = set().union(*(names_in(rule["expr"]) for rule in rules()), *map(names_in, queries()))

    assert {name for name in asked if name.startswith("llamacpp:")} <= there
    assert "llamacpp:tokens_predicted_total" in asked


@ONE_LISTENER
async def test_promtool_has_nothing_against_it(serve: Serve, always_fresh: None) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    await api.get("/api/models/servers")
    plain = await text(api, "text/plain")
    assert "llamacpp:tokens_predicted_total" in plain

    status, said = await asyncio.to_thread(run_promtool, "check", "metrics", given=plain.encode())

    # llama-server's names are llama.cpp's.
    ours = [line for line in said.splitlines() if not line.startswith("llamacpp:")]
    assert ours == []
    assert status in (0, 3), "3 is that it found something to say"


@ONE_LISTENER
async def test_everything_that_it_tells_is_in_the_documentation_and_the_other_way_round(
    serve: Serve, always_fresh: None
) -> None:
    api = await serve("api-one")
    await start(api, "api-one")
    told = {family.name for family in read_openmetrics(await text(api))}

    said = set(re.findall(r"^\| `([\w:]+)` \|", (locations.CHECKOUT / "docs" / "metrics.md").read_text(), re.MULTILINE))

    assert {name for name in told if name.startswith("magi_")} == {
        name.removesuffix("_total").removesuffix("_info") for name in said if name.startswith("magi_")
    }


@ONE_LISTENER
async def test_before_the_registry_is_loaded(serve: Serve) -> None:
    api = await serve(loaded=False)

    samples = await scrape(api)

    assert figure(samples, "magi_agent_ready") == 0
    assert labelled(samples, "magi_models") == []
    assert labelled(samples, "magi_host_memory_room_bytes") == [], "systemd knows the limits, and is not reached"


@pytest.mark.parametrize("listener", ["tcp"], indirect=True)
async def test_it_is_read_by_who_may_read(serve: Serve) -> None:
    api = await serve(tcp_access="none")

    (await api.ask("GET", "/metrics")).failure(401, "Unauthorized")
