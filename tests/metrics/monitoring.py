"""Prometheus's own `promtool`, as the tests use it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import locations
import pytest


def promtool() -> Path:
    """The program, if the host or the workbench has it; otherwise the test is skipped."""
    unpacked = locations.CACHE / "prometheus" / "usr" / "bin"
    found = shutil.which("promtool", path=f"{os.environ['PATH']}:{unpacked}")
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
