"""The host's memory and the limits above the servers; control groups of version 2 in made-up trees, as few hosts of
tests have them, and what this host has, as it is.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil
import pytest

from magi_agent.host.gpu_devices import Tree
from magi_agent.host.memory import HostMemory, MemoryLimit, SliceLimits, host_memory, limits, pressure
from magi_agent.host.unified_hierarchy import Hierarchy

GIB = 1 << 30
SLICES = (
    SliceLimits("magi-llama.slice", "/magi.slice/magi-llama.slice", None, None),
    SliceLimits("magi.slice", "/magi.slice", None, None),
)


@pytest.fixture
def unified(tmp_path: Path) -> Hierarchy:
    return Hierarchy(tmp_path, PurePosixPath("/"))


def group(root: Hierarchy, path: str, **files: object) -> None:
    folder = root.mounted_on / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def test_the_limits_above_the_servers_are_found_from_the_inside_out(unified: Hierarchy) -> None:
    group(unified, "/magi.slice/magi-llama.slice", memory_max="max", memory_high=20 * GIB, memory_current=12 * GIB,
          memory_stat=f"anon {GIB}\nactive_file {8 * GIB}\ninactive_file {2 * GIB}\nfile_mapped {4 * GIB}")  # fmt: skip
    group(unified, "/magi.slice", memory_max=64 * GIB, memory_high="max", memory_current=12 * GIB)
    group(unified, "/", memory_stat="anon 0")

    inner, outer = limits(SLICES, "/", unified=unified)
    # What is cached of files that nobody has mapped does not count as used.
    assert inner == MemoryLimit("/magi.slice/magi-llama.slice", "magi-llama.slice", 20 * GIB, None, 6 * GIB)
    assert inner.room == 14 * GIB
    assert (outer.unit, outer.max, outer.high, outer.used) == ("magi.slice", 64 * GIB, None, 12 * GIB)


def test_what_systemd_was_told_holds_while_nothing_is_in_the_slice(unified: Hierarchy) -> None:
    told = (SliceLimits("magi-llama.slice", "/magi.slice/magi-llama.slice", 8 * GIB, 10 * GIB), SLICES[1])

    [found] = limits(told, "/", unified=unified)
    assert (found.least, found.room, found.used) == (8 * GIB, 8 * GIB, None)


def test_the_limits_of_a_users_manager_and_of_a_container_hold_too(unified: Hierarchy) -> None:
    manager = "/user.slice/user-1000.slice/user@1000.service"
    told = [SliceLimits("magi-llama.slice", f"{manager}/magi.slice/magi-llama.slice", None, None)]
    group(unified, "/user.slice/user-1000.slice", memory_max=4 * GIB)
    group(unified, "/", memory_max=6 * GIB)

    assert [(each.unit, each.max) for each in limits(told, manager, unified=unified)] == [
        ("user-1000.slice", 4 * GIB),
        ("", 6 * GIB),
    ]


def test_version_1_says_no_limit_by_a_large_number(tmp_path: Path) -> None:
    first = Hierarchy(tmp_path, PurePosixPath("/"))
    group(first, "/magi.slice", memory_limit_in_bytes=3 * GIB, memory_usage_in_bytes=2 * GIB,
          memory_stat=f"total_active_file {GIB}\ntotal_inactive_file 0\ntotal_mapped_file 0")  # fmt: skip
    group(first, "/", memory_limit_in_bytes=9223372036854771712)

    [found] = limits(SLICES, "/", first=first)
    assert (found.max, found.used, found.room) == (3 * GIB, GIB, 2 * GIB)


def memory(*found: MemoryLimit, available: int = 10 * GIB) -> HostMemory:
    return HostMemory(16 * GIB, available, 0, 0, None, found)


def test_the_limit_that_binds_is_the_one_that_leaves_least() -> None:
    wide = MemoryLimit("/a", "a", None, 30 * GIB, 0)
    narrow = MemoryLimit("/a/b", "b", 8 * GIB, None, 3 * GIB)
    over = MemoryLimit("/a/c", "c", None, GIB, 2 * GIB)

    assert (memory(wide).binding, memory(wide).room) == (None, 10 * GIB)
    assert (memory(narrow, wide).binding, memory(narrow, wide).room) == (narrow, 5 * GIB)
    assert memory(narrow, over).room == 0
    assert memory().room == 10 * GIB


def test_this_hosts_memory_is_as_the_kernel_says() -> None:
    found = host_memory((), "/", Tree())

    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available <= found.total
    assert found.room <= found.available
    if Path("/proc/pressure/memory").exists():
        assert found.pressure is not None
        assert all(0 <= each <= 100 for each in (*found.pressure.some, *found.pressure.full))


def test_pressure_is_none_where_the_kernel_does_not_count(tmp_path: Path) -> None:
    tree = Tree(proc=tmp_path)
    assert pressure(tree) is None
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "memory").write_text(
        "some avg10=1.50 avg60=0.25 avg300=0.00 total=1\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=1\n"
    )
    found = pressure(tree)
    assert found is not None
    assert (found.some, found.full) == ((1.5, 0.25, 0.0), (0.1, 0.0, 0.0))
