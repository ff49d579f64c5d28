"""From what is known to families: nothing that is not known, and nothing that Prometheus would not take."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from magi_agent.metrics.exposition import rendered
from magi_agent.metrics.families import families
from magi_agent.metrics.forms import Form, form_of
from magi_agent.metrics.server_scrapes import ServerScrape
from magi_agent.metrics.snapshot import Snapshot
from magi_agent.metrics.unit_usage import UnitUsage
from tests.metrics.monitoring import run_promtool
from tests.metrics.pictures import PicturedGpu, server, snapshot


def lines(taken: Snapshot) -> list[str]:
    text = rendered(families(taken), Form.OPEN_METRICS).decode()
    assert list(read_openmetrics(text))
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_everything_that_is_known_is_told() -> None:
    told = lines(snapshot())

    for line in (
        'magi_agent_info{python_version="3.11.2",systemd_scope="system",version="1.2.3"} 1.0',
        'magi_agent_loop_lag_seconds_bucket{le="0.005"} 7.0',
        'magi_agent_loop_lag_seconds_bucket{le="+Inf"} 9.0',
        "magi_agent_loop_lag_seconds_count 9.0",
        "magi_agent_loop_lag_seconds_sum 3.2",
        'magi_http_requests_total{method="GET",route="/",status="401"} 1.0',
        'magi_http_request_duration_seconds_count{method="GET",route="/"} 3.0',
        'magi_http_request_duration_seconds_sum{method="GET",route="/"} 0.3',
        'magi_operations_total{kind="start-all",status="succeeded"} 1.0',
        'magi_gpu_info{backend="CUDA",gpu="CUDA0",name="NVIDIA H200",pci_address="0000:41:00.0",uuid="GPU-1"} 1.0',
        'magi_gpu_utilization_ratio{gpu="CUDA0"} 0.25',
        'magi_server_cpu_seconds_total{model="toy"} 1.5',
        'magi_server_memory_max_bytes{model="toy"} 2000.0',
        'magi_server_restarts_total{model="toy"} 2.0',
        'magi_server_start_time_seconds{model="toy"} 1.7e+09',
        'magi_server_state{model="toy",state="ready"} 1.0',
        'magi_server_state{model="toy",state="failed"} 0.0',
        'magi_server_failures_total{model="toy",result="hung"} 0.0',
        'magi_models{enabled="true",status="ok"} 1.0',
        "magi_scan_timestamp_seconds 1.7e+09",
        'magi_gateway_requests_total{model="toy",outcome="answered"} 3.0',
        'magi_gateway_requests_total{model="toy",outcome="queue_full"} 0.0',
        'magi_gateway_requests_waiting{model="toy"} 2.0',
        'magi_gateway_requests_under_way{model="toy"} 1.0',
        'magi_gateway_completion_tokens_total{model="toy"} 5.0',
        'magi_gateway_first_token_seconds_bucket{le="0.025",model="toy"} 3.0',
        'magi_gateway_first_token_seconds_bucket{le="300",model="toy"} 3.0',
        'magi_gateway_first_token_seconds_bucket{le="+Inf",model="toy"} 4.0',
        'magi_gateway_first_token_seconds_sum{model="toy"} 400.5',
        'magi_gateway_tokens_per_second_bucket{le="20",model="toy"} 1.0',
    ):
        assert line in told


def test_what_is_not_known_is_not_told_as_0() -> None:
    gpu = PicturedGpu(
        device=None, name=None, uuid=None, memory_total=None, memory_free=None, temperature=None, utilization=None
    )
    told = lines(snapshot(server(usage=UnitUsage()), gpus=(gpu,)))

    assert not [line for line in told if line.startswith(("magi_server_memory", "magi_server_cpu", "magi_gpu_memory"))]
    assert not [line for line in told if line.startswith(("magi_gpu_temp", "magi_gpu_util"))]
    assert 'magi_gpu_info{backend="CUDA",gpu="0000:41:00.0",pci_address="0000:41:00.0"} 1.0' in told


def test_a_header_cannot_say_more_than_its_word() -> None:
    told = lines(snapshot(server(family='a"} 1\nmagi_agent_ready 0\r\x00\udcff')))

    (line,) = [line for line in told if line.startswith("magi_server_info")]
    assert 'family="a\\"} 1\ufffdmagi_agent_ready 0\ufffd\ufffd\ufffd"' in line


def test_free_memory_of_some_time_ago_is_not_told() -> None:
    assert [line for line in lines(snapshot()) if line.startswith("magi_gpu_memory_free_bytes")]
    told = lines(snapshot(gpus=(PicturedGpu(is_live=False),)))
    assert not [line for line in told if line.startswith("magi_gpu_memory_free_bytes")]


def test_a_server_that_nobody_asked_has_its_outcomes_from_the_first_on() -> None:
    told = lines(snapshot(server("a")))

    assert 'magi_gateway_requests_total{model="a",outcome="failed"} 0.0' in told
    assert not [line for line in told if line.startswith("magi_gateway_wait_seconds") and '"a"' in line]


def test_gpus_that_could_not_be_asked_for() -> None:
    assert "magi_gpu_probe_success 0.0" in lines(snapshot(gpus=None))
    assert "magi_gpu_probe_success 1.0" in lines(snapshot(gpus=()))


def test_a_server_without_processes_and_one_that_does_not_answer() -> None:
    told = lines(snapshot(server("a", usage=None), server("b", scrape=ServerScrape(2.0, problem="it is silent"))))

    assert not [line for line in told if line.startswith("magi_server_start_time_seconds") and '"a"' in line]
    assert 'magi_server_scrape_success{model="a"} 1.0' in told
    assert 'magi_server_scrape_success{model="b"} 0.0' in told
    assert 'magi_server_scrape_duration_seconds{model="b"} 2.0' in told
    assert not [line for line in told if line.startswith("llamacpp:") and '"b"' in line]


def test_failures_of_models_that_are_not_listed_any_more_are_still_counted() -> None:
    told = lines(snapshot(failures={("gone", "oom-kill"): 2, ("toy", "hung"): 1, ("toy", "odd"): 3}))

    assert 'magi_server_failures_total{model="gone",result="oom-kill"} 2.0' in told
    assert 'magi_server_failures_total{model="toy",result="hung"} 1.0' in told
    assert 'magi_server_failures_total{model="toy",result="odd"} 3.0' in told


class Collected:
    """What Prometheus's own library is given families by."""

    def __init__(self, collected: list[Metric]) -> None:
        self._collected = collected

    def collect(self) -> Iterable[Metric]:
        return self._collected


def test_the_older_form_is_what_the_library_would_write() -> None:
    odd = Metric("odd:name", 'a\\b\n"c"', "unknown")
    odd.add_sample("odd:name", {"b": 'a\\b\n"c"', "a": "\ufffd"}, float("inf"))
    odd.add_sample("odd:name", {}, 12345678.9)
    told = [*families(snapshot()), odd]

    assert {family.type for family in told} == {"counter", "gauge", "histogram", "info", "summary", "unknown"}
    assert rendered(told, Form.TEXT) == generate_latest(Collected(told))


def test_promtool_has_nothing_against_any_of_it() -> None:
    status, said = run_promtool("check", "metrics", given=rendered(families(snapshot()), Form.TEXT))

    assert [line for line in said.splitlines() if not line.startswith("llamacpp:")] == []
    assert status in (0, 3)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", Form.OPEN_METRICS),
        ("*/*", Form.OPEN_METRICS),
        ("text/html,application/xhtml+xml", Form.OPEN_METRICS),
        ("text/plain", Form.TEXT),
        ("text/plain;version=0.0.4;q=0.5, */*;q=0.1", Form.TEXT),
        ("application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5", Form.OPEN_METRICS),
        ("APPLICATION/OPENMETRICS-TEXT", Form.OPEN_METRICS),
    ],
)
def test_the_form_that_a_caller_gets(accept: str, form: Form) -> None:
    assert form_of(accept) is form
