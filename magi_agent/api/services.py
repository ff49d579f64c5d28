"""What the API answers from."""

from collections.abc import Callable
from dataclasses import dataclass

from magi_agent.configuration import Configuration
from magi_agent.events import EventStream
from magi_agent.gateway.lanes import Lanes
from magi_agent.gateway.opening import Opening
from magi_agent.gateway.tallies import Tallies
from magi_agent.gateway.tier_models import TierModels
from magi_agent.host_facts import HostFacts
from magi_agent.metrics.metrics import Metrics
from magi_agent.problems import Problems
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profiles import Profiles
from magi_agent.readiness import Readiness, readiness
from magi_agent.registry.inventory import Inventory
from magi_agent.registry.registry import Registry
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.history import History
from magi_agent.servers.memory_needs import MemoryNeeds
from magi_agent.servers.narrow_limits import NarrowLimits
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.self_reports import SelfReports
from magi_agent.servers.server_log import ServerLogs
from magi_agent.servers.servers import Servers
from magi_agent.servers.usage import ServersUsage
from magi_agent.settings.settings import Settings
from magi_agent.systemd.manager import SystemdManager
from magi_agent.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the API, as the composition root made them."""

    configuration: Configuration
    registry: Registry
    inventory: Inventory
    profiles: Profiles
    active_profile: ActiveProfile
    servers: Servers
    logs: ServerLogs
    history: History
    preparation: StartPreparation
    effective: EffectiveSettings
    memory: MemoryNeeds
    narrow_limits: NarrowLimits
    manager: SystemdManager
    transfer: Transfer
    events: EventStream
    usage: ServersUsage
    reports: SelfReports
    host: HostFacts
    metrics: Metrics
    problems: Problems
    connections: ServerConnections
    lanes: Lanes
    opening: Opening
    tiers: TierModels
    tallies: Tallies
    is_settled: Callable[[], bool]
    """Whether everything is wanted that should run since the start."""

    @property
    def settings(self) -> Settings:
        """The settings that hold now."""
        return self.configuration.settings

    def readiness(self) -> Readiness:
        """How far everything is up that should be."""
        return readiness(self.registry, self.servers, self.effective, self.manager, self.is_settled)
