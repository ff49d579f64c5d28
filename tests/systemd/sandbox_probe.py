"""Tries, from inside a unit, what its sandbox should forbid; sends what came of it as JSON to a port on loopback.

Standard library only, for any Python. `ok` means that it could be done, a name like EPERM why not.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_ADDR_NO_RANDOMIZE = 0x0040000
_AF_PACKET_ANY = 0x0300
_CLONE_NEWUTS = 0x04000000
_CLONE_NEWUSER = 0x10000000
_MS_BIND = 0x1000
_PTRACE_TRACEME = 0
_DELETE_MODULE = {"x86_64": 176, "aarch64": 106}[os.uname().machine]
_OWN_FOLDER = Path(__file__).parent

libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _write(path: str) -> Callable[[], None]:
    def attempt() -> None:
        file = Path(path) / "magi-sandbox-probe"
        file.touch()
        file.unlink()

    return attempt


def _suid() -> None:
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o4755)  # noqa: PTH101


def _owner() -> None:
    with tempfile.NamedTemporaryFile() as file:
        os.chown(file.name, os.getuid(), os.getgid())


def _writable_code() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def _hostname() -> None:
    socket.sethostname(socket.gethostname())


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write /usr": _write("/usr"),
    "write /etc": _write("/etc"),
    "write /var": _write("/var"),
    "write /root": _write("/root"),
    "write /tmp": _write("/tmp"),
    "write /var/tmp": _write("/var/tmp"),
    "write own folder": _write(str(_OWN_FOLDER)),
    "make a control group": lambda: _make_control_group(),
    "see the tests' /tmp": lambda: os.stat(os.environ["OUTSIDE"]),  # noqa: PTH116
    "read own folder": lambda: list(_OWN_FOLDER.iterdir()),
    "AF_INET": lambda: socket.socket(socket.AF_INET).close(),
    "AF_INET6": lambda: socket.socket(socket.AF_INET6).close(),
    "AF_UNIX": lambda: socket.socket(socket.AF_UNIX).close(),
    "AF_NETLINK": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "AF_PACKET": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, _AF_PACKET_ANY).close(),
    "new user namespace": lambda: _in_child(lambda: _checked(libc.unshare(_CLONE_NEWUSER))),
    "new UTS namespace": lambda: _in_child(lambda: _checked(libc.unshare(_CLONE_NEWUTS))),
    "real-time scheduling": lambda: _in_child(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
    "set-user-id file": _suid,
    "change an owner": _owner,
    "be traced": lambda: _in_child(lambda: _checked(libc.ptrace(_PTRACE_TRACEME, 0, None, None))),
    "change personality": lambda: _checked(libc.personality(_ADDR_NO_RANDOMIZE)),
    "mount": lambda: _in_child(lambda: _checked(libc.mount(b"/tmp", b"/tmp", None, _MS_BIND, None))),
    "unload a module": lambda: _checked(libc.syscall(_DELETE_MODULE, b"magi_no_such_module", 0)),
    "set the host name": _hostname,
    "code made at run time": _writable_code,
}


def _make_control_group() -> None:
    own = Path("/proc/self/cgroup").read_text().rpartition(":")[2].strip().lstrip("/")
    for top in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        parent = Path(top, own)
        if parent.is_dir():
            (parent / "magi-sandbox-probe").mkdir()
            (parent / "magi-sandbox-probe").rmdir()
            return
    raise OSError(errno.ENOENT, "no control group of our own is seen")


def _in_child(attempt: Callable[[], object]) -> None:
    """Try what would change this process in one that ends with it."""
    child = os.fork()
    if child == 0:
        status = 0
        try:
            attempt()
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, os.strerror(status))


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


def main() -> None:
    """Try everything and tell."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    report = {
        "outcomes": {name: _outcome(attempt) for name, attempt in ATTEMPTS.items()},
        "NoNewPrivs": status["NoNewPrivs"],
        "Seccomp": status["Seccomp"],
        "umask": status["Umask"],
        "uid_map": Path("/proc/self/uid_map").read_text().split(),
        "tmp": sorted(os.listdir("/tmp")),  # noqa: PTH208
    }
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
        connection.sendall(json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
