"""Files that arrive while the agent runs: how soon each is in its answers, and what a large copy costs it meanwhile.

A file arrives renamed into the folder, copied into it, or into space that was reserved for it before (as download
programs do). The delay counts from its last byte to the first answer of the API that calls it whole, asked every few
milliseconds. Beside it stands a program that does nothing but hear of changes by watchfiles (bare_watch.py); it knows
of a path, and not whether the file is whole. A copy of 40 GB is simulated: a header that asks for as much, then a
write of a page for each megabyte, evenly over the time that a fast disk takes. Once the file grows with it, and once
it has its whole size from the start.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import gguf
import numpy
from locations import CHECKOUT, LLAMA_SERVER
from toy_model import write_toy_model

from tests.agent_process import AgentProcess, ended
from tests.bench.figures import at_most, print_rows, print_targets, shown, spread_of
from tests.bench.many_models import write_models
from tests.bench.ports import free_ports
from tests.bench.process_figures import cpu_seconds

MODELS = 1000
ARRIVALS = 15
COPY_GIGABYTES = 40
COPY_SECONDS = 20.0
_MEGABYTE = 1_000_000
_PAGE = bytes(4096)
_CHUNK = 65_536
_ASK_EVERY = 0.003
_VISIBLE_SECONDS = 60.0
_APART_SECONDS = 0.5  # between arrivals: more than any batch of events takes
_RESERVED_SECONDS = 1.0  # that the first half of a reserved file lies there alone
_SETTLE_SECONDS = 120.0


def measure(
    models: int = MODELS,
    arrivals: int = ARRIVALS,
    copy_gigabytes: int = COPY_GIGABYTES,
    copy_seconds: float = COPY_SECONDS,
) -> dict[str, Any]:
    """Have files arrive, then one large copy. Beside a systemd user manager only."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-watching-") as name:
        folder = Path(name)
        write_models(folder / "models", models)
        arriving = folder / "models" / "arriving"
        arriving.mkdir()
        (port,) = free_ports(1)
        agent = AgentProcess(folder, folder / "models", (port, port), LLAMA_SERVER.resolve())
        with ended(agent, "magi-llama-none-of-this-benchmark.service"), _BareWatch.running(folder / "models") as bare:
            agent.start()
            agent.wait_settled(_SETTLE_SECONDS)
            ways = {"renamed": _rename, "copied": _copy, "reserved": _fill_reserved}
            delays = {way: _arrivals(agent, bare, arriving, way, arrive, arrivals) for way, arrive in ways.items()}
            copies = _large_copies(agent, bare, arriving, copy_gigabytes, copy_seconds)
            agent.stop()
    heard = [milliseconds for way in delays.values() for milliseconds in way["heard"]]
    spreads = {way: spread_of(delay["visible"]) for way, delay in delays.items()}
    return {
        "models": models,
        "visible": spreads,
        "heard": spread_of(heard),
        "copies": copies,
        "targets": [
            at_most("renamed, worst", spreads["renamed"]["highest"], 500, "ms"),
            at_most("copied, worst", spreads["copied"]["highest"], 500, "ms"),
            at_most("written into reserved space, worst", spreads["reserved"]["highest"], 5000, "ms"),
            at_most(
                "processor time during a growing copy, beyond idle", copies["growing"]["percentBeyondIdle"], 1, "%"
            ),
            at_most(
                "into reserved space, beyond idle, by what watchfiles takes", copies["reserved"]["times"], 2, "times"
            ),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print the delays and the cost of the copy, then the targets."""
    visible, copies = figures["visible"], figures["copies"]
    print(
        f"from a file's last byte to the answer that has it, {figures['models']:,} models there; "
        "ms, median (lowest to highest)"
    )
    rows = [[way, shown(spread, 0), str(spread["runs"])] for way, spread in visible.items()]
    rows.append(["watchfiles alone has heard of it", shown(figures["heard"], 0), str(figures["heard"]["runs"])])
    print_rows(["", "ms", "files"], rows)
    growing, reserved, idle = copies["growing"], copies["reserved"], copies["idle"]
    print(
        f"copy of {copies['gigabytes']} GB in {growing['seconds']:.0f} s, {copies['writes']:,} writes; processor time"
    )
    print_rows(
        ["", "agent", "watchfiles alone"],
        [
            ["idle as long, ms", *(f"{idle[name] * 1e3:.0f}" for name in ("agent", "bare"))],
            ["during a growing copy, ms", *(f"{growing[name] * 1e3:.0f}" for name in ("agent", "bare"))],
            ["during one into reserved space, ms", *(f"{reserved[name] * 1e3:.0f}" for name in ("agent", "bare"))],
            [
                "growing, beyond idle, ms a GB",
                *(f"{growing[key]:.2f}" for key in ("msPerGigabyte", "bareMsPerGigabyte")),
            ],
            [
                "reserved, beyond idle, ms a GB",
                *(f"{reserved[key]:.2f}" for key in ("msPerGigabyte", "bareMsPerGigabyte")),
            ],
        ],
    )
    print_targets(figures["targets"])


class _BareWatch:
    """A running bare_watch.py, and what it has told."""

    def __init__(self, pid: int, told: IO[bytes], selector: selectors.BaseSelector) -> None:
        self.pid = pid
        self._told = told
        self._selector = selector
        os.set_blocking(told.fileno(), False)
        selector.register(told, selectors.EVENT_READ)

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[_BareWatch]:
        """Run one until the block is left; begins when it watches."""
        command = [sys.executable, "-m", "tests.bench.bare_watch", str(folder)]
        with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                with selectors.DefaultSelector() as selector:
                    yield cls(process.pid, process.stdout, selector)
            finally:
                process.kill()

    def tells_of(self, name: bytes, seconds: float) -> bool:
        """Whether it tells of a file within `seconds`; what it tells of others is passed over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._selector.select(left)
            if name in (self._told.read() or b""):
                return True
        return False


def _arrivals(
    agent: AgentProcess,
    bare: _BareWatch,
    folder: Path,
    way: str,
    arrive: Callable[[bytes, Path], float],
    count: int,
) -> dict[str, list[float]]:
    visible: list[float] = []
    heard: list[float] = []
    for number in range(count):
        path = folder / f"bench-watching-{way}-{number}.gguf"
        made = write_toy_model(folder.parent.parent / "made.gguf", name=path.stem, seed=number)
        content = made.read_bytes()
        made.unlink()
        time.sleep(_APART_SECONDS)
        bare.tells_of(path.name.encode(), 0.001)
        complete = arrive(content, path)
        asked = f"/api/models/{path.stem}"
        deadline = complete + _VISIBLE_SECONDS
        is_heard = False
        while True:
            answer = agent.ask("GET", asked)
            now = time.monotonic()
            if not is_heard and bare.tells_of(path.name.encode(), 0.001):
                is_heard = True
                heard.append((time.monotonic() - complete) * 1e3)
            if answer.status == 200 and answer.body["status"] == "ok":
                visible.append((now - complete) * 1e3)
                break
            if now > deadline:
                raise RuntimeError(f"{path.name} is not visible: {answer}")
            time.sleep(_ASK_EVERY)
        path.unlink()
    return {"visible": visible, "heard": heard}


def _rename(content: bytes, path: Path) -> float:
    """Write a file elsewhere and rename it to `path`; return when it was there, by time.monotonic()."""
    outside = path.parents[2] / path.name
    outside.write_bytes(content)
    outside.rename(path)
    return time.monotonic()


def _copy(content: bytes, path: Path) -> float:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(content), _CHUNK):
            file.write(content[begin : begin + _CHUNK])
        return time.monotonic()


def _fill_reserved(content: bytes, path: Path) -> float:
    half = len(content) // 2
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        file.write(content[:half])
        time.sleep(_RESERVED_SECONDS)
        file.write(content[half:])
        return time.monotonic()


def _large_copies(
    agent: AgentProcess, bare: _BareWatch, folder: Path, gigabytes: int, seconds: float
) -> dict[str, Any]:
    """Return the processor time that copies cost both programs, in seconds and beyond what they take idle."""
    assert agent.process is not None
    pids = {"agent": agent.process.pid, "bare": bare.pid}
    path = folder / "bench-watching-large.gguf"
    time.sleep(_APART_SECONDS)
    idle = _taken(pids, lambda: time.sleep(seconds))
    copies: dict[str, Any] = {"gigabytes": gigabytes, "writes": gigabytes * 1000, "idle": idle}
    for kind, is_reserved in (("growing", False), ("reserved", True)):
        took = _taken(pids, partial(_write_slowly, path, gigabytes, seconds, is_reserved=is_reserved))
        path.unlink()
        # What the end of a copy costs is not the next one's.
        time.sleep(_APART_SECONDS)
        beyond = {name: took[name] - idle[name] * took["seconds"] / idle["seconds"] for name in pids}
        copies[kind] = {
            **took,
            "percentBeyondIdle": beyond["agent"] / took["seconds"] * 100,
            "msPerGigabyte": beyond["agent"] / gigabytes * 1e3,
            "bareMsPerGigabyte": beyond["bare"] / gigabytes * 1e3,
            "times": beyond["agent"] / beyond["bare"],
        }
    return copies


def _taken(pids: dict[str, int], work: Callable[[], None]) -> dict[str, float]:
    before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    work()
    return {
        "seconds": time.monotonic() - began,
        **{name: cpu_seconds(pid) - before[name] for name, pid in pids.items()},
    }


def _write_slowly(path: Path, gigabytes: int, seconds: float, *, is_reserved: bool) -> None:
    began = time.monotonic()
    _write_header(path, gigabytes)
    writes = gigabytes * 1000
    with path.open("r+b", buffering=0) as file:
        if is_reserved:
            file.truncate((writes + 1) * _MEGABYTE)
        for number in range(1, writes + 1):
            os.pwrite(file.fileno(), _PAGE, number * _MEGABYTE)
            ahead = began + seconds * number / writes - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)


def _write_header(path: Path, gigabytes: int) -> None:
    """Write the header of a model whose one tensor takes so many gigabytes, and nothing of the tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    columns = 1000
    rows = gigabytes * 1000 * _MEGABYTE // columns // 4
    writer.add_tensor_info("token_embd.weight", (rows, columns), numpy.dtype(numpy.float32), rows * columns * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
