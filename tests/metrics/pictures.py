"""A snapshot in which everything is known: one model that runs, one GPU, and an answer of a real llama-server."""

from __future__ import annotations

from dataclasses import dataclass

from magi_agent.gateway.tallies import ModelTallies, Outcome, SpreadCounts
from magi_agent.metrics.event_counts import EventFigures
from magi_agent.metrics.loop_lag import LagCounts
from magi_agent.metrics.request_counts import RequestKey
from magi_agent.metrics.server_answers import samples_of
from magi_agent.metrics.server_scrapes import ServerScrape
from magi_agent.metrics.snapshot import AgentFigures, HostFigures, ModelFigures, ServerFigures, Snapshot
from magi_agent.metrics.unit_usage import UnitUsage
from magi_agent.registry.model import Model
from magi_agent.systemd.status import UnitStatus, unit_status
from magi_agent.vocabulary import ServerState
from tests.registry.model_facts import facts_at

ANSWER = b"""\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 7
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 8
# HELP llamacpp:n_tokens_max Largest observed sequence length (prompt + generation)
# TYPE llamacpp:n_tokens_max counter
llamacpp:n_tokens_max 14
# HELP llamacpp:predicted_tokens_seconds Average generation throughput in tokens/s
# TYPE llamacpp:predicted_tokens_seconds gauge
llamacpp:predicted_tokens_seconds 3127.79
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 0
# HELP llamacpp:requests_deferred Number of requests deferred
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 0
"""
"""Of llama-server, build 10434."""


@dataclass(frozen=True, slots=True)
class PicturedGpu:
    """What a driver tells of one GPU; by default, everything."""

    device: str | None = "CUDA0"
    backend: str | None = "CUDA"
    name: str | None = "NVIDIA H200"
    uuid: str | None = "GPU-1"
    pci_address: str | None = "0000:41:00.0"
    memory_total: int | None = 150 << 30
    memory_free: int | None = 100 << 30
    is_live: bool = True
    temperature: float | None = 41.0
    utilization: float | None = 25.0


TIMES = SpreadCounts((1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1), 400.5)
TALLIES = ModelTallies(
    outcomes={**dict.fromkeys(Outcome, 0), "answered": 3, "failed": 1},
    waiting=2, under_way=1, waits=TIMES, first_pieces=TIMES, servers_first_pieces=TIMES, durations=TIMES,
    speeds=SpreadCounts((0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1), 1220.0), prompt_tokens=31, completion_tokens=5,
)  # fmt: skip
EVERYTHING = UnitUsage(
    memory=900, memory_anonymous=300, memory_mapped=500, memory_high=1900, memory_max=2000, cpu_seconds=1.5,
    io_read=4096, io_written=512, oom_kills=0, tasks=9,
)  # fmt: skip


def unit() -> UnitStatus:
    """A unit that runs."""
    return unit_status(
        "magi-llama-toy.service",
        {"ActiveState": "active", "SubState": "running", "LoadState": "loaded"},
        {"MainPID": 12, "NRestarts": 2, "ExecMainStartTimestamp": 1_700_000_000_000_000},
    )


def server(
    model_id: str = "toy",
    *,
    usage: UnitUsage | None = EVERYTHING,
    scrape: ServerScrape | None = None,
    family: str = "llama",
) -> ServerFigures:
    """A model's server that is ready."""
    return ServerFigures(
        model=Model(model_id, facts_at(f"/models/{model_id}.gguf", family=family)),
        state=ServerState.READY,
        is_wanted=True,
        start_policy="alwaysOn",
        unit_name=f"magi-llama-{model_id}.service",
        unit=unit(),
        usage=usage,
        scrape=scrape or ServerScrape(0.01, samples_of(ANSWER)),
    )


def snapshot(
    *servers: ServerFigures,
    gpus: tuple[PicturedGpu, ...] | None = (PicturedGpu(),),
    failures: dict[tuple[str, str], int] | None = None,
) -> Snapshot:
    """Everything at one moment."""
    return Snapshot(
        agent=AgentFigures(
            version="1.2.3",
            python="3.11.2",
            scope="system",
            is_ready=True,
            is_settled=True,
            is_connected=True,
            is_draining=False,
            problems=0,
            requests={RequestKey("GET", "/", "200"): (2, 0.25), RequestKey("GET", "/", "401"): (1, 0.05)},
            requests_under_way=1,
            connections=2,
            tasks=12,
            lag=LagCounts((5, 2, 0, 1, 0, 0, 1), 3.2),
            events=EventFigures(failures or {}, {("start-all", "succeeded"): 1}, {"start-all": 2.5}),
            operations_under_way=0,
        ),
        host=HostFigures(1000, 400, 300, 200, 150, (0.5, 0.4, 0.3), 2),
        gpus=gpus,
        models=ModelFigures({("ok", True): 1}, 3, 1, 0.2, 1_700_000_000.0, 0),
        servers=servers or (server(),),
        gateway={"toy": TALLIES},
        scrape_seconds=0.02,
    )
