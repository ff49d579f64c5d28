"""The launcher's process: takes questions from a socket, one a connection, and ends when nobody asks for a while."""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

from magi_agent.errors import ConfigurationError, MagiError
from magi_agent.launcher.checks import check, check_binary
from magi_agent.launcher.messages import (
    MAX_REQUEST,
    ClearRequest,
    ProbeRequest,
    Refused,
    Request,
    StartRequest,
    StopRequest,
    read_request,
    written_answer,
    written_error,
)
from magi_agent.runtime_settings.reading import InvalidRuntimeSettings, read_settings
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.launch import Wanted, specification_of
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.servers.memory_limits import MemoryLimits
from magi_agent.servers.questions import PROBE_PATTERN
from magi_agent.settings.settings import Settings
from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import Scope

_LOG: Final = logging.getLogger(__name__)
_UCRED: Final = struct.Struct("=iII")  # of unix(7): process, user, group
_MOST: Final = 32
"""Connections at once; the agent asks for a few."""
_LONGEST_SENTENCE: Final = 1000
_PATIENCE: Final = 5.0
"""Seconds for a caller to say what it wants, for it to take the answer, and for systemd to be reached."""
_TURNS_TO_BE_KNOWN: Final = 6
"""Turns of the loop, and some to spare, that asyncio takes to make a task of what it accepted."""
_LINGER: Final = 1.0
"""Seconds that one stays who cannot read its configuration: systemd gives a socket up that starts too many."""


class LauncherService:
    """Answers those who may ask."""

    def __init__(
        self,
        listener: socket.socket,
        read_configuration: Callable[[], Settings],
        scope: Scope,
        callers: Collection[int],
        state_directory: Path,
        idle_seconds: float,
    ) -> None:
        """``callers`` are the users (uids) that may ask; ``state_directory`` keeps what binaries said of themselves."""
        self._listener = listener
        self._read_configuration = read_configuration
        self._callers = callers
        self._idle_seconds = idle_seconds
        # None of the servers' units is followed: whoever asks does that.
        self._manager = SystemdManager(scope, pattern=PROBE_PATTERN)
        self._launcher = DirectLauncher(self._manager, state_directory)
        self._binaries = Binaries(self._launcher, state_directory / "binaries.json")
        self._asking: set[asyncio.Task[None]] = set()
        self._rested = asyncio.Event()
        self.end = asyncio.Event()
        """To be set from outside: what was begun is brought to its end, and nothing else is begun."""

    async def run(self) -> None:
        """Serve until nobody has asked for a while, or the end is asked for."""
        await self._binaries.load()
        async with self._manager:
            # Not start_unix_server: from Python 3.13 on that removes the socket's file in the end, which is systemd's.
            server = await asyncio.start_server(self._take, sock=self._listener, limit=MAX_REQUEST)
            while not self.end.is_set() and await self._was_asked():
                pass
            # The socket itself is systemd's: who comes now waits there, and has a new launcher started.
            asyncio.get_running_loop().remove_reader(self._listener)
            for _ in range(_TURNS_TO_BE_KNOWN):
                await asyncio.sleep(0)
            server.close()
            while self._asking:
                _ = await asyncio.wait(self._asking)

    async def _was_asked(self) -> bool:
        """Wait for a while without questions, or for the end; tell whether there may be more to come."""
        self._rested.clear()
        waiting = [asyncio.create_task(event.wait()) for event in (self._rested, self.end)]
        done, pending = await asyncio.wait(waiting, timeout=self._idle_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return bool(done or self._asking)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # this runs in one
        self._asking.add(task)
        try:
            with contextlib.closing(writer):
                answer = await self._answer(reader, writer)
                async with asyncio.timeout(_PATIENCE):
                    writer.write(answer)
                    await writer.drain()
        except (OSError, TimeoutError):
            _LOG.debug("a caller left before it was answered")
        finally:
            self._asking.discard(task)
            self._rested.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        channel: socket.socket = writer.get_extra_info("socket")
        pid, uid, _ = _UCRED.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        try:
            if uid not in self._callers:
                raise Refused(f"user {uid} may not ask anything here")
            if len(self._asking) > _MOST:
                raise Refused(f"more than {_MOST} questions at once")
            try:
                async with asyncio.timeout(_PATIENCE):
                    line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError:
                raise Refused(f"a request has at most {MAX_REQUEST} bytes") from None
            except (asyncio.IncompleteReadError, TimeoutError):
                raise Refused("a request is one whole line, sent at once") from None
            return await self._carry_out(read_request(line))
        except MagiError as error:
            _LOG.warning("not done for user %d (process %d): %s", uid, pid, error)
            return written_error(error)

    async def _carry_out(self, request: Request) -> bytes:
        # As it is now: what the operator took out of it is not to be had any more.
        try:
            settings = await asyncio.to_thread(self._read_configuration)
        except ConfigurationError:
            # What is wrong may be a variable, which only the next launcher has anew.
            asyncio.get_running_loop().call_later(_LINGER, self.end.set)
            raise
        self._launcher.reconfigure(settings.llama_server_user or None)
        await self._manager.wait_connected(_PATIENCE)
        match request:
            case StartRequest():
                return await self._start(request, settings)
            case StopRequest(model_id=model_id):
                _LOG.info("stopping %s", model_id, extra={"magi_model": model_id})
                return written_answer(result=await self._launcher.stop(model_id, settings.stop_timeout))
            case ClearRequest(model_id=model_id):
                await self._launcher.clear(model_id)
                return written_answer(result="done")
            case ProbeRequest(question=question, binary=binary):
                if question.needs_binary is not (binary is not None):
                    raise Refused(f"who asks for {question.of} names {'a' if question.needs_binary else 'no'} binary")
                path = None if binary is None else check_binary(binary, settings)
                return written_answer(text=await self._launcher.answer_of(question, path))

    async def _start(self, request: StartRequest, settings: Settings) -> bytes:
        try:
            runtime = read_settings(request.settings)
        except InvalidRuntimeSettings as error:
            raise Refused(f"settings: {error}"[:_LONGEST_SENTENCE]) from None
        binary = settings.binary(runtime.binary)
        if binary is None:
            raise Refused(f"{runtime.binary!r} is no binary of servers.llama_server_alternatives")
        wanted = Wanted(
            request.model_id,
            request.display_name,
            request.model_path,
            request.projector_path,
            request.port,
            runtime,
            request.devices,
            request.is_fitted,
        )
        known = await self._binaries.ask(binary)
        await asyncio.to_thread(check, wanted, settings, known)
        file = self._binaries.file(binary)
        launch = specification_of(wanted, settings, known, file.identity if file else None)
        if request.memory_limits is not None:
            derived = request.memory_limits
            limits = MemoryLimits(runtime.memory_high or derived.high, runtime.memory_max or derived.max)
            launch = replace(launch, memory_limits=limits)
        _LOG.info(
            "starting %s from %s on port %d", launch.model_id, launch.model_path, launch.port,
            extra={"magi_model": launch.model_id},
        )  # fmt: skip
        return written_answer(result=await self._launcher.start(launch))
