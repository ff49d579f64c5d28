"""Keeps a registry in step with a folder in a process of its own, to be stopped, limited or stripped of rights.

    python -m tests.discovery.watching_process FOLDER STATE_FOLDER INTERVAL [--user UID] [--watches COUNT]

It prints a line of JSON whenever something is new, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.registry.kept_inventory import eventually, keeping

_WATCH_LIMIT = Path("/proc/sys/user/max_inotify_watches")  # of this user namespace


class Watching:
    """The process, as its last line told it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.now: dict[str, Any] = {"ids": []}
        self.log = b""

    @property
    def ids(self) -> list[str]:
        ids: list[str] = self.now["ids"]
        return ids

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        def holds() -> bool:
            assert self.process.returncode is None, self.log.decode()
            return condition()

        await eventually(holds, f"{what}; it told {self.now}, {self.log.decode()}", seconds)

    async def read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.now = json.loads(line)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line


@asynccontextmanager
async def watching(
    folder: Path, state: Path, *options: str, interval: float = 3600.0, prefix: tuple[str, ...] = ()
) -> AsyncIterator[Watching]:
    """Run the process until the block is left; it watches when the block begins."""
    process = await asyncio.create_subprocess_exec(
        *prefix,
        *(sys.executable, "-m", "tests.discovery.watching_process", str(folder), str(state), str(interval), *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    kept = Watching(process)
    readers = [asyncio.create_task(kept.read()), asyncio.create_task(kept.read_log())]
    try:
        await kept.until(lambda: bool(kept.now.get("watches")), "it watches", 30)
        yield kept
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.gather(*readers)


async def _run(folder: Path, state: Path, interval: float) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def until_the_end_of_input() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=until_the_end_of_input, daemon=True).start()
    before = None
    async with keeping([folder], state, interval=interval) as kept:
        while not ended.is_set():
            unheard = sorted(kept.inventory._watch.unheard)
            line = json.dumps({"watches": True, "ids": kept.ids, "scans": kept.scanner.scans, "unheard": unheard})
            if line != before:
                before = line
                print(line, flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), 0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("interval", type=float)
    parser.add_argument("--user", type=int)
    parser.add_argument("--watches", type=int)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if asked.watches is not None:
        _WATCH_LIMIT.write_text(str(asked.watches))
    if asked.user is not None:
        os.setgroups([])
        os.setgid(asked.user)
        os.setuid(asked.user)
    asyncio.run(_run(asked.folder, asked.state, asked.interval))


if __name__ == "__main__":
    main()
