"""The first process of the private namespaces: mounts, journald, the user manager, the command.

Started by private_systemd.py as PID 1 of a new PID namespace. The cgroups are laid out as on a real machine
(`user.slice/user-0.slice/user@0.service/...`), so that journald fills in the units' fields. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import cgroups
import kernel
from surroundings import SurroundingsError, environment_of_manager

WATCHED_SIGNALS = frozenset(
    {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)
"""What the front and the keeper wait for; both block these before they fork."""

_ASKED_TO_END = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE})

_SYSTEMD = Path("/lib/systemd/systemd")
_JOURNALD = Path("/lib/systemd/systemd-journald")
_RUNTIME = Path("/run/user/0")
_HIDING = Path("/run/systemd/inaccessible")
_JOURNAL = Path("/run/log/journal")
_OUTPUT = Path("/run/systemd/workbench.log")
_READY_SECONDS = 20.0
_BUS_ANSWERS_SECONDS = 5.0

# Where units have their CacheDirectory=: in memory, as nothing of them is to stay.
_CACHES = {"XDG_CACHE_HOME": str(_RUNTIME / "cache")}

# What a service manager above may have told the caller is not true of what runs here.
_NOT_PASSED_ON = frozenset(
    {"NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "MANAGERPID", "SYSTEMD_EXEC_PID"}
    | {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC"}
)
_FOR_MANAGER = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ")

_FILES = {
    "/run/systemd/journald.conf.d/workbench.conf": (
        "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitIntervalSec=0\nForwardToSyslog=no\n"
        "ForwardToWall=no\n"
    ),
    f"{_RUNTIME}/systemd/user/dbus.socket": "[Unit]\nDescription=Private bus\n[Socket]\nListenStream=%t/bus\n"
    "TriggerLimitIntervalSec=0\n",
    f"{_RUNTIME}/systemd/user/dbus.service": (
        "[Unit]\nDescription=Private bus\nRequires=dbus.socket\nStartLimitIntervalSec=0\n"
        "[Service]\nType=notify\nNotifyAccess=main\nSlice=session.slice\n"
        "ExecStart=dbus-daemon --session --address=systemd: --nofork --nopidfile --systemd-activation --syslog-only\n"
    ),
}
_LINKS = {
    f"{_RUNTIME}/systemd/user/sockets.target.wants/dbus.socket": "../dbus.socket",
    f"{_RUNTIME}/systemd/user/basic.target.wants/dbus.service": "../dbus.service",
}


def check_programs() -> None:
    """Raise SurroundingsError, naming the Debian package, where a program that is needed is missing."""
    wanted = {str(_SYSTEMD): "systemd", str(_JOURNALD): "systemd", "busctl": "systemd", "dbus-daemon": "dbus-daemon"}
    missing = sorted({package for program, package in wanted.items() if shutil.which(program) is None})
    if missing:
        raise SurroundingsError(f"Debian packages are missing. As root: apt-get install {' '.join(missing)}")


def keep(command: list[str], group: cgroups.Group) -> int:
    """Start everything, wait for the command and return its exit status (128 + N for signal N).

    To be called in the first process of a new PID namespace with WATCHED_SIGNALS blocked. Raises SurroundingsError and
    OSError when the surroundings cannot be made.
    """
    group.enter()
    # Read through the old /proc, which still counts in the outer namespace.
    outer_pid = Path("/proc/self").readlink().name
    kernel.unshare(kernel.NEW_MOUNTS)
    kernel.mount("none", Path("/"), flags=kernel.PRIVATE_ALL_BELOW)
    kernel.mount("proc", Path("/proc"), "proc", kernel.NO_SUID | kernel.NO_DEVICES)
    _make_private_run()
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment |= environment_of_manager(_RUNTIME) | _CACHES
    manager = _start_manager(environment, group.child("user.slice/user-0.slice/user@0.service"))
    environment |= {"MAGI_JOURNAL_DIRECTORY": str(_JOURNAL), "MAGI_PRIVATE_SYSTEMD_PID": outer_pid}
    return _wait_for(_spawn(command, environment, group.child("command")), manager)


def name_of_signal(number: int) -> str:
    """A signal's name; those for applications' own use have only a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _make_private_run() -> None:
    """Cover /run with an empty one that shows everything of the old one but systemd's, the logs' and the users' parts.

    The machine's own journal is covered too, so that journalctl sees the private one alone. The credentials of the
    machine's services stay out: where there are any, systemd hides them from each unit behind a folder of the part that
    is covered, and no unit with a mount namespace would start.
    """
    run = Path("/run")
    old = os.open(run, os.O_PATH | os.O_DIRECTORY)
    shown = Path("/proc/self/fd", str(old))
    entries = sorted({entry.name for entry in shown.iterdir()} - {"systemd", "log", "user", "credentials"})
    kernel.mount("tmpfs", run, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "mode=0755,size=1g")
    for name in entries:
        source, target = shown / name, run / name
        if source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
        kernel.mount(str(source), target, flags=kernel.BIND_ALL_BELOW)
    os.close(old)
    # "Not booted with systemd" is what the manager says, and ends, where the first of these is missing.
    for folder in (run / "systemd" / "system", _JOURNAL, _RUNTIME):
        folder.mkdir(parents=True)
    # What systemd mounts over a folder or a file that a unit is not to see, /run/credentials among them.
    (_HIDING / "dir").mkdir(parents=True)
    (_HIDING / "reg").touch()
    for node in _HIDING.iterdir():
        node.chmod(0)
    # As on a real machine: a file system of its own, so shared that the manager sees the credentials that its children
    # mount there for a unit (LoadCredential=).
    kernel.mount("tmpfs", _RUNTIME, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "mode=0700,size=1g")
    kernel.mount("none", _RUNTIME, flags=kernel.SHARED)
    for path, text in _FILES.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    for path, aim in _LINKS.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(aim)
    if Path("/var/log/journal").is_dir():
        kernel.mount("tmpfs", Path("/var/log/journal"), "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "mode=0755")


def _start_manager(environment: Mapping[str, str], group: cgroups.Group) -> int:
    """Start journald and the manager, each until it says that it is ready; return the manager's process id."""
    few = {name: environment[name] for name in _FOR_MANAGER if name in environment}
    few |= {"HOME": "/root", "USER": "root", "LOGNAME": "root"} | few | environment_of_manager(_RUNTIME) | _CACHES
    del few["MAGI_SYSTEMD_SCOPE"]
    notices = _RUNTIME / "workbench-ready"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ready:
        ready.bind(str(notices))
        few["NOTIFY_SOCKET"] = str(notices)
        _await_ready(ready, _spawn([str(_JOURNALD)], few, None, detached=True), "systemd-journald")
        manager = _spawn([str(_SYSTEMD), "--user", "--unit=basic.target"], few, group, detached=True)
        _await_ready(ready, manager, "systemd --user")
    notices.unlink()
    _await_bus(few)
    return manager


def _await_ready(ready: socket.socket, process: int, name: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    ready.settimeout(0.05)
    while time.monotonic() < deadline:
        try:
            if b"READY=1" in ready.recv(4096).split(b"\n"):
                return
        except TimeoutError:
            if os.waitpid(process, os.WNOHANG)[0]:
                raise SurroundingsError(f"{name} ended at once; its last words: {_last_words()}") from None
    raise SurroundingsError(f"{name} was not ready after {_READY_SECONDS:.0f} s; its last words: {_last_words()}")


def _await_bus(environment: Mapping[str, str]) -> None:
    """Wait until the manager has taken its name on the bus: only then can units be started over it."""
    question = ["busctl", "--user", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus",
                "NameHasOwner", "s", "org.freedesktop.systemd1"]  # fmt: skip
    deadline = time.monotonic() + _BUS_ANSWERS_SECONDS
    while time.monotonic() < deadline:
        answer = subprocess.run(question, env=environment, capture_output=True, text=True, timeout=5, check=False)
        if answer.stdout.strip() == "b true":
            return
        time.sleep(0.01)
    raise SurroundingsError(f"the manager did not come to its bus within {_BUS_ANSWERS_SECONDS:.0f} s: {_last_words()}")


def _last_words() -> str:
    words = _OUTPUT.read_text(errors="replace").strip() if _OUTPUT.exists() else ""
    shown = subprocess.run(
        ["journalctl", "-D", str(_JOURNAL), "-n", "5", "-o", "cat"],
        capture_output=True, text=True, errors="replace", timeout=10, check=False,
    )  # fmt: skip
    return " | ".join((words + "\n" + shown.stdout).split("\n")[-8:]).strip(" |") or "(none)"


def _spawn(
    argv: list[str], environment: Mapping[str, str], group: cgroups.Group | None, *, detached: bool = False
) -> int:
    """Start a program in a cgroup; a detached one has its own session, so that Ctrl-C does not reach it."""
    process = os.fork()
    if process == 0:
        _become(argv, environment, group, detached)
    return process


def _become(argv: list[str], environment: Mapping[str, str], group: cgroups.Group | None, detached: bool) -> NoReturn:
    try:
        # Python ignores these two; a program expects them as the kernel has them.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        if group is not None:
            group.enter()
        if detached:
            os.setsid()
            output = os.open(_OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for source, stream in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(source, stream)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        os.write(2, f"private systemd: cannot run {argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _wait_for(command: int, manager: int) -> int:
    """Reap whatever ends and pass signals on, until the command has ended."""
    while True:
        received = signal.sigwaitinfo(WATCHED_SIGNALS)
        if received.si_signo != signal.SIGCHLD:
            if received.si_code <= 0:
                os.kill(command, received.si_signo)
            continue
        while True:
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if ended == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            if ended == command:
                if code < 0 and -code not in _ASKED_TO_END:
                    os.write(2, f"private systemd: the command was ended by {name_of_signal(-code)}\n".encode())
                return 128 - code if code < 0 else code
            if ended == manager:
                os.write(2, f"private systemd: the manager ended with status {code}\n".encode())
