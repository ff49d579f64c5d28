"""What must be settled before a model's server is started: usable files, a port of its own, the settings that hold."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from magi_agent.errors import ModelNotUsable, PortInUse
from magi_agent.host.listeners import listeners
from magi_agent.registry.model import Choices, Model, RuntimeSettings
from magi_agent.registry.registry import Registry
from magi_agent.servers.launch import LaunchSpecification
from magi_agent.servers.port_holder import holder_of
from magi_agent.servers.ports import free_port
from magi_agent.settings import Settings

_PORT_WAIT: Final = 2.0
"""Seconds a port may take to come free after its last holder ended."""
_PORT_PAUSE: Final = 0.05


class StartPreparation:
    """Makes launch specifications from the registry, the settings and the active profile."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        profile_settings: Callable[[], Mapping[str, RuntimeSettings]],
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._profile_settings = profile_settings

    def launch_of(self, model: Model, port: int) -> LaunchSpecification:
        """How ``model`` would be started on ``port``, as things stand."""
        settings = self._settings
        in_profile = self._profile_settings().get(model.model_id, RuntimeSettings())
        return LaunchSpecification(
            model_id=model.model_id,
            display_name=model.facts.display_name or model.facts.filename,
            binary=settings.llama_server_path,
            model_path=model.facts.file_path,
            projector_path=model.facts.projector_path,
            host=settings.llama_server_host,
            port=port,
            runtime_settings=in_profile.over(model.choices.runtime_settings),
            readable_folders=settings.model_scan_path,
            user=settings.llama_server_user or None,
            stop_timeout=settings.stop_timeout,
        )

    def knows(self, model_id: str) -> bool:
        """Whether the registry lists such a model."""
        return model_id in self._registry.models

    async def launch_for(self, model_id: str) -> LaunchSpecification:
        """How a model is to be started now; it has a port when this returns.

        Raises ``ModelNotFound``, ``ModelNotUsable``, ``NoFreePort``, ``PortInUse``, ``RegistrySaveFailed``.
        """
        model = self._registry.model(model_id)
        if not model.is_usable:
            raise not_usable(model)
        if model.choices.port is None:
            model = await self.give_port(model_id)
        port = model.choices.port
        assert port is not None  # noqa: S101  # given above
        if not await self._came_free(port):
            holder = await asyncio.to_thread(holder_of, port)
            raise PortInUse(
                f"port {port} of {model_id} is held by {holder}; stop that, or give the model another port",
                {"modelId": model_id, "port": port, "holder": holder},
            )
        return self.launch_of(model, port)

    async def give_port(self, model_id: str) -> Model:
        """Give a model a port, if it has none. Raises ``NoFreePort``, ``RegistrySaveFailed``."""
        return await self._registry.choose(model_id, self.with_port)

    def with_port(self, choices: Choices) -> Choices:
        """The same choices with a port. Raises ``NoFreePort``."""
        if choices.port is not None:
            return choices
        given = self._registry.given_ports()
        avoid = {self._settings.tcp.port} if self._settings.tcp else set()
        return replace(
            choices, port=free_port(self._settings.port_range, given, lambda port: bool(listeners(port)), avoid)
        )

    async def _came_free(self, port: int) -> bool:
        """Whether nobody listens on the port; an earlier run of the same model may be on its way out."""
        deadline = asyncio.get_running_loop().time() + _PORT_WAIT
        while listeners(port):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_PORT_PAUSE)
        return True


def not_usable(model: Model) -> ModelNotUsable:
    """Why a model cannot be started or enabled."""
    return ModelNotUsable(
        f"model {model.model_id} cannot be used: {model.facts.problem or model.facts.status}",
        {"modelId": model.model_id, "status": str(model.facts.status), "problem": model.facts.problem},
    )
