"""What a unit uses of memory, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from magi_agent.host import unit_memory as module
from magi_agent.host.unified_hierarchy import Hierarchy
from magi_agent.host.unit_memory import UnitMemory, unit_memory

MIB = 1 << 20
_HOLD = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
if len(sys.argv) > 2:
    own = bytearray(b"x" * int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def _held(file: Path, *anonymous: str) -> UnitMemory:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(file), *anonymous], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        seen = unit_memory("/no/such/group", process.pid)
        assert seen is not None
        return seen
    finally:
        process.communicate()


def test_own_memory_and_mapped_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 4096)
    (tmp_path / "large").write_bytes(os.urandom(40 * MIB))
    plain = _held(tmp_path / "small")

    mapping = _held(tmp_path / "large")
    owning = _held(tmp_path / "small", str(40 * MIB))

    assert plain.source == "process"
    assert mapping.mapped - plain.mapped == pytest.approx(40 * MIB, abs=2 * MIB)
    assert mapping.anonymous - plain.anonymous == pytest.approx(0, abs=2 * MIB)
    assert owning.anonymous - plain.anonymous >= 39 * MIB
    assert owning.mapped - plain.mapped == pytest.approx(0, abs=2 * MIB)


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert unit_memory("/no/such/group", ended.pid) is None
    assert unit_memory("", None) is None


def test_figures_of_the_control_group_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by hand, in the kernel's form: a memory controller of version 2 is not to be had everywhere."""
    group = tmp_path / "magi-llama.slice"
    group.mkdir()
    (group / "memory.stat").write_text("anon 1000\nfile 5000\nkernel 10\nfile_mapped 3000\n")
    monkeypatch.setattr(module, "unified_hierarchy", lambda: Hierarchy(tmp_path, PurePosixPath("/")))
    assert unit_memory("/magi-llama.slice", os.getpid()) == UnitMemory(1000, 3000, "control group")
    (group / "memory.stat").write_text("nonsense\n")
    seen = unit_memory("/magi-llama.slice", os.getpid())
    assert seen is not None
    assert seen.source == "process"
