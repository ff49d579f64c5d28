"""The devices that each llama-server would compute on, as it says itself; asked again when it is another file.

A probe takes a fraction of a second and opens every GPU, so it is not repeated for figures of the moment.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from magi_agent.errors import MagiError
from magi_agent.host.listed_devices import ListedDevice, listed_devices
from magi_agent.servers.binaries import Binaries
from magi_agent.servers.questions import Question

_ASK_AGAIN: Final = 30.0
"""Seconds after which a binary that did not answer is asked again."""
_MOST_KEPT: Final = 16


class Answers(Protocol):
    """Runs a program for a moment."""

    async def answer_of(self, question: Question, binary: Path | None = None) -> str:
        """What is printed where a question is asked. Raises ``MagiError``."""


@dataclass(frozen=True, slots=True)
class BinaryDevices:
    """What one binary said."""

    devices: tuple[ListedDevice, ...]
    problem: str | None
    """Why it did not say; there are no devices then."""
    asked_at: datetime


@dataclass(frozen=True, slots=True)
class _Kept:
    identity: str
    said: BinaryDevices
    at: float
    """By the loop's clock."""


class Devices:
    """What is known of the devices of binaries."""

    def __init__(self, answers: Answers, binaries: Binaries) -> None:
        self._answers = answers
        self._binaries = binaries
        self._kept: dict[Path, _Kept] = {}
        self._turn = asyncio.Lock()

    def forget(self) -> None:
        """Ask anew for everything: the user of the probes may be another, or a GPU."""
        self._kept.clear()

    async def of(self, binary: Path, *, max_age: float | None = None) -> BinaryDevices:
        """The devices of a binary, from memory where that is not older than ``max_age`` seconds, if these are given."""
        async with self._turn:
            await self._binaries.look([binary])
            file = self._binaries.file(binary)
            if file is None:
                return BinaryDevices((), f"there is no {binary}", datetime.now(UTC))
            now = asyncio.get_running_loop().time()
            kept = self._kept.get(binary)
            if kept and kept.identity == file.identity:
                limit = max_age if max_age is not None else _ASK_AGAIN if kept.said.problem else None
                if limit is None or now - kept.at <= limit:
                    return kept.said
            said = await self._ask(binary)
            self._kept.pop(binary, None)
            while len(self._kept) >= _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[binary] = _Kept(file.identity, said, asyncio.get_running_loop().time())
            return said

    async def _ask(self, binary: Path) -> BinaryDevices:
        try:
            text = await self._answers.answer_of(Question.DEVICES, binary)
        except MagiError as error:
            return BinaryDevices((), error.message, datetime.now(UTC))
        found = listed_devices(text)
        problem = f"{binary} --list-devices prints no list of devices" if found is None else None
        return BinaryDevices(found or (), problem, datetime.now(UTC))
