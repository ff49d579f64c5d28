"""An inventory with its registry over real folders, and waits for what it lists."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from magi_agent.discovery.scanner import Scanner, ScanResult
from magi_agent.errors import RescanFailed
from magi_agent.events import EventStream
from magi_agent.registry.inventory import Inventory
from magi_agent.registry.registry import Registry
from magi_agent.vocabulary import ModelStatus

LONG = 3600.0


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


async def seconds_until_seen(complete: Callable[[], object], seen: Callable[[], bool], limit: float = 15.0) -> float:
    """How long it takes, in seconds, from the end of ``complete``, whose last act completes a file, until ``seen``."""
    await asyncio.to_thread(complete)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not seen():
        assert loop.time() < began + limit, f"not seen within {limit:g} s"
        await asyncio.sleep(0.002)
    return loop.time() - began


class CountingScanner(Scanner):
    """A scanner that counts its looks; it looks as ever."""

    scans = 0
    refreshes = 0
    headers = 0

    def scan(self) -> ScanResult:
        self.scans += 1
        return self._counted(super().scan())

    def refresh(self, paths: Iterable[str]) -> ScanResult:
        self.refreshes += 1
        return self._counted(super().refresh(paths))

    def _counted(self, result: ScanResult) -> ScanResult:
        self.headers += result.headers_read
        return result


class Kept:
    """An inventory, with its registry and scanner."""

    def __init__(self, folders: list[Path], state: Path, interval: float) -> None:
        self.running: set[str] = set()
        self.scanner = CountingScanner(folders)
        self.registry = Registry(state / "registry.json", EventStream())
        self.inventory = Inventory(self.scanner, self.registry, lambda: self.running, interval)

    @property
    def ids(self) -> list[str]:
        return sorted(self.registry.models)

    def lists(self, *ids: str) -> Callable[[], bool]:
        """Whether exactly these models are listed."""
        return lambda: self.ids == sorted(ids)

    def has(self, *ids: str) -> Callable[[], bool]:
        """Whether these models are listed, among others."""
        return lambda: self.registry.models.keys() >= set(ids)

    def has_paths(self, paths: set[str]) -> Callable[[], bool]:
        """Whether exactly these files are listed."""
        return lambda: {model.facts.file_path for model in self.registry.models.values()} == paths

    def is_whole(self, model_id: str) -> Callable[[], bool]:
        return lambda: self.status(model_id) is ModelStatus.OK

    def status(self, model_id: str) -> ModelStatus | None:
        model = self.registry.models.get(model_id)
        return model.facts.status if model else None


@asynccontextmanager
async def keeping(folders: list[Path], state: Path, *, interval: float = LONG) -> AsyncIterator[Kept]:
    """Run an inventory until the block is left; it watches when the block begins."""
    kept = Kept(folders, state, interval)
    await kept.registry.load()
    with contextlib.suppress(RescanFailed):
        await kept.inventory.rescan()
    task = asyncio.create_task(kept.inventory.run())
    try:
        if any(folder.is_dir() for folder in folders):
            await eventually(lambda: kept.scanner.scans >= 2, "the scan after the watch has begun")
        yield kept
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
