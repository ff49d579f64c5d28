"""Who makes and ends units: the reconciler knows a launcher by what it can do, not by where it runs.

``DirectLauncher`` asks systemd itself: in the user scope, where the agent owns its manager, and in the system scope
where the agent is privileged.
"""

from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from magi_agent.errors import ModelNotUsable
from magi_agent.servers.launch import SLICE, LaunchSpecification, unit_name
from magi_agent.servers.llama_server import argv_of, environment_of
from magi_agent.systemd.errors import NoSuchUnit
from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.transient import Restart, TransientService
from magi_agent.vocabulary import Scope

_START_TIMEOUT: Final = 30.0
"""Seconds for systemd to execute the binary; loading the model comes after."""
_QUICK_RETRIES: Final = 3
_RETRY_PAUSE: Final = 1.0
_RETRY_WINDOW: Final = 60.0


class Launcher(Protocol):
    """Starts, stops and clears the servers' units."""

    async def start(self, launch: LaunchSpecification) -> JobResult:
        """Make and start the unit of one model; a failed one of the same name gives way.

        Raises ``BusError`` and, for what cannot be launched, ``MagiError``.
        """

    async def stop(self, model_id: str, stop_timeout: float) -> JobResult:
        """Stop a model's unit; returns when nothing of it runs. Raises ``BusError``."""

    async def clear(self, model_id: str) -> None:
        """Forget that a model's unit failed. Raises ``BusError``."""


def service_of(launch: LaunchSpecification, scope: Scope) -> TransientService:
    """The unit that a launch specification describes; ``ValueError`` where systemd could not carry it faithfully."""
    folders = {Path(launch.model_path).parent, launch.binary.parent, launch.binary.resolve().parent}
    if launch.projector_path:
        folders.add(Path(launch.projector_path).parent)
    return TransientService(
        name=unit_name(launch.model_id),
        description=f"llama-server for {launch.display_name}",
        argv=argv_of(launch),
        environment=environment_of(launch),
        slice=SLICE,
        syslog_identifier=unit_name(launch.model_id).removesuffix(".service"),
        log_extra_fields={"MAGI_MODEL": launch.model_id},
        restart=Restart.ON_FAILURE,
        restart_sec=_RETRY_PAUSE,
        start_limit_interval_sec=_RETRY_WINDOW,
        start_limit_burst=_QUICK_RETRIES + 1,
        timeout_start_sec=_START_TIMEOUT,
        timeout_stop_sec=launch.stop_timeout,
        # A user's manager runs everything as that user.
        user=launch.user if scope is Scope.SYSTEM else None,
        dynamic_user=launch.user is None and scope is Scope.SYSTEM,
        read_only_paths=tuple(PurePosixPath(path) for path in sorted({*folders, *launch.readable_folders})),
    )


class DirectLauncher:
    """Talks to systemd with the agent's own rights."""

    def __init__(self, manager: SystemdManager) -> None:
        self._manager = manager

    async def start(self, launch: LaunchSpecification) -> JobResult:
        """Make and start the unit of one model."""
        try:
            service = service_of(launch, self._manager.scope)
            await self.clear(launch.model_id)
            return await self._manager.start_transient(service, timeout=_START_TIMEOUT + 5)
        except ValueError as error:
            raise ModelNotUsable(
                f"systemd cannot run model {launch.model_id}: {error}",
                {"modelId": launch.model_id},
            ) from None

    async def stop(self, model_id: str, stop_timeout: float) -> JobResult:
        """Stop a model's unit."""
        try:
            # After SIGKILL systemd waits as long again before it gives up on what is left.
            return await self._manager.stop(unit_name(model_id), timeout=2 * stop_timeout + 5)
        except NoSuchUnit:
            await self._manager.refresh(unit_name(model_id))
            return JobResult.DONE

    async def clear(self, model_id: str) -> None:
        """Forget that a model's unit failed."""
        try:
            await self._manager.reset_failed(unit_name(model_id))
        except NoSuchUnit:
            await self._manager.refresh(unit_name(model_id))
