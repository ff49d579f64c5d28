"""What is worked out of modes and access lists is what the kernel says to a process of that user."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from magi_agent.host.accounts import Account
from magi_agent.host.permissions import access_list, permits, takes_access_lists

ATTRIBUTE = "system.posix_acl_access"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
UIDS = (61301, 61302, 61303)
GIDS = (61311, 61312, 61313)
AS_THAT_ACCOUNT = """
import json, os, sys
uid, gids, paths = json.loads(sys.argv[1])
os.setgroups(gids[1:]); os.setgid(gids[0]); os.setuid(uid)
print(json.dumps([[os.access(path, needed) for needed in range(1, 8)] for path in paths]))
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="magi-permissions-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def give_list(path: Path, numbers: random.Random) -> None:
    """Give a file an access list of everything that may stand in one (acl(5))."""
    entries = [(USER_OBJ, numbers.randrange(8), 0xFFFFFFFF)]
    entries += [(USER, numbers.randrange(8), uid) for uid in sorted(numbers.sample(UIDS, numbers.randrange(3)))]
    entries += [(GROUP_OBJ, numbers.randrange(8), 0xFFFFFFFF)]
    entries += [(GROUP, numbers.randrange(8), gid) for gid in sorted(numbers.sample(GIDS, numbers.randrange(3)))]
    entries += [(MASK, numbers.randrange(8), 0xFFFFFFFF), (OTHER, numbers.randrange(8), 0xFFFFFFFF)]
    os.setxattr(path, ATTRIBUTE, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))


def test_every_account_may_what_the_kernel_lets_it(folder: Path) -> None:
    numbers = random.Random(4)
    if not takes_access_lists(str(folder)):
        pytest.skip("this file system keeps no access lists")
    paths = []
    for number in range(300):
        path = folder / f"{number}"
        path.mkdir() if number % 3 else path.touch()
        os.chown(path, numbers.choice((*UIDS, 0)), numbers.choice((*GIDS, 0)))
        path.chmod(numbers.randrange(0o1000))
        if number % 2:
            give_list(path, numbers)
        paths.append(str(path))
    assert {access_list(path) is None for path in paths} == {True, False}

    for uid in (*UIDS, 61309):
        for _ in range(3):
            gids = numbers.sample((*GIDS, 61319), numbers.randrange(1, 4))
            asked = json.dumps([uid, gids, paths])
            ran = subprocess.run(
                [sys.executable, "-c", AS_THAT_ACCOUNT, asked], capture_output=True, text=True, timeout=60, check=True
            )
            account = Account("", uid, frozenset(gids))

            assert json.loads(ran.stdout) == [
                [permits(path, account, needed) for needed in range(1, 8)] for path in paths
            ]


def test_root_may_all_but_execute_what_nobody_may(folder: Path) -> None:
    root = Account("root", 0, frozenset({0}))
    path = folder / "file"
    path.touch(mode=0o000)
    os.chown(path, UIDS[0], GIDS[0])

    assert permits(str(path), root, os.R_OK | os.W_OK)
    assert not permits(str(path), root, os.X_OK)
    path.chmod(0o010)
    assert permits(str(path), root, os.X_OK)


def test_a_dynamic_user_may_what_everybody_may(folder: Path) -> None:
    dynamic = Account("a dynamic user", None, frozenset())
    path = folder / "file"
    path.touch(mode=0o774)

    assert permits(str(path), dynamic, os.R_OK)
    assert not permits(str(path), dynamic, os.W_OK)


def test_proc_keeps_no_access_lists() -> None:
    assert not takes_access_lists("/proc/self")
    assert access_list("/proc/self") is None
