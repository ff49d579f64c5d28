"""Prometheus and its own `promtool`, as the tests use them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import locations
import pytest

_UNPACKED = locations.CACHE / "prometheus" / "usr" / "bin"
"""Where packaging/workbench/test_packages unpacks the programs that the host has not installed."""


def promtool() -> Path:
    """The program, if the host or the workbench has it; otherwise the test is skipped."""
    found = shutil.which("promtool", path=f"{os.environ['PATH']}:{_UNPACKED}")
    if found is None:
        pytest.skip("there is no promtool: `make test` unpacks one where apt-get is")
    return Path(found)


def run_promtool(*arguments: str | Path, given: bytes = b"", folder: Path | None = None) -> tuple[int, str]:
    """Its exit status and all it says."""
    done = subprocess.run(
        [promtool(), *arguments], input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
        check=False, cwd=folder,
    )  # fmt: skip
    return done.returncode, done.stdout.decode()


def prometheus() -> Path:
    """Prometheus itself, if the host or the workbench has it; otherwise the test is skipped."""
    found = shutil.which("prometheus", path=f"{os.environ['PATH']}:{_UNPACKED}")
    if found is None:
        pytest.skip("there is no prometheus: `make test` unpacks one where apt-get is")
    return Path(found)


def with_the_models(configuration: str) -> str:
    """The shipped configuration with what it has in comments for scraping each model by itself."""
    for first in ("    # metric_relabel_configs:\n", "  # - job_name: magi-models\n"):
        configuration = _uncommented(configuration, first)
    return configuration


def _uncommented(text: str, first: str) -> str:
    """``text`` with the comments from the line ``first`` on, to the next line that is none, as a part of it."""
    assert text.count(first) == 1, first
    before, _, after = text.partition(first)
    lines = f"{first}{after}".splitlines(keepends=True)
    count = next((number for number, line in enumerate(lines) if not line.lstrip().startswith("#")), len(lines))
    return before + "".join([*(line.replace("# ", "", 1) for line in lines[:count]), *lines[count:]])
