"""Who makes and ends units: the reconciler knows a launcher by what it can do, not by where it runs.

``DirectLauncher`` asks systemd itself: in the user scope, where the agent owns its manager, and in the system scope
where the agent is privileged.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final, Protocol, TypedDict

from magi_agent.daemon_thread import in_daemon_thread
from magi_agent.errors import ModelNotUsable, ProbeFailed
from magi_agent.runtime_settings.known_options import MAX_HELP
from magi_agent.servers.driver_caches import cache_directories, cache_environment, cache_root
from magi_agent.servers.hidden_folders import hidden_folders
from magi_agent.servers.launch import SLICE, LaunchSpecification, unit_name
from magi_agent.servers.llama_server import KEY_SOURCE, argv_of, environment_of
from magi_agent.servers.questions import Question, argv_of_question, program_folders
from magi_agent.servers.reach import MAX_SOCKET_PATH, runtime_directory, runtime_root, socket_path
from magi_agent.servers.server_keys import CREDENTIAL, drop_keys, new_key
from magi_agent.servers.unit_limits import unit_limits
from magi_agent.systemd.errors import NoSuchUnit, UnitExists
from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.transient import Restart, TransientService
from magi_agent.vocabulary import Scope, ServerAccess

_LOG: Final = logging.getLogger(__name__)
_START_TIMEOUT: Final = 30.0
"""Seconds for systemd to execute the binary; loading the model comes after."""
_QUICK_RETRIES: Final = 3
_RETRY_PAUSE: Final = 1.0
_RETRY_WINDOW: Final = 60.0
_PROBE_TIMEOUT: Final = 20.0
_PROBE_STOP_TIMEOUT: Final = 2.0
_PROBE_FOLDER: Final = ".probe-"
_WARNING: Final = 4
"""Of syslog(3)'s levels."""


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

    async def probe(self, binary: Path) -> str:
        """What ``binary --help`` prints, run with the servers' sandbox. Raises ``BusError``, ``ProbeFailed``."""

    async def answer_of(self, question: Question, binary: Path | None = None) -> str:
        """What is printed where a question is asked, as the servers' user in their sandbox.

        ``binary`` is whom it is a question to, where it is one to a llama-server. Raises ``BusError``, ``ProbeFailed``.
        """


def service_of(launch: LaunchSpecification, scope: Scope, key_file: Path | None = None) -> TransientService:
    """The unit that a launch specification describes; ``ValueError`` where systemd could not carry it faithfully.

    ``key_file`` holds the key that is handed to a server which asks for one.
    """
    model_folder = Path(launch.model_path).parent
    folders = {*launch.readable_folders, *_folders_of(launch.binary)}
    is_systems = scope is Scope.SYSTEM
    if not is_systems:
        folders.add(model_folder)
        if launch.projector_path:
            folders.add(Path(launch.projector_path).parent)
    else:
        # The operator's folders and none that a request names: systemd follows links to what it shows, with the rights
        # of root, at each automatic restart again.
        # Links in a model folder may name the place that the folder itself is a link to.
        folders.update(folder.resolve() for folder in launch.readable_folders)
    shown = tuple(PurePosixPath(path) for path in sorted(folders))
    caches = cache_environment(cache_root(scope, dynamic_user=launch.user is None), launch.model_id)
    return TransientService(
        name=unit_name(launch.model_id),
        description=f"llama-server for {launch.display_name}",
        argv=argv_of(launch),
        environment=environment_of(launch) | caches | ({KEY_SOURCE: str(key_file)} if key_file else {}),
        load_credentials={CREDENTIAL: PurePosixPath(key_file)} if key_file else {},
        slice=SLICE,
        syslog_identifier=unit_name(launch.model_id).removesuffix(".service"),
        log_extra_fields={"MAGI_MODEL": launch.model_id},
        log_rate_limit_interval_sec=launch.log_rate_limit_interval,
        log_rate_limit_burst=launch.log_rate_limit_burst,
        restart=Restart.ON_FAILURE,
        restart_sec=_RETRY_PAUSE,
        start_limit_interval_sec=_RETRY_WINDOW,
        start_limit_burst=_QUICK_RETRIES + 1,
        timeout_start_sec=_START_TIMEOUT,
        timeout_stop_sec=launch.stop_timeout,
        # A user's manager runs everything as that user.
        user=launch.user if is_systems else None,
        dynamic_user=launch.user is None and is_systems,
        # systemd looks at the path as it is written, and a link in it leads to another mount.
        requires_mounts_for=tuple(sorted({PurePosixPath(model_folder), PurePosixPath(model_folder.resolve())}))
        if is_systems
        else (),
        read_only_paths=shown,
        hidden_folders=hidden_folders(shown) if is_systems else (),
        cache_directories=cache_directories(launch.model_id),
        **_folder_of_socket(launch, scope),
        **unit_limits(launch.runtime_settings, launch.model_path, launch.memory_limits),
    )


async def described(launch: LaunchSpecification, scope: Scope, key_file: Path | None = None) -> TransientService:
    """``service_of``, which looks at folders whose file system may not answer, without waiting for these."""
    return await in_daemon_thread(partial(service_of, launch, scope, key_file), "unit of a server")


class _SocketFolder(TypedDict, total=False):
    runtime_directory: str
    runtime_directory_mode: int
    umask: int


def _folder_of_socket(launch: LaunchSpecification, scope: Scope) -> _SocketFolder:
    """The folder that the server's socket is in; systemd makes it before each start, and removes it after each end."""
    if launch.access is not ServerAccess.SOCKET:
        return {}
    path = socket_path(launch.runtime_root, launch.model_id)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"{path} is longer than {MAX_SOCKET_PATH} bytes, which no unix socket's path is")
    folder = runtime_directory(launch.model_id)
    if scope is Scope.SYSTEM and launch.user:
        # The agent is another user, and a member of this one's group.
        return {"runtime_directory": folder, "runtime_directory_mode": 0o750, "umask": 0o007}
    return {"runtime_directory": folder, "runtime_directory_mode": 0o700}


def probe_of(
    binary: Path | None, output: Path, user: str | None, scope: Scope, question: Question = Question.OPTIONS
) -> TransientService:
    """The unit in which a question is asked, of a binary where it is one to it; what is printed goes to ``output``."""
    folders = program_folders() if binary is None else _folders_of(binary)
    shown = tuple(PurePosixPath(path) for path in sorted(folders))
    return TransientService(
        name=question.unit,
        description=f"{question.of} of {binary}" if binary else question.of,
        argv=argv_of_question(question, binary),
        # As the servers have it by their drop-in: without the nodes of NVIDIA's GPUs none would be found.
        wants=("magi-nvidia-uvm.service",) if question.needs_gpus and scope is Scope.SYSTEM else (),
        # It may be asked often, and three lines each time would bury what matters.
        log_level_max=_WARNING if question.needs_gpus else None,
        slice=SLICE,
        oneshot=True,
        collect=True,
        standard_output=PurePosixPath(output),
        timeout_start_sec=_PROBE_TIMEOUT,
        timeout_stop_sec=_PROBE_STOP_TIMEOUT,
        user=user if scope is Scope.SYSTEM else None,
        dynamic_user=user is None and scope is Scope.SYSTEM,
        read_only_paths=shown,
        hidden_folders=hidden_folders(shown) if scope is Scope.SYSTEM else (),
    )


def _folders_of(binary: Path) -> set[Path]:
    """Where a binary is, and where the file is that its path leads to, with its libraries."""
    return {binary.parent, binary.resolve().parent}


class DirectLauncher:
    """Talks to systemd with the agent's own rights."""

    def __init__(self, manager: SystemdManager, state_directory: Path, user: str | None = None) -> None:
        """``state_directory`` takes what probes print for a moment; ``user`` is whom they run as."""
        self._manager = manager
        self._state_directory = state_directory
        self._user = user
        self._asking = {question: asyncio.Lock() for question in Question}
        self._folders: set[Path] = set()
        self._one_folder = asyncio.Lock()

    def reconfigure(self, user: str | None) -> None:
        """Run probes as another user from now on."""
        self._user = user

    async def start(self, launch: LaunchSpecification) -> JobResult:
        """Make and start the unit of one model."""
        key_file = await self._new_key(launch)
        try:
            service = await described(launch, self._manager.scope, key_file)
            await self.clear(launch.model_id)
            result = await self._manager.start_transient(service, limit=_START_TIMEOUT + 5)
        except ValueError as error:
            await self._drop(key_file)
            raise ModelNotUsable(
                f"systemd cannot run model {launch.model_id}: {error}",
                {"modelId": launch.model_id},
            ) from None
        except UnitExists:
            # One that runs has a key of its own.
            await self._drop(key_file)
            raise
        await self._drop_keys(launch.model_id, keep=key_file)
        return result

    async def stop(self, model_id: str, stop_timeout: float) -> JobResult:
        """Stop a model's unit."""
        try:
            # systemd gives up on what survives SIGTERM, SIGKILL, and both of them once more.
            result = await self._manager.stop(unit_name(model_id), limit=4 * stop_timeout + 5)
        except NoSuchUnit:
            await self._manager.refresh(unit_name(model_id))
            result = JobResult.DONE
        if result.ok:
            await self._drop_keys(model_id)
        return result

    async def clear(self, model_id: str) -> None:
        """Forget that a model's unit failed."""
        try:
            await self._manager.reset_failed(unit_name(model_id))
        except NoSuchUnit:
            await self._manager.refresh(unit_name(model_id))

    async def _new_key(self, launch: LaunchSpecification) -> Path | None:
        if launch.access is not ServerAccess.KEY:
            return None
        try:
            return await asyncio.to_thread(new_key, launch.runtime_root, launch.model_id)
        except OSError as error:
            raise ModelNotUsable(
                f"no key can be written for model {launch.model_id}: {error}", {"modelId": launch.model_id}
            ) from None

    async def _drop(self, key_file: Path | None) -> None:
        if key_file is not None:
            await asyncio.to_thread(key_file.unlink, missing_ok=True)

    async def _drop_keys(self, model_id: str, *, keep: Path | None = None) -> None:
        """Remove the keys of servers that are no more."""
        try:
            await asyncio.to_thread(drop_keys, runtime_root(self._manager.scope), model_id, keep=keep)
        except OSError as error:
            _LOG.warning("an old key of %s stays: %s", model_id, error)

    async def probe(self, binary: Path) -> str:
        """What ``binary --help`` prints."""
        return await self.answer_of(Question.OPTIONS, binary)

    async def answer_of(self, question: Question, binary: Path | None = None) -> str:
        """What is printed where a question is asked in a unit with the servers' sandbox."""
        # One that hangs, as a driver may, holds up no other.
        async with self._asking[question]:
            try:
                folder = await self._new_folder()
            except OSError as error:
                raise ProbeFailed(f"nothing can be written to {self._state_directory}: {error.strerror}") from None
            try:
                output = folder / "output"
                try:
                    result = await self._run(probe_of(binary, output, self._user, self._manager.scope, question))
                except ValueError as error:
                    raise ProbeFailed(f"{binary or question.of} cannot be run by systemd: {error}") from None
                text = await asyncio.to_thread(_start_of, output)
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                self._folders.discard(folder)
        if not result.ok:
            last = text.strip().rpartition("\n")[2]
            asked = f"{binary} {question.option}" if binary else f"the question for {question.of}"
            raise ProbeFailed(f"{asked} failed" + (f": {last}" if last else "; can it be executed?"))
        return text

    async def _new_folder(self) -> Path:
        """Make a folder for what a probe prints; where nobody waits for it any more, the next probe removes it.

        Raises ``OSError``.
        """
        async with self._one_folder:
            folder = await asyncio.to_thread(_probe_folder, self._state_directory, frozenset(self._folders))
            self._folders.add(folder)
        return folder

    async def _run(self, unit: TransientService) -> JobResult:
        """Run a probe's unit to its end."""
        # After SIGKILL systemd waits as long again before it gives up on what is left.
        timeout = _PROBE_TIMEOUT + 2 * _PROBE_STOP_TIMEOUT + 5
        try:
            return await self._manager.start_transient(unit, limit=timeout)
        except UnitExists:
            # By an agent that was killed meanwhile.
            with contextlib.suppress(NoSuchUnit):
                await self._manager.stop(unit.name, limit=timeout)
            return await self._manager.start_transient(unit, limit=timeout)


def _probe_folder(state_directory: Path, in_use: Collection[Path]) -> Path:
    state_directory.mkdir(parents=True, exist_ok=True)
    for left in state_directory.glob(f"{_PROBE_FOLDER}*"):
        if left not in in_use:
            # By an agent that was killed meanwhile, or did not wait.
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=_PROBE_FOLDER, dir=state_directory))


def _start_of(output: Path) -> str:
    try:
        with output.open("rb") as file:
            return file.read(MAX_HELP).decode(errors="replace")
    except OSError:
        return ""
