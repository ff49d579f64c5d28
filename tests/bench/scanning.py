"""Scans folders of models in a process of its own and prints what that took, as JSON.

    python -m tests.bench.scanning first|again|reference FOLDER ROUNDS

`first`: one scan that reads every header, beside the floor of reading the headers' bytes and summing them up.
`again`: scans and looks that find nothing or one file changed, merged into a registry that is saved as the agent's is,
beside the floor of listing the folders and asking for each file's state. `reference`: opens ROUNDS of the files by
`gguf.GGUFReader`. Times are processor time of all threads, in milliseconds: other work on the machine is not in them,
and the files are in the page cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_TICK_NS = 1_000_000_000


def first(folder: Path, _rounds: int) -> dict[str, Any]:
    """Scan once with nothing known."""
    from magi_agent.discovery.scanner import Scanner
    from magi_agent.vocabulary import ModelStatus

    files = _model_files(folder)
    floor, _ = _measured(lambda: [_checksum(path) for path in files])
    with tempfile.TemporaryDirectory(prefix="magi-bench-scanning-") as state:
        scanner = Scanner([folder], cache_path=Path(state, "headers.json"))
        milliseconds, result = _measured(scanner.scan)
    return {
        "models": sum(model.status is ModelStatus.OK for model in result.models),
        "perModel": milliseconds / len(files),
        "floorPerModel": floor / len(files),
    }


def again(folder: Path, rounds: int) -> dict[str, Any]:
    """Scan and look again, with nothing changed and with one file changed."""
    return asyncio.run(_again(folder, rounds))


async def _again(folder: Path, rounds: int) -> dict[str, Any]:
    from magi_agent.discovery.scanner import Scanner, ScanResult
    from magi_agent.events import EventStream
    from magi_agent.gguf.reading import read_facts
    from magi_agent.registry.registry import Registry

    files = _model_files(folder)
    changing = files[len(files) // 2]
    took: dict[str, list[float]] = {
        key: [] for key in ("unchanged", "floor", "scanChanged", "lookChanged", "lookUnchanged", "header")
    }
    with tempfile.TemporaryDirectory(prefix="magi-bench-scanning-") as state:
        registry = Registry(Path(state, "registry.json"), EventStream())
        await registry.load()
        scanner = Scanner([folder], cache_path=Path(state, "headers.json"))
        headers_read = set()

        async def merged(look: Callable[[], ScanResult]) -> float:
            """Do what the agent does at a scan, or at an event; return what it took."""
            began = time.process_time()
            result = await asyncio.to_thread(look)
            await registry.merge(result.models, ())
            took = (time.process_time() - began) * 1e3
            headers_read.add(result.headers_read)
            return took

        await merged(scanner.scan)
        for number in range(1 + rounds):
            if number == 1:
                # The first of each comes before those that count.
                headers_read.clear()
                for values in took.values():
                    values.clear()
            took["unchanged"].append(await merged(scanner.scan))
            took["floor"].append(_measured(lambda: _states_of(folder))[0])
            took["header"].append(_measured(lambda: read_facts(changing))[0])
            _touch(changing, 2 * number)
            took["scanChanged"].append(await merged(scanner.scan))
            _touch(changing, 2 * number + 1)
            took["lookChanged"].append(await merged(lambda: scanner.refresh([str(changing)])))
            took["lookUnchanged"].append(_measured(lambda: scanner.refresh([str(changing)]))[0])
        if headers_read != {0, 1} or len(registry.models) != len(files):
            raise RuntimeError(f"{len(registry.models)} models of {len(files)}, {headers_read} headers read at a time")
    more_at_scan = [
        changed - unchanged - header
        for changed, unchanged, header in zip(took["scanChanged"], took["unchanged"], took["header"], strict=True)
    ]
    more_at_event = [changed - header for changed, header in zip(took["lookChanged"], took["header"], strict=True)]
    return {"models": len(files), **took, "moreAtScan": more_at_scan, "moreAtEvent": more_at_event}


def reference(folder: Path, rounds: int) -> dict[str, Any]:
    """Open some of the files by the reference reader."""
    import gguf

    milliseconds = [_measured(partial(gguf.GGUFReader, path))[0] for path in _model_files(folder)[:rounds]]
    return {"perModel": statistics.mean(milliseconds)}


def _model_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.gguf"))


def _measured(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return (time.process_time() - began) * 1e3, result


def _checksum(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return zlib.crc32(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)


def _states_of(folder: Path) -> int:
    return sum(os.stat(os.path.join(below, name)).st_size for below, _, names in os.walk(folder) for name in names)  # noqa: PTH116, PTH118


def _touch(path: Path, number: int) -> None:
    """Give the file another modification time, of long ago: what changed just now is looked at again anyway."""
    os.utime(path, ns=(0, (1 + number) * _TICK_NS))


def main() -> None:
    """Scan as the command line says."""
    what, folder, rounds = sys.argv[1:]
    json.dump({"first": first, "again": again, "reference": reference}[what](Path(folder), int(rounds)), sys.stdout)


if __name__ == "__main__":
    main()
