"""Whom the kernel takes a process for: a user and the groups it is in."""

import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Account:
    """A user with the groups that count for it."""

    name: str
    """As it stands in a sentence: ``user alice``."""
    uid: int | None
    """``None`` for one that systemd makes for the moment (``DynamicUser=``): nothing is granted to it by name."""
    gids: frozenset[int]


DYNAMIC: Final = Account("a dynamic user", None, frozenset())


def account_named(user: str) -> Account | None:
    """The account of a user, as the user database has it; ``None`` where there is no such user."""
    try:
        entry = pwd.getpwnam(user)
    except (KeyError, ValueError):
        return None
    return Account(f"user {user}", entry.pw_uid, frozenset(os.getgrouplist(user, entry.pw_gid)))


def own_account() -> Account:
    """This process's account, by its effective ids."""
    return Account(_called(os.geteuid()), os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def account_of_process(pid: int) -> Account | None:
    """The account that a process has now, by /proc/PID/status (proc(5)); ``None`` where it cannot be had.

    Other than the user database this knows the groups that the process began with.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    fields = {name: values.split() for name, _, values in (line.partition(":") for line in lines)}
    try:
        # Real, effective, saved, and of the file system: the last one opens files.
        uid, gid = int(fields["Uid"][3]), int(fields["Gid"][3])
        return Account(_called(uid), uid, frozenset({gid, *map(int, fields["Groups"])}))
    except (KeyError, IndexError, ValueError):
        return None


def group_id(name: str) -> int | None:
    """The number of a group; ``None`` where there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        return None


def group_name(gid: int) -> str:
    """The name of a group, or its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _called(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"
