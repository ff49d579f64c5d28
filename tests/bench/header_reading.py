"""Reads one GGUF header in a process of its own and prints what that took, as JSON.

    python -m tests.bench.header_reading agent|reference FILE REPEATS

Its time counts from the path to the facts (`agent`) or to the open reader (`reference`, whose facts come after).
Its memory is the growth of the peak of resident memory (VmHWM of /proc/self/status, see proc(5)), from just before
the first reading until its end: pages of the file that the reference maps are in it, pages in the kernel's cache not.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

_RESET_PEAK = "5"  # to /proc/self/clear_refs: the peak of resident memory begins anew


def read_by_agent(path: str, repeats: int) -> dict[str, Any]:
    """Read by our reader: once, then `repeats` times more."""
    from magi_agent.gguf.reading import read_facts

    before = _reset_peak()
    began = time.perf_counter()
    facts = read_facts(path)
    milliseconds = (time.perf_counter() - began) * 1e3
    grown = _resident("VmHWM") - before
    again = []
    for _ in range(repeats):
        began = time.perf_counter()
        read_facts(path)
        again.append((time.perf_counter() - began) * 1e3)
    return {"milliseconds": milliseconds, "millisecondsAgain": again, "megabytes": grown / 1e6, "facts": asdict(facts)}


def read_by_reference(path: str, _repeats: int) -> dict[str, Any]:
    """Read by the reference reader, once: that takes many seconds, and a later reading just as many."""
    import gguf

    from tests.bench.reference_facts import reference_facts

    before = _reset_peak()
    began = time.perf_counter()
    reader = gguf.GGUFReader(path)
    milliseconds = (time.perf_counter() - began) * 1e3
    grown = _resident("VmHWM") - before
    return {"milliseconds": milliseconds, "megabytes": grown / 1e6, "facts": asdict(reference_facts(reader))}


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return _resident("VmRSS")


def _resident(key: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def main() -> None:
    """Read as the command line says."""
    reader, path, repeats = sys.argv[1:]
    read = {"agent": read_by_agent, "reference": read_by_reference}[reader]
    json.dump(read(path, int(repeats)), sys.stdout)


if __name__ == "__main__":
    main()
