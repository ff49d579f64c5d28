"""Why a path cannot be read, in words an operator can act on.

Two users read a model: the service, which reads its header, and the one that the servers run as. In the package both
are in one group, and what is granted to that group is granted to both.
"""

import grp
import os
import pwd
import shlex
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.host.accounts import Account, group_id, own_account
from magi_agent.host.permissions import access_list, permits, takes_access_lists

READERS: Final = "magi-llama"
"""The package's group of who reads models: the servers' own, and the service is a member."""

_LETTERS: Final = ((os.R_OK, "r"), (os.W_OK, "w"), (os.X_OK, "x"))


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The first component of a path that keeps an account from it."""

    component: str
    needed: int
    """What the account would have to be permitted: a sum of ``os.R_OK``, ``os.W_OK`` and ``os.X_OK``."""
    is_folder: bool
    is_last: bool


def denial(path: str) -> str:
    """Say which component of a path keeps this process from reading it, and the command that would allow it.

    ``path`` names a file or a folder. Where every component seems to allow it (a security module, a change since),
    the sentence says so instead.
    """
    account = own_account()
    try:
        obstacle = find_obstacle(path)
        if obstacle is not None:
            return f"{reason(obstacle, account)}; to allow it: {granting(obstacle, account, shared_group(account))}"
    except OSError as error:
        return f"{account.name} may not read it: {error.strerror}"
    return (
        f"{account.name} may not read it, though the modes of its folders allow it; a security module or a unit's "
        "sandbox may forbid it"
    )


def find_obstacle(
    path: str, account: Account | None = None, *, needed: int | None = None, shown_folders: Iterable[Path] = ()
) -> Obstacle | None:
    """Find the first component of a path, links resolved, that keeps an account from it.

    Without ``account`` the kernel is asked for this process. ``needed`` is what the last component must permit; by
    default reading. ``shown_folders`` are those that the account sees whatever stands above them, as a unit does that
    has them mounted. Raises ``OSError`` where a component cannot be looked at.
    """
    real = os.path.realpath(path)
    above = {parent for folder in shown_folders for parent in Path(os.path.realpath(folder)).parents}
    for component in [*reversed(Path(real).parents), Path(real)]:
        if component in above:
            continue
        is_folder = stat.S_ISDIR(component.lstat().st_mode)
        is_last = str(component) == real
        if not is_last:
            asked = os.X_OK
        elif needed is None:
            asked = os.R_OK | os.X_OK if is_folder else os.R_OK
        else:
            asked = needed
        permitted = (
            os.access(component, asked, effective_ids=True)
            if account is None
            else permits(str(component), account, asked)
        )
        if not permitted:
            return Obstacle(str(component), asked, is_folder, is_last)
    return None


def reason(obstacle: Obstacle, account: Account) -> str:
    """Say what the obstacle is."""
    if not obstacle.is_folder:
        return f"its mode does not let {account.name} {'read' if obstacle.needed == os.R_OK else 'use'} it"
    if obstacle.is_last:
        return f"the folder does not let {account.name} read it"
    return f"the folder {shown(obstacle.component)} does not let {account.name} through"


def shared_group(*accounts: Account, group: str = READERS) -> str | None:
    """The group that what is granted should be granted to: ``group``, if there is one and all accounts are in it."""
    gid = group_id(group)
    return group if gid is not None and all(gid in account.gids for account in accounts) else None


def granting(obstacle: Obstacle, account: Account, group: str | None) -> str:
    """Return the command that takes an obstacle out of an account's way, for ``group`` as a whole if there is one.

    It gives no more than is needed, and takes nothing from anybody who has it. Raises ``OSError`` where the component
    cannot be looked at any more.
    """
    component = obstacle.component
    quoted = shlex.quote(shown(component))
    letters = "".join(
        letter for bit, letter in ((os.R_OK, "r"), (os.W_OK, "w"), (os.X_OK, "x")) if obstacle.needed & bit
    )
    status = Path(component).lstat()
    if status.st_uid == account.uid:
        return f"sudo chmod u+{letters} {quoted}"
    has_list = access_list(component) is not None
    if group is None and (not has_list or account.uid is None):
        who = "g" if status.st_gid in account.gids else "o"
        return f"sudo chmod {who}+{letters} {quoted}"
    takes_list = has_list or takes_access_lists(component)
    whom = f"g:{group}" if group else f"u:{_bare(account)}"
    if obstacle.is_folder and obstacle.is_last:
        # What lies in it, now and later, is to be read too; X is for folders alone.
        with_list = f"sudo setfacl -R -m {whom}:rX,d:{whom}:rX {quoted}"
    else:
        with_list = f"sudo setfacl -m {whom}:{letters} {quoted}"
    if takes_list and shutil.which("setfacl"):
        return with_list
    if status.st_gid in account.gids:
        return f"sudo chmod g+{letters} {quoted}"
    if group is not None and _nobody_loses(status):
        return f"sudo chgrp {group} {quoted} && sudo chmod g+{letters} {quoted}"
    # Where no list can be, it is to be read by everybody, or not at all.
    return f"sudo apt install acl && {with_list}" if takes_list else f"sudo chmod o+{letters} {quoted}"


def shown(path: str) -> str:
    """Return a path as it may stand in a message: bytes that are not UTF-8 and control characters become ``?``."""
    return "".join(letter if letter.isprintable() else "?" for letter in path)


def _bare(account: Account) -> str:
    return account.name.rpartition(" ")[2]


def _nobody_loses(status: os.stat_result) -> bool:
    """Whether nobody has a right by the owning group alone: it may be another one then."""
    if not (status.st_mode >> 3) & ~status.st_mode & 0o7:
        return True
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    # A user's private group (adduser(8)): nobody else is in it.
    return owner.pw_gid == group.gr_gid and owner.pw_name == group.gr_name and set(group.gr_mem) <= {owner.pw_name}
