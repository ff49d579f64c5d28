#!/usr/bin/env python3
"""Runs a command next to a real `systemd --user` manager of its own, and leaves nothing behind.

    python3 packaging/workbench/private_systemd.py -- COMMAND ARGUMENTS...

As root, on any Linux machine, whatever its PID 1 is. Three processes work together:

* the *front*, which the caller started: it waits, passes signals on and returns the command's exit status;
* the *keeper*, PID 1 of a new PID namespace with private mounts: it starts journald, the manager and the command.
  When it ends, for whatever reason, the kernel kills every process in the namespace;
* the *janitor*, which waits for the front to be gone and then removes the cgroups.

The command finds in its environment:

* `XDG_RUNTIME_DIR`, `DBUS_SESSION_BUS_ADDRESS`: the manager's own; `systemctl --user` and `systemd-run --user` work;
* `XDG_CACHE_HOME`: a folder in memory, where units have their `CacheDirectory=`;
* `MAGI_SYSTEMD_SCOPE=user`;
* `MAGI_JOURNAL_DIRECTORY`: what to give to `journalctl -D`; the units' logs are there (plain `journalctl` works too);
* `MAGI_PRIVATE_SYSTEMD_PID`: the keeper's process id as the outside sees it, for `nsenter -t PID -m -p`.

The bus is a unit of the manager, as on a real machine: `systemctl --user kill -s KILL dbus.service` cuts every
connection, and the next one starts it again; `systemctl --user stop dbus.socket dbus.service` keeps it down until
`systemctl --user start dbus.socket`. systemctl itself needs no bus.

Somebody who is not root has a manager already, or gets an error: the command then runs with that manager.
Exit status: the command's own, 128 + N when signal N ended it, 125 when the surroundings could not be made.
Standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import cgroups
import kernel
import private_keeper
from surroundings import SurroundingsError, environment_of_manager

STATUS_NO_SURROUNDINGS = 125
_JANITOR_WAITS_SECONDS = 10.0
_SENT_BY_TERMINAL = 0x80  # SI_KERNEL, asm-generic/siginfo.h


def run(command: list[str]) -> int:
    """Run the command beside a manager and return its exit status. Raises SurroundingsError with a sentence."""
    if os.geteuid() != 0:
        _become_with_own_manager(command)
    private_keeper.check_programs()
    try:
        group = cgroups.create()
    except cgroups.CgroupError as error:
        raise SurroundingsError(str(error)) from error
    life_read, life_write = os.pipe()
    janitor = os.fork()
    if janitor == 0:
        os.close(life_write)
        _janitor(group, life_read)
    signal.pthread_sigmask(signal.SIG_BLOCK, private_keeper.WATCHED_SIGNALS)
    try:
        kernel.unshare(kernel.NEW_PIDS)
        keeper = os.fork()
        if keeper == 0:
            os.close(life_write)
            _keeper(command, group, life_read)
        return _wait_and_pass_signals_on(keeper)
    except OSError as error:
        raise SurroundingsError(f"no PID namespace of its own: {error}") from error
    finally:
        os.close(life_write)
        os.waitpid(janitor, 0)


def _janitor(group: cgroups.Group, life: int) -> NoReturn:
    """Wait until the front is gone, then remove the cgroups and end. Detached, so that it outlives the terminal."""
    os.setsid()
    for number in private_keeper.WATCHED_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.read(life, 1)
    os._exit(0 if group.remove(_JANITOR_WAITS_SECONDS) else 1)


def _keeper(command: list[str], group: cgroups.Group, life: int) -> NoReturn:
    status = STATUS_NO_SURROUNDINGS
    try:
        kernel.die_with_parent()
        # The front may have gone before the line above: then nothing would end this process.
        if not select.select([life], [], [], 0)[0]:
            status = private_keeper.keep(command, group)
    except (SurroundingsError, OSError) as error:
        _complain(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait_and_pass_signals_on(keeper: int) -> int:
    while True:
        received = signal.sigwaitinfo(private_keeper.WATCHED_SIGNALS)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(keeper, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                if code < 0:
                    # Nothing of the namespace is left then, the command least of all: whoever waits for it is to know.
                    by = private_keeper.name_of_signal(-code)
                    _complain(f"all that ran was ended with its first process, by {by}")
                return 128 - code if code < 0 else code
        elif received.si_code != _SENT_BY_TERMINAL:
            # What a terminal sends has reached the command already: it is in the same process group.
            os.kill(keeper, received.si_signo)


def _become_with_own_manager(command: list[str]) -> NoReturn:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(runtime / "systemd" / "private"))
    except OSError as error:
        raise SurroundingsError(
            f"not root, and no systemd user manager answers in {runtime} ({error}). "
            "Run it as root, or log in by a session that starts your user manager"
        ) from error
    os.execvpe(command[0], command, {**os.environ, **environment_of_manager(runtime)})


def _complain(error: BaseException | str) -> None:
    print(f"private systemd: {error}", file=sys.stderr, flush=True)


def run_or_complain(command: list[str]) -> int:
    """Run the command like `run`, but answer a failure with a line on the standard error and STATUS_NO_SURROUNDINGS."""
    try:
        return run(command)
    except (SurroundingsError, OSError) as error:
        _complain(error)
        return STATUS_NO_SURROUNDINGS


def main() -> int:
    """Run the command that the arguments name and return its exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--"]:
        del arguments[0]
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if arguments else 2
    return run_or_complain(arguments)


if __name__ == "__main__":
    sys.exit(main())
