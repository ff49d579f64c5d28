"""Runs every benchmark beside this file, prints their tables and writes their figures to `build/bench.json`.

A benchmark is a module `bench_<name>.py` with two functions: `measure() -> dict` (figures that JSON can carry) and
`print_table(figures)`. Names on the command line choose among them: `make bench ARGS='header registry'`. One that
fails is reported, the others still run, and the exit status is 1. A target that is missed (see figures.py) is said,
and no failure: on a busy machine it may be the machine's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_CHECKOUT = _HERE.parents[1]
_FIGURES = _CHECKOUT / "build" / "bench.json"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One module's two functions, by the module's name without `bench_`."""

    name: str
    measure: Callable[[], dict[str, Any]]
    print_table: Callable[[dict[str, Any]], None]


def find(chosen: list[str]) -> list[Path]:
    """Return the benchmarks' files, sorted. Raises SystemExit naming what was asked for and is not there."""
    files = {path.stem.removeprefix("bench_"): path for path in sorted(_HERE.glob("bench_*.py"))}
    unknown = set(chosen) - set(files)
    if unknown:
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(files) or 'none'}")
    return [path for name, path in files.items() if not chosen or name in chosen]


def load(path: Path) -> Benchmark:
    """Import one benchmark from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up here.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return Benchmark(path.stem.removeprefix("bench_"), module.measure, module.print_table)


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpus": os.cpu_count(),
        "memoryBytes": memory,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "loadAverage": os.getloadavg()[0],
    }


def main() -> int:
    """Run the chosen benchmarks one after the other and write all figures at the end."""
    sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "packaging" / "workbench")]
    surroundings = machine()
    figures: dict[str, Any] = {}
    failed: list[str] = []
    for path in find(sys.argv[1:]):
        began = time.monotonic()
        try:
            benchmark = load(path)
            figures[benchmark.name] = benchmark.measure()
            print(f"\n{benchmark.name} ({time.monotonic() - began:.0f} s)")
            benchmark.print_table(figures[benchmark.name])
        except Exception:  # noqa: BLE001  one benchmark's fault must not take the others' figures away
            failed.append(path.stem)
            traceback.print_exc()
    _FIGURES.parent.mkdir(parents=True, exist_ok=True)
    report = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": surroundings, "benchmarks": figures}
    _FIGURES.write_text(json.dumps(report, indent=2) + "\n")
    missed = [target["target"] for measured in figures.values() for target in measured["targets"] if not target["met"]]
    print(f"\nfigures: {_FIGURES.relative_to(_CHECKOUT)}; targets missed: {len(missed)}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
