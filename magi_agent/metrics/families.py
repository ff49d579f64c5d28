"""From a snapshot to families of metrics: names, units and labels by Prometheus's conventions.

https://prometheus.io/docs/practices/naming/. Each family is described in docs/metrics.md. A figure that is not known
has no sample; it is never 0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from magi_agent.gateway.tallies import SECONDS, SPEEDS, ModelTallies, Outcome, SpreadCounts
from magi_agent.metrics.loop_lag import BOUNDS
from magi_agent.metrics.prometheus_parts import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    ProcessCollector,
    SummaryMetricFamily,
)
from magi_agent.metrics.server_answers import families_of
from magi_agent.metrics.snapshot import (
    AgentFigures,
    GpuFigures,
    HostFigures,
    ModelFigures,
    ServerFigures,
    Snapshot,
)
from magi_agent.servers.states import UP
from magi_agent.vocabulary import ModelStatus, ServerState

_OFTEN_ASKED_FOR = ("exit-code", "hung", "oom-kill", "signal", "start-timeout", "timeout")
"""Results of failures that are told of each server from the first on: a rise from nothing is none to Prometheus."""


def families(snapshot: Snapshot) -> list[Metric]:
    """All families of one scrape."""
    return [
        *_agent(snapshot.agent),
        *ProcessCollector(registry=None).collect(),
        *_requests(snapshot.agent),
        *_host(snapshot.host),
        *_gpus(snapshot.gpus),
        *(_models(snapshot.models) if snapshot.models else ()),
        *_servers(snapshot.servers),
        *_usage(snapshot.servers),
        *_failures(snapshot),
        *_gateway(snapshot),
        *_scrapes(snapshot),
    ]


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text)
    if value is not None:
        family.add_metric([], value)
    return family


def _agent(agent: AgentFigures) -> Iterator[Metric]:
    about = {"version": agent.version, "python_version": agent.python, "systemd_scope": agent.scope}
    yield InfoMetricFamily("magi_agent", "The agent: which one it is.", about)
    yield _gauge("magi_agent_ready", "Whether each server that should be up is ready (/health/ready).", agent.is_ready)
    yield _gauge("magi_agent_settled", "Whether all is wanted that should run since the start.", agent.is_settled)
    yield _gauge("magi_agent_systemd_connected", "Whether systemd is reached.", agent.is_connected)
    yield _gauge("magi_agent_draining", "Whether nothing is started, since the host is drained.", agent.is_draining)
    yield _gauge("magi_agent_problems", "Everything that is known to be wrong.", agent.problems)
    yield _gauge("magi_agent_tasks", "Tasks in the event loop.", agent.tasks)
    late = HistogramMetricFamily("magi_agent_loop_lag_seconds", "How late the event loop came to what was due.")
    bounds = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
    late.add_metric([], list(zip(bounds, map(float, accumulate(agent.lag.buckets)), strict=True)), agent.lag.total)
    yield late
    done = CounterMetricFamily("magi_operations", "Actions on several models, ended.", labels=["kind", "status"])
    for key, count in sorted(agent.events.operations.items()):
        done.add_metric(key, count)
    yield done
    took = CounterMetricFamily("magi_operation_seconds", "Time that such actions took together.", labels=["kind"])
    for kind, seconds in sorted(agent.events.operation_seconds.items()):
        took.add_metric([kind], seconds)
    yield took
    yield _gauge("magi_operations_under_way", "Actions on several models, not ended.", agent.operations_under_way)


def _requests(agent: AgentFigures) -> Iterator[Metric]:
    yield _gauge("magi_http_connections", "Connections to the API.", agent.connections)
    yield _gauge(
        "magi_http_requests_under_way", "Requests being answered, this one included.", agent.requests_under_way
    )
    labels = ["method", "route"]
    answered = CounterMetricFamily("magi_http_requests", "Requests to the API, answered.", labels=[*labels, "status"])
    together: dict[tuple[str, str], tuple[int, float]] = {}
    for key, (count, seconds) in sorted(
        agent.requests.items(), key=lambda item: (item[0].route, item[0].method, item[0].status)
    ):
        answered.add_metric([key.method, key.route, key.status], count)
        before = together.get((key.method, key.route), (0, 0.0))
        together[key.method, key.route] = (before[0] + count, before[1] + seconds)
    yield answered
    took = SummaryMetricFamily("magi_http_request_duration_seconds", "How long that took.", labels=labels)
    for where, (count, seconds) in together.items():
        took.add_metric(where, count, seconds)
    yield took


def _host(host: HostFigures) -> Iterator[Metric]:
    yield _gauge("magi_host_memory_bytes", "Memory that the host has.", host.memory)
    yield _gauge("magi_host_memory_available_bytes", "Memory to be had without swapping.", host.memory_available)
    yield _gauge("magi_host_memory_room_bytes", "Memory that servers may still take.", host.memory_room)
    yield _gauge("magi_host_swap_bytes", "Swap that the host has.", host.swap)
    yield _gauge("magi_host_swap_free_bytes", "Swap that is free.", host.swap_free)
    for minutes, load in zip((1, 5, 15), host.load, strict=True):
        yield _gauge(f"magi_host_load{minutes}", f"Load average over {minutes} min.", load)
    yield _gauge("magi_host_cpus", "Processors.", host.cpus)


def _gpus(gpus: Iterable[GpuFigures] | None) -> Iterator[Metric]:
    yield _gauge("magi_gpu_probe_success", "Whether the GPUs could be asked for.", gpus is not None)
    about = InfoMetricFamily("magi_gpu", "A GPU: which one it is.", labels=["gpu"])
    total = GaugeMetricFamily("magi_gpu_memory_bytes", "Memory of a GPU.", labels=["gpu"])
    free = GaugeMetricFamily("magi_gpu_memory_free_bytes", "Memory of a GPU that is free.", labels=["gpu"])
    heat = GaugeMetricFamily("magi_gpu_temperature_celsius", "Temperature of a GPU.", labels=["gpu"])
    busy = GaugeMetricFamily("magi_gpu_utilization_ratio", "Part of the time that a GPU was busy.", labels=["gpu"])
    for number, gpu in enumerate(gpus or ()):
        label = [gpu.device or gpu.pci_address or f"gpu{number}"]
        words = {"name": gpu.name, "uuid": gpu.uuid, "pci_address": gpu.pci_address, "backend": gpu.backend}
        about.add_metric(label, {word: readable(value) for word, value in words.items() if value})
        _add(total, label, gpu.memory_total)
        _add(free, label, gpu.memory_free if gpu.is_live else None)
        _add(heat, label, gpu.temperature)
        _add(busy, label, None if gpu.utilization is None else gpu.utilization / 100)
    yield from (about, total, free, heat, busy)


def _models(models: ModelFigures) -> Iterator[Metric]:
    listed = GaugeMetricFamily("magi_models", "Models that are listed.", labels=["status", "enabled"])
    for status in ModelStatus:
        for enabled in (False, True):
            listed.add_metric([status, str(enabled).lower()], models.counts.get((status, enabled), 0))
    yield listed
    scans = CounterMetricFamily("magi_scans", "Whole scans of the model folders.", labels=["outcome"])
    scans.add_metric(["failed"], models.scans_failed)
    scans.add_metric(["succeeded"], models.scans_succeeded)
    yield scans
    yield _gauge("magi_scan_duration_seconds", "How long the last whole scan took.", models.scan_seconds)
    yield _gauge("magi_scan_timestamp_seconds", "When the folders were last looked at.", models.scanned_at)
    yield _gauge("magi_scan_problems", "Folders and files that could not be looked at.", models.problems)


def _servers(servers: Iterable[ServerFigures]) -> Iterator[Metric]:
    about = InfoMetricFamily("magi_server", "A model's server: which one it is.", labels=["model"])
    wanted = GaugeMetricFamily("magi_server_wanted", "Whether a model's server should run.", labels=["model"])
    ready = GaugeMetricFamily("magi_server_ready", "Whether it answers.", labels=["model"])
    state = GaugeMetricFamily("magi_server_state", "1 for the one state that it is in.", labels=["model", "state"])
    since = GaugeMetricFamily("magi_server_start_time_seconds", "When it was executed.", labels=["model"])
    again = CounterMetricFamily("magi_server_restarts", "Times that systemd started it anew.", labels=["model"])
    for server in servers:
        label, facts = [server.model.model_id], server.model.facts
        about.add_metric(
            label,
            {
                "unit": server.unit_name,
                "family": readable(facts.family),
                "quantization": readable(facts.quantization),
                "tier": server.model.effective_tier,
                "start_policy": server.start_policy,
            },
        )
        wanted.add_metric(label, server.is_wanted)
        ready.add_metric(label, server.state in UP)
        for word in ServerState:
            state.add_metric([*label, word], server.state is word)
        if server.unit is not None:
            again.add_metric(label, server.unit.n_restarts)
            _add(since, label, server.unit.exec_main_start_timestamp if server.usage else None)
    yield from (about, wanted, ready, state, since, again)


def _usage(servers: Iterable[ServerFigures]) -> Iterator[Metric]:
    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"magi_server_{name}", text, labels=["model"])

    def counter(name: str, text: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"magi_server_{name}", text, labels=["model"])

    memory = gauge("memory_bytes", "Memory charged to its unit, page cache included.")
    anonymous = gauge("memory_anonymous_bytes", "Memory of its own.")
    mapped = gauge("memory_mapped_bytes", "Files that it has mapped: weights.")
    high = gauge("memory_high_bytes", "Beyond it, it is slowed down (MemoryHigh=).")
    most = gauge("memory_max_bytes", "Beyond it, it is killed (MemoryMax=).")
    cpu = counter("cpu_seconds", "Processor time.")
    read = counter("io_read_bytes", "Bytes read from disks.")
    written = counter("io_written_bytes", "Bytes written to disks.")
    killed = counter("oom_kills", "Processes of this run killed since memory ran out.")
    tasks = gauge("tasks", "Threads and processes.")
    for server in servers:
        label, usage = [server.model.model_id], server.usage
        if usage is None:
            continue
        _add(memory, label, usage.memory)
        _add(anonymous, label, usage.memory_anonymous)
        _add(mapped, label, usage.memory_mapped)
        _add(high, label, usage.memory_high)
        _add(most, label, usage.memory_max)
        _add(cpu, label, usage.cpu_seconds)
        _add(read, label, usage.io_read)
        _add(written, label, usage.io_written)
        _add(killed, label, usage.oom_kills)
        _add(tasks, label, usage.tasks)
    yield from (memory, anonymous, mapped, high, most, cpu, read, written, killed, tasks)


def _failures(snapshot: Snapshot) -> Iterator[Metric]:
    counted: Mapping[tuple[str, str], int] = {
        (server.model.model_id, result): 0 for server in snapshot.servers for result in _OFTEN_ASKED_FOR
    } | dict(snapshot.agent.events.failures)
    family = CounterMetricFamily("magi_server_failures", "Failures, by systemd's result.", labels=["model", "result"])
    for key, count in sorted(counted.items()):
        family.add_metric(key, count)
    yield family


def _gateway(snapshot: Snapshot) -> Iterator[Metric]:
    asked = snapshot.gateway
    # A rise from nothing is none to Prometheus: whose server runs is told of before anybody has asked it.
    none_yet: Mapping[str, int] = dict.fromkeys(Outcome, 0)
    outcomes = {server.model.model_id: none_yet for server in snapshot.servers}
    outcomes |= {model_id: tallies.outcomes for model_id, tallies in asked.items()}
    ended = CounterMetricFamily("magi_gateway_requests", "Requests to a model, ended.", labels=["model", "outcome"])
    for model_id, counts in sorted(outcomes.items()):
        for outcome, count in counts.items():
            ended.add_metric([model_id, outcome], count)
    yield ended
    under_way = GaugeMetricFamily("magi_gateway_requests_under_way", "Requests that ask a model.", labels=["model"])
    waiting = GaugeMetricFamily("magi_gateway_requests_waiting", "Requests that wait for it.", labels=["model"])
    prompt = CounterMetricFamily(
        "magi_gateway_prompt_tokens",
        "Tokens of prompts as whole answers through the gateway tell them to clients, cached ones included.",
        labels=["model"],
    )
    completion = CounterMetricFamily(
        "magi_gateway_completion_tokens",
        "Tokens of answers as whole answers through the gateway tell them to clients.",
        labels=["model"],
    )
    for model_id, tallies in asked.items():
        under_way.add_metric([model_id], tallies.under_way)
        waiting.add_metric([model_id], tallies.waiting)
        prompt.add_metric([model_id], tallies.prompt_tokens)
        completion.add_metric([model_id], tallies.completion_tokens)
    yield from (under_way, waiting, prompt, completion)
    yield _spread("wait_seconds", "How long a request waited to be let in to its model.", asked, lambda its: its.waits)
    yield _spread(
        "first_token_seconds", "From a request to the first of its stream.", asked, lambda its: its.first_pieces
    )
    yield _spread(
        "server_first_token_seconds",
        "Of that, from when the request was let in to its model.",
        asked,
        lambda its: its.servers_first_pieces,
    )
    yield _spread(
        "request_duration_seconds", "From a request to the end of its answer.", asked, lambda its: its.durations
    )
    yield _spread(
        "tokens_per_second", "How fast one answer was made, of each that tells.", asked, lambda its: its.speeds, SPEEDS
    )


def _spread(
    name: str,
    text: str,
    asked: Mapping[str, ModelTallies],
    of: Callable[[ModelTallies], SpreadCounts],
    upper: tuple[float, ...] = SECONDS,
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"magi_gateway_{name}", text, labels=["model"])
    bounds = (*(f"{bound:g}" for bound in upper), "+Inf")
    for model_id, tallies in asked.items():
        counts = of(tallies)
        buckets = list(zip(bounds, map(float, accumulate(counts.buckets)), strict=True))
        family.add_metric([model_id], buckets, counts.total)
    return family


def _scrapes(snapshot: Snapshot) -> Iterator[Metric]:
    success = GaugeMetricFamily("magi_server_scrape_success", "Whether it told its own metrics.", labels=["model"])
    took = GaugeMetricFamily("magi_server_scrape_duration_seconds", "How long that took.", labels=["model"])
    asked = {server.model.model_id: server.scrape for server in snapshot.servers if server.scrape is not None}
    for model_id, scrape in asked.items():
        success.add_metric([model_id], scrape.problem is None)
        took.add_metric([model_id], scrape.seconds)
    yield success
    yield took
    yield _gauge("magi_scrape_collect_seconds", "How long all this took to be asked for.", snapshot.scrape_seconds)
    yield from families_of({model_id: scrape.samples for model_id, scrape in asked.items()})


def _add(family: GaugeMetricFamily | CounterMetricFamily, label: list[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(label, value)


def readable(text: str) -> str:
    """Text of a file or a driver as it can be sent: what nobody could read stands as the replacement character."""
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
