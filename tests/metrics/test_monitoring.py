"""What ships for Prometheus and Grafana: read by the real promtool, and told nothing that /metrics does not have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import locations
import pytest
import yaml
from prometheus_client.core import Metric

from magi_agent.metrics.families import families
from tests.metrics.monitoring import run_promtool, with_the_models
from tests.metrics.pictures import snapshot

PROMETHEUS = locations.CHECKOUT / "packaging" / "prometheus"
RULES = PROMETHEUS / "magi-agent.rules.yml"
DASHBOARD = locations.CHECKOUT / "packaging" / "grafana" / "magi-agent.json"
OF_PROMETHEUS = {"up"}
WHERE = 'job="magi-agent", instance="one:8000"'
MODEL = f'{WHERE}, model="toy"'


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel.get("targets", ()))


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for: words that are neither labels nor functions nor within quotes."""
    text = re.sub(r"\"[^\"]*\"", "", expression)
    text = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", text)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", text)
    words = re.findall(r"(?<![\w:.$])([a-zA-Z_][\w:]*)(?!\s*\()(?![\w:])", text)
    return set(words) - {"and", "or", "unless", "on", "by"}


def told(family: Metric) -> set[str]:
    """The samples that a family has, or would have."""
    ends = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_sum", "_count"],
            "summary": ["_sum", "_count"]}  # fmt: skip
    return {f"{family.name}{end}" for end in ends.get(family.type, [""])}


def test_rules_and_dashboard_ask_for_nothing_that_is_not_told() -> None:
    there = set().union(*map(told, families(snapshot())))
    asked = set().union(*(names_in(rule["expr"]) for rule in rules()), *map(names_in, queries()))

    assert asked - there - OF_PROMETHEUS == set()
    assert len(asked) > 30


def test_prometheus_takes_the_rules() -> None:
    status, said = run_promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)

    assert status == 0, said


@pytest.mark.parametrize("with_models", [False, True])
def test_prometheus_takes_the_configuration(tmp_path: Path, with_models: bool) -> None:
    for path in PROMETHEUS.iterdir():
        shutil.copy(path, tmp_path)
    configuration = tmp_path / "magi-agent.yml"
    token = tmp_path / "magi-agent.token"
    token.touch()
    text = configuration.read_text()
    if with_models:
        text = with_the_models(text)
    configuration.write_text(text.replace("/etc/prometheus/magi-agent.token", str(token)))

    status, said = run_promtool("check", "config", configuration)

    assert status == 0, said
    assert f"SUCCESS: {len(rules())} rules found" in said


def test_the_documentation_shows_the_job_that_ships() -> None:
    shipped = yaml.safe_load(with_the_models((PROMETHEUS / "magi-agent.yml").read_text()))["scrape_configs"]
    [shown] = re.findall(
        r"^```yaml\n(.*?)^```$", (locations.CHECKOUT / "docs" / "metrics.md").read_text(), re.MULTILINE | re.DOTALL
    )

    assert yaml.safe_load(shown)["scrape_configs"] == [
        {"job_name": "magi-agent", "metric_relabel_configs": shipped[0]["metric_relabel_configs"]},
        shipped[-1],
    ]


def test_prometheus_understands_every_query_of_the_dashboard(tmp_path: Path) -> None:
    asked = [query.replace("$__rate_interval", "5m") for query in queries()]
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(asked)]
    path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": recorded}]}))

    status, said = run_promtool("check", "rules", path)

    assert status == 0, said
    assert len(asked) > 30


def test_the_panels_of_the_dashboard_lie_beside_each_other() -> None:
    taken: dict[tuple[int, int], int] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"], panel["title"]
    assert len({panel["id"] for panel in panels()}) == len(panels())


@dataclass(frozen=True, slots=True)
class Case:
    """Series under which an alert fires after so many minutes, and others under which it does not."""

    fires: dict[str, str]
    quiet: dict[str, str]
    minutes: int = 10
    labels: dict[str, str] = field(default_factory=lambda: {"model": "toy"})


NO_LABELS: dict[str, str] = {}
HOUR = 59
CASES = {
    "MagiAgentDown": Case({f"up{{{WHERE}}}": "0x70"}, {f"up{{{WHERE}}}": "0 0 1x70"}, 3, NO_LABELS),
    "MagiAgentNotReady": Case(
        {f"magi_agent_ready{{{WHERE}}}": "0x70", f"magi_agent_draining{{{WHERE}}}": "0x70"},
        {f"magi_agent_ready{{{WHERE}}}": "0x70", f"magi_agent_draining{{{WHERE}}}": "1x70"},
        12,
        NO_LABELS,
    ),
    "MagiAgentWithoutSystemd": Case(
        {f"magi_agent_systemd_connected{{{WHERE}}}": "0x70"},
        {f"magi_agent_systemd_connected{{{WHERE}}}": "1x70"},
        3,
        NO_LABELS,
    ),
    "MagiAgentProblems": Case(
        {f"magi_agent_problems{{{WHERE}}}": "2x70"}, {f"magi_agent_problems{{{WHERE}}}": "0x70"}, 20, NO_LABELS
    ),
    "MagiAgentStalls": Case(
        {
            f"magi_agent_loop_lag_seconds_sum{{{WHERE}}}": "0+6x70",
            f"magi_agent_loop_lag_seconds_count{{{WHERE}}}": "0+30x70",
        },
        {
            f"magi_agent_loop_lag_seconds_sum{{{WHERE}}}": "0+0.1x70",
            f"magi_agent_loop_lag_seconds_count{{{WHERE}}}": "0+30x70",
        },
        30,
        NO_LABELS,
    ),
    "MagiApiFails": Case(
        {f'magi_http_requests_total{{{WHERE}, route="/", status="500"}}': "0 0 1x70"},
        {f'magi_http_requests_total{{{WHERE}, route="/", status="404"}}': "0+9x70"},
        10,
        {"route": "/"},
    ),
    "MagiScanFails": Case(
        {f'magi_scans_total{{{WHERE}, outcome="failed"}}': "0+1x70"},
        {f'magi_scans_total{{{WHERE}, outcome="failed"}}': "5x70"},
        30,
        {"outcome": "failed"},
    ),
    "MagiScanProblems": Case(
        {f"magi_scan_problems{{{WHERE}}}": "1x70"}, {f"magi_scan_problems{{{WHERE}}}": "0x70"}, 40, NO_LABELS
    ),
    "MagiEnabledModelUnusable": Case(
        {f'magi_models{{{WHERE}, status="missing", enabled="true"}}': "1x70"},
        {
            f'magi_models{{{WHERE}, status="missing", enabled="false"}}': "1x70",
            f'magi_models{{{WHERE}, status="ok", enabled="true"}}': "1x70",
        },
        40,
        {"status": "missing"},
    ),
    "MagiModelDown": Case(
        {f"magi_server_wanted{{{MODEL}}}": "1x70", f"magi_server_ready{{{MODEL}}}": "0x70"},
        {
            f"magi_server_wanted{{{MODEL}}}": "1x70",
            f"magi_server_ready{{{MODEL}}}": "0 0 0 1x70",
            f'magi_server_wanted{{{WHERE}, model="other"}}': "0x70",
            f'magi_server_ready{{{WHERE}, model="other"}}': "0x70",
        },
        7,
    ),
    "MagiModelCoolsDown": Case(
        {f'magi_server_state{{{MODEL}, state="cooldown"}}': "1x70"},
        {
            f'magi_server_state{{{MODEL}, state="cooldown"}}': "0x70",
            f'magi_server_state{{{MODEL}, state="ready"}}': "1x70",
        },
        3,
    ),
    "MagiModelFailsAgainAndAgain": Case(
        {f'magi_server_failures_total{{{MODEL}, result="exit-code"}}': "0+1x70"},
        {f'magi_server_failures_total{{{MODEL}, result="exit-code"}}': "0 1x70"},
        HOUR,
    ),
    "MagiModelRestarts": Case(
        {f"magi_server_restarts_total{{{MODEL}}}": "0 1 2 3x70"}, {f"magi_server_restarts_total{{{MODEL}}}": "3x70"}
    ),
    "MagiModelOutOfMemory": Case(
        {f'magi_server_failures_total{{{MODEL}, result="oom-kill"}}': "0 0 1x70"},
        {
            f'magi_server_failures_total{{{MODEL}, result="oom-kill"}}': "0x70",
            f'magi_server_failures_total{{{MODEL}, result="exit-code"}}': "0 0 1x70",
            f"magi_server_oom_kills_total{{{MODEL}}}": "0x70",
        },
    ),
    "MagiModelHung": Case(
        {f'magi_server_failures_total{{{MODEL}, result="hung"}}': "0 0 1x70"},
        {f'magi_server_failures_total{{{MODEL}, result="hung"}}': "1x70"},
    ),
    "MagiModelStuck": Case(
        {f'magi_server_state{{{MODEL}, state="stuck"}}': "1x70"},
        {f'magi_server_state{{{MODEL}, state="stuck"}}': "0x70"},
    ),
    "MagiModelDegraded": Case(
        {f'magi_server_state{{{MODEL}, state="degraded"}}': "1x70"},
        {f'magi_server_state{{{MODEL}, state="degraded"}}': "0x70"},
        15,
    ),
    "MagiModelNearItsMemoryLimit": Case(
        {
            f"magi_server_memory_anonymous_bytes{{{MODEL}}}": "50x70",
            f"magi_server_memory_mapped_bytes{{{MODEL}}}": "48x70",
            f"magi_server_memory_max_bytes{{{MODEL}}}": "100x70",
        },
        {
            f"magi_server_memory_anonymous_bytes{{{MODEL}}}": "50x70",
            f"magi_server_memory_mapped_bytes{{{MODEL}}}": "48x70",
        },
        15,
    ),
    "MagiServerScrapeFails": Case(
        {f"magi_server_scrape_success{{{MODEL}}}": "0x70"}, {f"magi_server_scrape_success{{{MODEL}}}": "1x70"}
    ),
    "MagiRequestsQueue": Case(
        {f"llamacpp:requests_deferred{{{MODEL}}}": "1x70"}, {f"llamacpp:requests_deferred{{{MODEL}}}": "1 0 1 0x70"}
    ),
    "MagiGatewayFails": Case(
        {f'magi_gateway_requests_total{{{MODEL}, outcome="broken_off"}}': "0+1x70"},
        {
            f'magi_gateway_requests_total{{{MODEL}, outcome="failed"}}': "0 1x70",
            f'magi_gateway_requests_total{{{MODEL}, outcome="answered"}}': "0+9x70",
            f'magi_gateway_requests_total{{{MODEL}, outcome="refused"}}': "0+9x70",
        },
        15,
    ),
    "MagiGatewayQueueFull": Case(
        {f'magi_gateway_requests_total{{{MODEL}, outcome="queue_full"}}': "0 0 1x70"},
        {
            f'magi_gateway_requests_total{{{MODEL}, outcome="queue_full"}}': "0x70",
            f'magi_gateway_requests_total{{{MODEL}, outcome="answered"}}': "0+9x70",
        },
    ),
    "MagiGatewayWaits": Case(
        {f"magi_gateway_requests_waiting{{{MODEL}}}": "1x70"},
        {f"magi_gateway_requests_waiting{{{MODEL}}}": "1 1 1 0 1 1 1 0 1 1 1 0 1 1 1 0x70"},
        15,
    ),
    "MagiHostMemoryShort": Case(
        {f"magi_host_memory_available_bytes{{{WHERE}}}": "4x70", f"magi_host_memory_bytes{{{WHERE}}}": "100x70"},
        {f"magi_host_memory_available_bytes{{{WHERE}}}": "40x70", f"magi_host_memory_bytes{{{WHERE}}}": "100x70"},
        10,
        NO_LABELS,
    ),
    "MagiNoRoomForModels": Case(
        {
            f"magi_host_memory_room_bytes{{{WHERE}}}": "1x70",
            f"magi_host_memory_available_bytes{{{WHERE}}}": "40x70",
            f"magi_host_memory_bytes{{{WHERE}}}": "100x70",
        },
        {
            f"magi_host_memory_room_bytes{{{WHERE}}}": "1x70",
            f"magi_host_memory_available_bytes{{{WHERE}}}": "4x70",
            f"magi_host_memory_bytes{{{WHERE}}}": "100x70",
        },
        15,
        NO_LABELS,
    ),
    "MagiGpuProbeFails": Case(
        {f"magi_gpu_probe_success{{{WHERE}}}": "0x70"}, {f"magi_gpu_probe_success{{{WHERE}}}": "1x70"}, 15, NO_LABELS
    ),
    "MagiGpuHot": Case(
        {f'magi_gpu_temperature_celsius{{{WHERE}, gpu="CUDA0"}}': "95x70"},
        {f'magi_gpu_temperature_celsius{{{WHERE}, gpu="CUDA0"}}': "70x70"},
        10,
        {"gpu": "CUDA0"},
    ),
}


def test_every_alert_has_its_case() -> None:
    assert sorted(CASES) == sorted(rule["alert"] for rule in rules())


def rule_test(alert: str, series: dict[str, str], minutes: int, fires: bool, labels: dict[str, str]) -> dict[str, Any]:
    matchers = "".join(f', {name}="{value}"' for name, value in labels.items())
    query = f'count(ALERTS{{alertname="{alert}", alertstate="firing", instance="one:8000"{matchers}}})'
    return {
        "interval": "1m",
        "name": f"{alert} {'fires' if fires else 'is quiet'}",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": f"{minutes}m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }


def test_each_alert_fires_when_it_should_and_is_quiet_otherwise(tmp_path: Path) -> None:
    tests = [
        rule_test(alert, series, case.minutes, fires, case.labels)
        for alert, case in CASES.items()
        for series, fires in ((case.fires, True), (case.quiet, False))
    ]
    path = tmp_path / "rules.test.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))

    status, said = run_promtool("test", "rules", path)

    assert status == 0, said


def test_what_an_alert_says(tmp_path: Path) -> None:
    case = CASES["MagiHostMemoryShort"]
    said = {
        "exp_labels": {"severity": "critical", "job": "magi-agent", "instance": "one:8000"},
        "exp_annotations": {
            "summary": "one:8000 has 4% of its memory left",
            "description": "'magictl status' shows what each model uses.",
        },
    }
    series = [{"series": name, "values": values} for name, values in case.fires.items()]
    alert = {"alertname": "MagiHostMemoryShort", "eval_time": "10m", "exp_alerts": [said]}
    test = {"interval": "1m", "input_series": series, "alert_rule_test": [alert]}
    path = tmp_path / "rules.test.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))

    status, told_of = run_promtool("test", "rules", path)

    assert status == 0, told_of


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert "$labels." in rule["annotations"]["summary"]
