"""What must be settled before a model's server is started: usable files, a port of its own, the settings that hold."""

import asyncio
from dataclasses import replace
from typing import Final

from magi_agent.errors import ModelNotUsable, PortInUse, ValidationFailed
from magi_agent.host.listeners import listeners
from magi_agent.registry.model import Choices, Model
from magi_agent.registry.registry import Registry
from magi_agent.runtime_settings.passing import disallowed
from magi_agent.runtime_settings.settings import Fault, RuntimeSettings
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.effective import EffectiveSettings
from magi_agent.servers.launch import LaunchSpecification, Wanted, specification_of
from magi_agent.servers.llama_server import binary_identity_of
from magi_agent.servers.port_holder import holder_of
from magi_agent.servers.ports import free_port
from magi_agent.servers.program_faults import program_fault
from magi_agent.servers.settings_faults import binary_fault, settings_faults, settings_not_usable
from magi_agent.settings.settings import Settings, within
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerAccess

_PORT_WAIT: Final = 2.0
"""Seconds a port may take to come free after its last holder ended."""
_PORT_PAUSE: Final = 0.05


class StartPreparation:
    """Makes launch specifications from the registry, the configuration and the runtime settings that hold."""

    def __init__(
        self, registry: Registry, settings: Settings, effective: EffectiveSettings, binaries: Binaries
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._effective = effective
        self._binaries = binaries

    def reconfigure(self, settings: Settings) -> None:
        """Take another configuration; what runs already may differ from it then."""
        self._settings = settings

    def launch_of(self, model: Model, port: int, effective: EffectiveSettings | None = None) -> LaunchSpecification:
        """How ``model`` would be started on ``port``, as things stand, or with other settings than those that hold."""
        return self._specification(model, port, self._runtime_of(model, effective or self._effective))

    def launch_as_it_stands(
        self, model_id: str, effective: EffectiveSettings | None = None
    ) -> LaunchSpecification | None:
        """How a model would be started, on the port it has; ``None`` where there is no such model."""
        model = self._registry.models.get(model_id)
        return self.launch_of(model, model.choices.port or 0, effective) if model else None

    def _specification(self, model: Model, port: int, runtime: RuntimeSettings) -> LaunchSpecification:
        binary = self._settings.binary(runtime.binary) or self._settings.llama_server_path
        file = self._binaries.file(binary)
        wanted = Wanted(
            model.model_id,
            model.facts.display_name or model.facts.filename,
            model.facts.file_path,
            model.facts.projector_path,
            port,
            runtime,
        )
        return specification_of(wanted, self._settings, self._binaries.options(binary), file.identity if file else None)

    async def look_at_binaries(self) -> None:
        """See which files the binaries are now, so that what ``launch_of`` says of them holds."""
        await self._binaries.look(self._settings.binaries)

    async def ask_binaries(self) -> None:
        """Ask each configured binary what it can do, if it was never asked."""
        await self.look_at_binaries()
        for binary in self._settings.binaries:
            _ = await self._binaries.ask(binary)

    def binary_news(self, launch: LaunchSpecification, unit: UnitStatus) -> tuple[str, ...]:
        """Whether the binary that a server was started with is another file by now; for a person."""
        file = self._binaries.file(launch.binary)
        ran = binary_identity_of(unit.environment)
        if file is None or ran is None or ran == file.identity or unit.argv[:1] != (str(launch.binary),):
            return ()
        if (unit.exec_main_start_timestamp or 0.0) > file.placed_at:
            # systemd has restarted it since: what runs is the new one already.
            return ()
        return (f"binary: {launch.binary} is another file than the one that runs",)

    def refused_flags(self, launch: LaunchSpecification) -> tuple[str, ...]:
        """The extra flags that hold and are not allowed any more, so that a restart would fail; for a person."""
        if launch.known_options is None:
            return ()
        faults = disallowed(launch.runtime_settings, self._settings.allowed_flags, launch.known_options)
        return tuple(f"{fault.name}: {fault.message}" for fault in faults)

    async def faults_of(self, settings: RuntimeSettings) -> tuple[Fault, ...]:
        """Why a server could not be run with ``settings``: what the configuration, the binary or the files forbid."""
        if fault := binary_fault(settings, self._settings):
            return (fault,)
        known = await self._binaries.ask(self._settings.binary(settings.binary) or self._settings.llama_server_path)
        return await asyncio.to_thread(settings_faults, settings, self._settings, known)

    def check_aliases(self, model_id: str, settings: RuntimeSettings) -> None:
        """See that no alias names another model. Raises ``ValidationFailed``."""
        for other in self._registry.models.values():
            if other.model_id == model_id:
                continue
            names = {other.model_id, *(other.choices.runtime_settings.aliases or ())}
            if taken := names.intersection(settings.aliases or ()):
                raise ValidationFailed(
                    [{"field": "aliases", "message": f"{min(taken)!r} names {other.model_id} already"}]
                )

    async def check(self, model: Model) -> None:
        """See that ``model`` could be started. Raises ``ModelNotUsable``, ``SettingsNotUsable``."""
        if not model.is_usable:
            raise not_usable(model)
        if faults := await self.faults_of(self._effective.of(model)):
            raise settings_not_usable(model.model_id, faults)

    async def check_replacement(self, model: Model) -> None:
        """See that what runs of ``model`` could be replaced; raises as ``check`` does.

        A program that is not there, or is none, is found before what runs is stopped for it.
        """
        await self.check(model)
        settings = self._effective.of(model)
        binary = self._settings.binary(settings.binary) or self._settings.llama_server_path
        if fault := await asyncio.to_thread(program_fault, binary):
            message = f"{fault.cause} ({fault.advice}); what runs is left as it is"
            raise settings_not_usable(model.model_id, (Fault("binary", message),))

    def knows(self, model_id: str) -> bool:
        """Whether the registry lists such a model."""
        return model_id in self._registry.models

    async def launch_for(self, model_id: str) -> LaunchSpecification:
        """How a model is to be started now; it has a port when this returns.

        Raises ``ModelNotFound``, ``ModelNotUsable``, ``SettingsNotUsable``, ``NoFreePort``, ``PortInUse``,
        ``RegistrySaveFailed``.
        """
        while True:
            model = self._registry.model(model_id)
            await self.check(model)
            port = model.choices.port or (await self.give_port(model_id)).choices.port
            assert port is not None  # noqa: S101  # given above
            if self._listens_on_ports and not await self._came_free(port):
                holder = await asyncio.to_thread(holder_of, port)
                raise PortInUse(
                    f"port {port} of {model_id} is held by {holder}; stop that, or give the model another port",
                    {"modelId": model_id, "port": port, "holder": holder},
                )
            # Meanwhile anything may have been chosen anew: what is checked here last is what is launched.
            model = self._registry.model(model_id)
            runtime = self._runtime_of(model, self._effective)
            if faults := await self.faults_of(runtime):
                raise settings_not_usable(model_id, faults)
            if model.choices.port == port:
                return self._specification(model, port, runtime)

    async def give_port(self, model_id: str) -> Model:
        """Give a model a port, if it has none. Raises ``NoFreePort``, ``RegistrySaveFailed``."""
        return await self._registry.choose(model_id, self.with_port)

    def with_port(self, choices: Choices) -> Choices:
        """The same choices with a port. Raises ``NoFreePort``."""
        if choices.port is not None:
            return choices
        low, high = self.port_range
        gone = {
            model_id: model.choices.port
            for model_id, model in self._registry.remembered.items()
            if not model.present and model.choices.port and low <= model.choices.port <= high
        }
        port = free_port(
            (low, high), self._registry.given_ports(), lambda port: bool(listeners(port)), self._avoided(), gone
        )
        return replace(choices, port=port)

    def _avoided(self) -> set[int]:
        return {self._settings.tcp.port} if self._settings.tcp else set()

    @property
    def port_range(self) -> tuple[int, int]:
        """The ports that models get: those a person chose, else the configuration's."""
        chosen = self._registry.port_range
        return chosen if chosen and within(chosen, self._settings.port_limits) else self._settings.port_range

    async def choose_port_range(self, ports: tuple[int, int] | None) -> None:
        """Choose the range that ports are given from; ``None`` for the configured one.

        Raises ``ValidationFailed``, ``RegistrySaveFailed``.
        """
        if ports is not None and (problem := self.port_range_problem(ports)):
            raise ValidationFailed([{"field": "portRange", "message": problem}])
        await self._registry.choose_port_range(ports)

    def port_range_problem(self, ports: tuple[int, int]) -> str | None:
        """Why a range of ports cannot be chosen."""
        limits = self._settings.port_limits
        if within(ports, limits):
            return None
        return f"must lie within {limits[0]} to {limits[1]}, the servers.port_limits of agent.toml"

    async def choose_port(self, model_id: str, port: int | None, *, held: int | None = None) -> Model:
        """Give a model a port that a person chose, or take its port back; one that went may lose it too.

        ``held`` is the port that the model's own server listens on.

        Raises ``ModelNotFound``, ``ValidationFailed`` for a port outside the range, ``PortInUse``,
        ``RegistrySaveFailed``.
        """
        model = self._registry.remembered.get(model_id) or self._registry.model(model_id)
        if port is not None and port != model.choices.port:
            await self._check_port(port, held)

        def change(choices: Choices) -> Choices:
            for other in self._registry.remembered.values():
                if port is not None and other.choices.port == port and other.model_id != model.model_id:
                    raise PortInUse(
                        f"port {port} is given to {other.model_id}; take it back first: "
                        f"magictl port {other.model_id} auto",
                        {"port": port, "modelId": other.model_id},
                    )
            return replace(choices, port=port)

        return await self._registry.choose(model.model_id, change, remembered=True)

    async def _check_port(self, port: int, held: int | None) -> None:
        low, high = self.port_range
        if not low <= port <= high:
            raise ValidationFailed([{"field": "port", "message": f"must be from {low} to {high}, the range of ports"}])
        if port in self._avoided():
            raise PortInUse(f"port {port} is the agent's own", {"port": port, "holder": "magi-agent"})
        if port != held and listeners(port):
            holder = await asyncio.to_thread(holder_of, port)
            raise PortInUse(f"port {port} is held by {holder}", {"port": port, "holder": holder})

    def _runtime_of(self, model: Model, effective: EffectiveSettings) -> RuntimeSettings:
        """The settings that hold, with what the model is made for where nobody chose."""
        runtime = effective.of(model)
        if runtime.mode is None and model.facts.is_embedding:
            return replace(runtime, mode="rerank" if model.facts.is_reranker else "embedding")
        return runtime

    @property
    def _listens_on_ports(self) -> bool:
        """Whether servers that are started now use the ports they are given; these stay theirs in any case."""
        return self._settings.server_access is not ServerAccess.SOCKET

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
