"""The header of a model with a vocabulary of 262,144 tokens: our reader against `gguf.GGUFReader`.

Each reading that counts is the first of a fresh process, with the file in the page cache: the same for both. Beside
it our reader's later readings in one process, and its first with the file not in the page cache, for which there is
no target.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from locations import CHECKOUT, GEMMA

from tests.bench.figures import at_least, at_most, print_rows, print_targets, shown, spread_of
from tests.bench.reference_facts import NOT_COMPARED

_ROUNDS = 3
_OURS_PER_ROUND = 3
_REPEATS = 10
_READ_TIMEOUT = 300.0


def measure() -> dict[str, Any]:
    """Read in turns by both readers; return times in milliseconds, memory in bytes, and where the facts differ."""
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(_ROUNDS):
        _load_into_page_cache(GEMMA)
        ours += [_read("agent", _REPEATS) for _ in range(_OURS_PER_ROUND)]
        theirs.append(_read("reference", 0))
    cold = [_read("agent", 0)["milliseconds"] for _ in range(_ROUNDS) if _leave_page_cache(GEMMA)]
    agent: dict[str, Any] = {
        "milliseconds": spread_of(reading["milliseconds"] for reading in ours),
        "millisecondsAgain": spread_of(again for reading in ours for again in reading["millisecondsAgain"]),
        "millisecondsNotInPageCache": spread_of(cold) if cold else None,
        "megabytes": spread_of(reading["megabytes"] for reading in ours),
    }
    reference: dict[str, Any] = {
        "milliseconds": spread_of(reading["milliseconds"] for reading in theirs),
        "megabytes": spread_of(reading["megabytes"] for reading in theirs),
    }
    ratio = reference["milliseconds"]["median"] / agent["milliseconds"]["median"]
    differing = differences(ours[0]["facts"], theirs[0]["facts"])
    compared = len(ours[0]["facts"].keys() - NOT_COMPARED)
    return {
        "file": GEMMA.name,
        "agent": agent,
        "reference": reference,
        "ratio": ratio,
        "differingFacts": differing,
        "targets": [
            at_least("gguf.GGUFReader takes longer", ratio, 300, "times"),
            at_most("time of a first reading", agent["milliseconds"]["median"], 60, "ms"),
            at_most("growth of memory", agent["megabytes"]["highest"], 5, "MB"),
            at_most(f"facts that differ, of {compared}", len(differing), 0, ""),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print both readers beside each other, then the targets."""
    agent, reference = figures["agent"], figures["reference"]
    cold = agent["millisecondsNotInPageCache"]
    print(f"header of {figures['file']}; median (lowest to highest)")
    print_rows(
        ["", "magi_agent.gguf", "gguf.GGUFReader"],
        [
            ["first, in page cache, ms", shown(agent["milliseconds"]), shown(reference["milliseconds"], 0)],
            ["later, in page cache, ms", shown(agent["millisecondsAgain"]), "-"],
            ["first, not in page cache, ms", shown(cold) if cold else "could not be made", "-"],
            ["growth of VmHWM, MB", shown(agent["megabytes"]), shown(reference["megabytes"])],
            ["processes read by", str(agent["milliseconds"]["runs"]), str(reference["milliseconds"]["runs"])],
        ],
    )
    print_targets(figures["targets"])


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the names of the facts that two readers tell differently."""
    return sorted(name for name in (ours.keys() | theirs.keys()) - NOT_COMPARED if ours.get(name) != theirs.get(name))


def _read(reader: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.header_reading", reader, str(GEMMA), str(repeats)]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, timeout=_READ_TIMEOUT, check=True)
    reading: dict[str, Any] = json.loads(done.stdout)
    return reading


def _load_into_page_cache(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def _leave_page_cache(path: Path) -> bool:
    """Have the kernel drop the file from its page cache; tell whether it did."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a file system that cannot tell
    return False
