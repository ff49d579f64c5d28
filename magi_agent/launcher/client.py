"""The agent's side: a launcher that asks the privileged one, and then looks at what came of it."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from magi_agent.errors import ModelNotUsable, ProbeFailed
from magi_agent.launcher.messages import MAX_ANSWER, Refused, Unreachable, read_answer, written_request
from magi_agent.runtime_settings.reading import written
from magi_agent.servers.launch import LaunchSpecification, unit_name
from magi_agent.servers.launcher import described
from magi_agent.servers.questions import Question
from magi_agent.systemd.errors import BusError
from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager

DEFAULT_SOCKET: Final = Path("/run/magi-launcher/launcher.sock")
_CONNECT: Final = 10.0
"""Seconds for the launcher to take the question; systemd may have to start it first."""
_START: Final = 60.0
"""Seconds; a binary that was never asked for its options is asked first."""
_CLEAR: Final = 20.0
_PROBE: Final = 60.0
_BEYOND_STOP: Final = 20.0


class RemoteLauncher:
    """Asks the launcher at a unix socket. What it does is the same as ``DirectLauncher`` does."""

    def __init__(self, manager: SystemdManager, path: Path) -> None:
        """``manager`` only looks; ``path`` is where the launcher listens."""
        self._manager = manager
        self._path = path

    def reconfigure(self, user: str | None) -> None:
        """Do nothing: the launcher reads the operator's configuration itself."""

    async def start(self, launch: LaunchSpecification) -> JobResult:
        """Have the unit of one model made and started."""
        try:
            # What systemd cannot carry is said before anybody else is asked.
            _ = await described(launch, self._manager.scope)
        except ValueError as error:
            raise ModelNotUsable(
                f"systemd cannot run model {launch.model_id}: {error}", {"modelId": launch.model_id}
            ) from None
        request = written_request(
            "start",
            model_id=launch.model_id,
            display_name=launch.display_name,
            model_path=launch.model_path,
            projector_path=launch.projector_path,
            port=launch.port,
            settings=written(launch.runtime_settings),
            # A launcher from before an upgrade, which knows no such fields, may still be up.
            **({"devices": launch.devices} if launch.devices else {}),
            **({"is_fitted": True} if launch.is_fitted else {}),
            **({"memory_limits": _derived_of(launch)} if launch.memory_limits else {}),
        )
        try:
            return await self._job(request, launch.model_id, _START)
        except Refused as error:
            raise ModelNotUsable(
                f"the launcher does not start model {launch.model_id}: {error}", {"modelId": launch.model_id}
            ) from None

    async def stop(self, model_id: str, stop_timeout: float) -> JobResult:
        """Have a model's unit stopped; returns when nothing of it runs."""
        request = written_request("stop", model_id=model_id)
        try:
            return await self._job(request, model_id, 4 * stop_timeout + _BEYOND_STOP)
        except Refused as error:
            raise Unreachable(f"the launcher does not stop {model_id}: {error}") from None

    async def clear(self, model_id: str) -> None:
        """Have it forgotten that a model's unit failed."""
        try:
            _ = await self._job(written_request("clear", model_id=model_id), model_id, _CLEAR)
        except Refused as error:
            raise Unreachable(f"the launcher does not clear {model_id}: {error}") from None

    async def probe(self, binary: Path) -> str:
        """What ``binary --help`` prints."""
        return await self.answer_of(Question.OPTIONS, binary)

    async def answer_of(self, question: Question, binary: Path | None = None) -> str:
        """What is printed where a question is asked in a unit with the servers' sandbox."""
        request = written_request("probe", question=question, binary=binary and os.fspath(binary))
        try:
            answer = await self._ask(request, _PROBE)
        except Refused as error:
            raise ProbeFailed(f"the launcher does not ask {binary or question.of}: {error}") from None
        return str(answer.get("text", ""))

    async def _job(self, request: bytes, model_id: str, seconds: float) -> JobResult:
        try:
            answer = await self._ask(request, seconds)
        finally:
            # Signals about the unit may still be on their way; and where there is no answer, who knows what was done.
            with contextlib.suppress(BusError):
                await self._manager.refresh(unit_name(model_id))
        return JobResult(str(answer.get("result")))

    async def _ask(self, request: bytes, seconds: float) -> dict[str, object]:
        try:
            async with asyncio.timeout(_CONNECT):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=MAX_ANSWER)
        except TimeoutError:
            raise self._unreachable("it does not answer") from None
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from None
        try:
            async with asyncio.timeout(seconds):
                writer.write(request)
                line = await reader.readline()
        except TimeoutError:
            raise Unreachable(f"the launcher did not answer within {seconds:.0f} s") from None
        except (OSError, ValueError) as error:
            raise Unreachable(f"the launcher did not answer: {error}") from None
        finally:
            writer.close()
        return read_answer(line)

    def _unreachable(self, why: str) -> Unreachable:
        return Unreachable(
            f"the launcher cannot be reached at {self._path}: {why}; see: systemctl status magi-launcher.socket"
        )


def _derived_of(launch: LaunchSpecification) -> dict[str, int | None] | None:
    """The limits of memory that the settings do not say already."""
    limits, said = launch.memory_limits, launch.runtime_settings
    if limits is None:
        return None
    return {
        "high": limits.high if said.memory_high is None else None,
        "max": limits.max if said.memory_max is None else None,
    }
