"""A real Prometheus with the shipped files: it scrapes an agent over TCP with a token, and evaluates the alerts."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from magi_agent.tokens import Token, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.metrics.monitoring import prometheus, with_the_models
from tests.metrics.test_monitoring import PROMETHEUS

MODEL, OTHER = "prom-toy", "prom-other"
TOKEN = new_secret()
OF_EACH_SCRAPE = {"duration_seconds", "samples_scraped", "samples_post_metric_relabeling", "series_added"}


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    for model in (MODEL, OTHER):
        toy_model(tmp_path / "models" / f"{model}.gguf")
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(2), llama_server)
    agent.settings |= {"MAGI_TCP": f"127.0.0.1:{unused_ports()[0]}", "MAGI_TCP_ACCESS": "none"}
    (tmp_path / "tokens").write_text(f"{line_of(Token('prometheus', TokenScope.READ, digest_of(TOKEN)))}\n")
    with ended(agent, "magi-llama-prom-*.service"):
        agent.start()
        wait_until(lambda: not agent.ask("GET", "/health/ready").body["scanning"], "the first scan")
        yield agent


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    url: str
    token: Path

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer of its API; ``None`` while it does not answer."""
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        return None

    def value(self, query: str) -> float | None:
        """The one value of a query; ``None`` where it has none, or several."""
        data = self.ask("query", query=query)
        results = data["result"] if data else []
        return float(results[0]["value"][1]) if len(results) == 1 else None

    def targets(self, job: str) -> dict[str, dict[str, Any]]:
        """The targets of a job, by the model that each is for; the agent's own by nothing."""
        data = self.ask("targets", state="active")
        found = data["activeTargets"] if data else []
        return {each["labels"].get("model", ""): each for each in found if each["labels"]["job"] == job}

    def alerts(self) -> set[str]:
        """Those that hold now, be it for less time than they have to."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"]}

    def last_error(self) -> str:
        """Why the last scrape of the agent failed; empty where it did not."""
        return str(self.targets("magi-agent")[""]["lastError"])


@pytest.fixture
def with_models() -> bool:
    """Whether models are scraped by themselves too."""
    return False


@pytest.fixture
def scraping(agent: AgentProcess, tmp_path: Path, unused_ports: PortRanges, with_models: bool) -> Iterator[Prometheus]:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    for path in PROMETHEUS.iterdir():
        shutil.copy(path, folder)
    token = folder / "token"
    token.write_text(TOKEN)
    configuration = folder / "magi-agent.yml"
    text = configuration.read_text()
    if with_models:
        text = with_the_models(text)
    for old, new in {
        "- 127.0.0.1:8000": f"- {agent.settings['MAGI_TCP']}",
        "http://127.0.0.1:8000/": f"http://{agent.settings['MAGI_TCP']}/",
        "scrape_interval: 15s": "scrape_interval: 1s",
        "scrape_timeout: 10s": "scrape_timeout: 1s",
        "evaluation_interval: 15s": "evaluation_interval: 1s",
        "refresh_interval: 30s": "refresh_interval: 1s",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    configuration.write_text(text.replace("/etc/prometheus/magi-agent.token", str(token)))
    port = unused_ports()[0]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                prometheus(),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
        try:
            yield Prometheus(f"http://127.0.0.1:{port}", token)
        finally:
            process.terminate()
            process.wait(30)


def test_it_scrapes_with_a_token_and_knows_the_alerts(agent: AgentProcess, scraping: Prometheus) -> None:
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")

    up = f'magi_server_ready{{model="{MODEL}"}}'
    wait_until(lambda: scraping.value(up) == 1, "the model is up to Prometheus", 60)

    # On a busy machine a scrape may take longer than the second it has here.
    wait_until(lambda: scraping.value('up{job="magi-agent"}') == 1, "a scrape in time")
    processing = f'llamacpp:requests_processing{{model="{MODEL}"}}'
    wait_until(lambda: scraping.value(processing) == 0, "a scrape with the server's own figures")
    kinds = scraping.ask("metadata", metric="magi_http_requests_total")
    kinds = kinds or scraping.ask("metadata", metric="magi_http_requests")
    assert [kind["type"] for kind in next(iter(kinds.values()))] == ["counter"]
    wait_until(lambda: scraping.ask("rules")["groups"][0]["rules"][0]["health"] == "ok", "the rules are evaluated")
    groups = scraping.ask("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    # While the model was loading, it was missing; that something held the loop up is the machine's, which is busy.
    wait_until(lambda: scraping.alerts() <= {"MagiAgentStalls"}, f"no alert is left of {scraping.alerts()}", 60)

    # One that holds no more.
    scraping.token.write_text(new_secret())
    wait_until(lambda: "401" in scraping.last_error(), "the agent refuses it")
    assert scraping.value('up{job="magi-agent"}') == 0


@pytest.mark.parametrize("with_models", [True])
def test_it_finds_each_ready_model_and_scrapes_it_by_itself(agent: AgentProcess, scraping: Prometheus) -> None:
    def up() -> set[str]:
        return {model for model, target in scraping.targets("magi-models").items() if target["health"] == "up"}

    for model in (MODEL, OTHER):
        agent.must("POST", f"/api/models/servers/{model}/start?wait=60")

    wait_until(lambda: up() == {MODEL, OTHER}, "both models are up to Prometheus", 60)

    target = scraping.targets("magi-models")[MODEL]
    where = agent.settings["MAGI_TCP"]
    assert target["scrapeUrl"] == f"http://{where}/metrics/models/{MODEL}"
    assert target["labels"] == {"job": "magi-models", "instance": where, "model": MODEL, "tier": "balanced"}
    known = {"__meta_magi_family", "__meta_magi_quantization", "__meta_magi_start_policy", "__meta_magi_tier"}
    assert known <= set(target["discoveredLabels"])
    wait_until(lambda: scraping.value("magi_agent_ready") == 1, "the agent is scraped as well")
    processing = f'llamacpp:requests_processing{{model="{MODEL}"}}'
    wait_until(lambda: scraping.value(processing) == 0, "its server's own figures, once")
    assert scraping.value(processing.replace("{", '{job="magi-agent", tier="balanced", ')) == 0
    assert (scraping.value(f'count({{__name__=~"llamacpp:.+", model="{MODEL}"}})') or 0) > 10
    # Kept away, none of them would be here: those are Prometheus's own of each target.
    others = 'count by (__name__) ({__name__!~"llamacpp:.+", job="magi-models"})'
    names = {each["metric"]["__name__"] for each in scraping.ask("query", query=others)["result"]}
    assert names <= {"up", *(f"scrape_{word}" for word in OF_EACH_SCRAPE)}

    agent.must("POST", f"/api/models/servers/{MODEL}/stop?wait=60")

    wait_until(lambda: set(scraping.targets("magi-models")) == {OTHER}, "the stopped one is no target any more")
    assert up() == {OTHER}

    # While no agent answers, Prometheus keeps what it was told.
    agent.stop()
    wait_until(lambda: not up(), "a scrape without the agent fails")
    assert set(scraping.targets("magi-models")) == {OTHER}
    agent.start()
    wait_until(lambda: up() == {OTHER}, "the model is up again", 60)
