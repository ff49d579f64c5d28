"""The controllers there are, as the kernel shows them here and where other hierarchies are mounted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magi_agent.host.control_groups import controllers
from magi_agent.host.unified_hierarchy import unified_hierarchy

ASKS = """
import json, sys
from magi_agent.host.control_groups import controllers
found = controllers(sys.argv[1])
print(json.dumps(found and [found.available, found.missing, found.is_unified]))
"""
ALL = ["memory", "cpu", "io", "pids"]


def asked_where(mounts: str, group: str = "/") -> object:
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    ran = subprocess.run(
        [*command, sys.executable, "-c", ASKS, group], capture_output=True, text=True, timeout=60, check=True
    )
    answer: object = json.loads(ran.stdout)
    return answer


def test_here_they_are_those_that_the_kernel_lists() -> None:
    found = controllers("/")

    assert found is not None
    root = unified_hierarchy()
    assert root is not None
    assert found.is_unified == (str(root.mounted_on) == "/sys/fs/cgroup")
    assert {*found.available, *found.missing} == set(ALL)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_with_version_2_alone_they_are_those_of_the_group(tmp_path: Path) -> None:
    listed = tmp_path / "controllers"
    listed.write_text("cpuset cpu memory\n")
    alone = "umount -R -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"

    told = asked_where(f"{alone} && mount --bind {listed} /sys/fs/cgroup/cgroup.controllers")

    assert told == [["memory", "cpu"], ["io", "pids"], True]
    assert asked_where(alone, "/nobody-is-in-such-a-group") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_without_any_hierarchy_nobody_knows() -> None:
    assert asked_where("umount -R -l /sys/fs/cgroup") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_version_1_has_what_is_mounted_of_it() -> None:
    if not Path("/sys/fs/cgroup/memory").is_dir():
        pytest.skip("this kernel has nothing as version 1")
    keep = "umount -R -l /sys/fs/cgroup && mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/memory"

    told = asked_where(f"{keep} && mount -t cgroup -o memory none /sys/fs/cgroup/memory")

    assert told == [["memory"], ["cpu", "io", "pids"], False]
