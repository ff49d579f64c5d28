"""What the API answers from."""

from dataclasses import dataclass

from magi_agent.events import EventStream
from magi_agent.profiles.active import ActiveProfile
from magi_agent.profiles.profiles import Profiles
from magi_agent.registry.inventory import Inventory
from magi_agent.registry.registry import Registry
from magi_agent.servers.preparation import StartPreparation
from magi_agent.servers.servers import Servers
from magi_agent.settings import Settings
from magi_agent.systemd.manager import SystemdManager


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the API, as the composition root made them."""

    settings: Settings
    registry: Registry
    inventory: Inventory
    profiles: Profiles
    active_profile: ActiveProfile
    servers: Servers
    preparation: StartPreparation
    manager: SystemdManager
    events: EventStream
