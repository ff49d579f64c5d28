"""Scanning many models: the first scan, later ones, and one change among many.

All times are processor time in processes of their own, with the files in the page cache. The first scan of models
with a vocabulary of 32,768 tokens stands beside the floor (each header's bytes read at once and summed up by crc32)
and beside `gguf.GGUFReader` on a few of them. Later scans, with the merge into a registry that is saved, stand beside
the floor of listing the folders and asking for each file's state.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from locations import CHECKOUT

from tests.bench.figures import at_least, at_most, print_rows, print_targets, shown, spread_of
from tests.bench.many_models import write_models

MODELS_AT_FIRST = 1000
VOCABULARY = 32_768
MODELS_LATER = 10_000
ROUNDS = 7
_FIRST_ROUNDS = 3
_READ_BY_REFERENCE = 3
_SCAN_SECONDS = 300.0
_LATER = ("unchanged", "floor", "scanChanged", "moreAtScan", "lookChanged", "moreAtEvent", "lookUnchanged", "header")


def measure(
    at_first: int = MODELS_AT_FIRST, vocabulary: int = VOCABULARY, later: int = MODELS_LATER, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Scan models for the first time, and others again and again; return milliseconds of processor time."""
    with tempfile.TemporaryDirectory(prefix="magi-bench-discovery-") as name:
        large, many = Path(name, "large"), Path(name, "many")
        write_models(large, at_first, vocabulary)
        firsts = [_scan("first", large, 1) for _ in range(_FIRST_ROUNDS)]
        by_reference = _scan("reference", large, min(_READ_BY_REFERENCE, at_first))
        write_models(many, later)
        again = _scan("again", many, rounds)
    first = {key: spread_of(scan[key] for scan in firsts) for key in ("perModel", "floorPerModel")}
    spreads = {key: spread_of(again[key]) for key in _LATER}
    ratio = by_reference["perModel"] / first["perModel"]["median"]
    missing = at_first - min(scan["models"] for scan in firsts)
    return {
        "first": {"models": at_first, "vocabulary": vocabulary, **first, "referencePerModel": by_reference["perModel"]},
        "ratio": ratio,
        "again": {"models": again["models"], **spreads},
        "targets": [
            at_most(f"models of {at_first} that are not found whole", missing, 0, ""),
            at_least("gguf.GGUFReader takes longer a model", ratio, 50, "times"),
            at_most(f"scan of {later:,}, nothing changed", spreads["unchanged"]["median"], 150, "ms"),
            at_most("the same with one changed, beyond its header", spreads["moreAtScan"]["median"], 20, "ms"),
        ],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Print the first scan and the later ones beside what they are measured against, then the targets."""
    first, again = figures["first"], figures["again"]
    print(
        f"first scan of {first['models']:,} models with {first['vocabulary']:,} tokens each, "
        "processor time a model; median (lowest to highest)"
    )
    print_rows(
        ["", "magi_agent.discovery", "bytes and crc32", "gguf.GGUFReader"],
        [
            [
                "ms a model",
                shown(first["perModel"], 2),
                shown(first["floorPerModel"], 2),
                f"{first['referencePerModel']:,.0f}",
            ]
        ],
    )
    print(
        f"{again['models']:,} known models, registry and header cache saved; processor time; median (lowest to highest)"
    )
    print_rows(
        ["", "ms"],
        [
            ["scan, nothing changed", shown(again["unchanged"])],
            ["os.walk and stat of the same files", shown(again["floor"])],
            ["scan, one changed", shown(again["scanChanged"])],
            ["of that, beyond the unchanged scan and its header", shown(again["moreAtScan"])],
            ["event instead of a scan, one changed", shown(again["lookChanged"])],
            ["of that, beyond its header", shown(again["moreAtEvent"])],
            ["event instead of a scan, nothing changed", shown(again["lookUnchanged"], 2)],
            ["its header alone", shown(again["header"], 2)],
        ],
    )
    print_targets(figures["targets"])


def _scan(what: str, folder: Path, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.scanning", what, str(folder), str(rounds)]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, timeout=_SCAN_SECONDS, check=True)
    taken: dict[str, Any] = json.loads(done.stdout)
    return taken
