"""Whether the agent, and each server that should be up, is ready: what ``/health/ready`` and the metrics say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from magi_agent.errors import ServiceUnavailable
from magi_agent.registry.model import Model
from magi_agent.registry.registry import Registry
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.servers import Servers
from magi_agent.servers.states import UP
from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import ServerState, StartPolicy


@dataclass(frozen=True, slots=True)
class Readiness:
    """How far everything is up that should be."""

    is_loaded: bool
    """Whether the registry is."""
    is_connected: bool
    """Whether systemd is reached."""
    is_settled: bool
    """Whether everything is wanted that should run since the start."""
    wanted: Mapping[str, ServerState]
    """The servers that should be up whenever the host is, or were started: those of ``onDemand`` models are not."""

    @property
    def missing(self) -> dict[str, ServerState]:
        """Those of them that are not ready, by id."""
        return {model_id: state for model_id, state in sorted(self.wanted.items()) if state not in UP}

    @property
    def is_ready(self) -> bool:
        """Whether nothing is missing."""
        return self.is_loaded and self.is_connected and self.is_settled and not self.missing


def readiness(
    registry: Registry,
    servers: Servers,
    effective: EffectiveSettings,
    manager: SystemdManager,
    is_settled: Callable[[], bool],
) -> Readiness:
    """How it is now."""
    models: Mapping[str, Model] = {}
    wanted: Mapping[str, ServerState] = {}
    try:
        models = registry.models
        wanted = servers.wanted()
        is_loaded = True
    except ServiceUnavailable:
        is_loaded = False
    return Readiness(
        is_loaded,
        manager.connected,
        is_settled(),
        {
            model_id: state
            for model_id, state in wanted.items()
            if model_id not in models or effective.start_policy(models[model_id]) is not StartPolicy.ON_DEMAND
        },
    )
