"""All that one scrape tells, as it was at one moment: plain values, from which any thread can make text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from magi_agent.gateway.tallies import ModelTallies
from magi_agent.metrics.event_counts import EventFigures
from magi_agent.metrics.loop_lag import LagCounts
from magi_agent.metrics.request_counts import RequestKey
from magi_agent.metrics.server_scrapes import ServerScrape
from magi_agent.metrics.unit_usage import UnitUsage
from magi_agent.registry.model import Model
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerState


class GpuFigures(Protocol):
    """What is told of one GPU; ``None`` for what is not known."""

    @property
    def device(self) -> str | None:
        """What llama-server calls it."""

    @property
    def backend(self) -> str | None:
        """llama-server's back end for it."""

    @property
    def name(self) -> str | None:
        """What its maker calls it."""

    @property
    def uuid(self) -> str | None:
        """By which its driver knows it."""

    @property
    def pci_address(self) -> str | None:
        """Its place, which stays over a boot."""

    @property
    def memory_total(self) -> int | None:
        """Bytes."""

    @property
    def memory_free(self) -> int | None:
        """Bytes."""

    @property
    def is_live(self) -> bool:
        """Whether ``memory_free`` is of now, and not of when llama-server was asked for its devices."""

    @property
    def temperature(self) -> float | None:
        """Degrees Celsius."""

    @property
    def utilization(self) -> float | None:
        """Percent."""


@dataclass(frozen=True, slots=True)
class AgentFigures:
    """The agent itself."""

    version: str
    python: str
    scope: str
    is_ready: bool
    is_settled: bool
    is_connected: bool
    is_draining: bool
    problems: int
    requests: Mapping[RequestKey, tuple[int, float]]
    requests_under_way: int
    connections: int
    tasks: int
    lag: LagCounts
    events: EventFigures
    operations_under_way: int


@dataclass(frozen=True, slots=True)
class HostFigures:
    """The host; sizes are bytes."""

    memory: int
    memory_available: int
    memory_room: int | None
    """What servers may still take, by all limits that hold for them."""
    swap: int
    swap_free: int
    load: tuple[float, float, float]
    """Over 1, 5 and 15 minutes."""
    cpus: int


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """The models that are listed."""

    counts: Mapping[tuple[str, bool], int]
    """By status, and whether they are enabled."""
    scans_succeeded: int
    scans_failed: int
    scan_seconds: float | None
    scanned_at: float | None
    """Seconds since the epoch."""
    problems: int


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """The server of one model that should run or has a loaded unit."""

    model: Model
    state: ServerState
    is_wanted: bool
    start_policy: str
    unit_name: str
    unit: UnitStatus | None
    usage: UnitUsage | None
    """``None`` where no processes are."""
    scrape: ServerScrape | None
    """``None`` where it is not ready, and so was not asked."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything."""

    agent: AgentFigures
    host: HostFigures
    gpus: Sequence[GpuFigures] | None
    """``None`` where they could not be asked for."""
    models: ModelFigures | None
    """``None`` before the registry is loaded."""
    servers: Sequence[ServerFigures]
    gateway: Mapping[str, ModelTallies]
    """The requests to each model that was asked through the gateway."""
    scrape_seconds: float
