"""Users and groups that this machine does not have, for one program: real ones, in databases of its own.

The program runs in a mount namespace in which other files stand in the place of /etc/passwd and /etc/group.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVICE, SERVERS, ALICE, BOB = 61201, 61202, 61203, 61204
READERS, STAFF = 61202, 61210
PASSWD = f"""\
magi-agent:x:{SERVICE}:{SERVICE}::/:/usr/sbin/nologin
magi-llama:x:{SERVERS}:{SERVERS}::/:/usr/sbin/nologin
alice:x:{ALICE}:{ALICE}::/:/usr/sbin/nologin
bob:x:{BOB}:{BOB}::/:/usr/sbin/nologin
"""
GROUP = f"""\
magi-agent:x:{SERVICE}:
magi-llama:x:{READERS}:magi-agent
alice:x:{ALICE}:
bob:x:{BOB}:
crew:x:{STAFF}:bob
"""
_MOUNTS = 'mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/group && shift 2 && exec "$@"'


def beside_other_users(
    folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a command where the users above are; ``folder`` takes the two files."""
    passwd, group = folder / "passwd", folder / "group"
    passwd.write_text(Path("/etc/passwd").read_text() + PASSWD)
    group.write_text(Path("/etc/group").read_text() + GROUP)
    return subprocess.run(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", _MOUNTS, "sh", passwd, group, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=dict(environment or os.environ),
    )


def python_beside_other_users(folder: Path, program: str, *words: str, path: str | None = None) -> str:
    """Run a Python program, and return what it prints; ``path`` is where it finds programs."""
    if path is not None:
        program = f"import os; os.environ['PATH'] = {path!r}\n{program}"
    ran = beside_other_users(folder, [sys.executable, "-c", program, *words])
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
