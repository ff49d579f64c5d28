"""Whether a file's mode and access list let an account do something, worked out without becoming that account.

As in acl(5), which has the kernel's rule but for one case. Capabilities, mount options and security modules are not
looked at.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from magi_agent.host.accounts import Account

_ATTRIBUTE: Final = "system.posix_acl_access"
# linux/posix_acl_xattr.h: a version, then tag, permissions and id of each entry, all in little-endian order.
_VERSION: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_KNOWN_VERSION: Final = 2
# linux/posix_acl.h
_USER: Final = 0x02
_GROUP_OBJ: Final = 0x04
_GROUP: Final = 0x08
_MASK: Final = 0x10
_ALL: Final = 0o7


@dataclass(frozen=True, slots=True)
class AccessList:
    """What a file says of named users and groups beyond its mode."""

    users: tuple[tuple[int, int], ...]
    """Ids and their permissions, as are ``groups``."""
    groups: tuple[tuple[int, int], ...]
    owning_group: int
    mask: int
    """No user or group of the list, nor the owning group, has more than this."""


def access_list(path: str) -> AccessList | None:
    """The access list of a file, which is followed where it is a link; ``None`` where it has none."""
    try:
        data = os.getxattr(path, _ATTRIBUTE)
    except OSError:
        return None
    if len(data) < _VERSION.size or _VERSION.unpack_from(data)[0] != _KNOWN_VERSION:
        return None
    entries = list(_entries(data))
    return AccessList(
        users=tuple((number, granted) for tag, granted, number in entries if tag == _USER),
        groups=tuple((number, granted) for tag, granted, number in entries if tag == _GROUP),
        owning_group=next((granted for tag, granted, _ in entries if tag == _GROUP_OBJ), 0),
        mask=next((granted for tag, granted, _ in entries if tag == _MASK), _ALL),
    )


def takes_access_lists(path: str) -> bool:
    """Whether the file system of a file keeps access lists."""
    try:
        os.getxattr(path, _ATTRIBUTE)
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


def permits(path: str, account: Account, needed: int) -> bool:
    """Whether ``account`` may do with a file what ``needed`` says: a sum of ``os.R_OK``, ``os.W_OK`` and ``os.X_OK``.

    Links are followed. Raises ``OSError`` where the file cannot be looked at.
    """
    status = os.stat(path)  # noqa: PTH116  # names need not be UTF-8
    mode = stat.S_IMODE(status.st_mode)
    if account.uid == 0:
        return not needed & os.X_OK or stat.S_ISDIR(status.st_mode) or bool(mode & 0o111)
    if account.uid == status.st_uid:
        return not needed & ~(mode >> 6)
    listed = access_list(path)
    if listed is None or not mode & stat.S_IRWXG:
        # With a mask of nothing Linux does not look at the list (acl_permission_check in its fs/namei.c).
        return not needed & ~(mode >> 3 if status.st_gid in account.gids else mode)
    for uid, granted in listed.users:
        if uid == account.uid:
            return not needed & ~(granted & listed.mask)
    of_groups = [granted for gid, granted in listed.groups if gid in account.gids]
    if status.st_gid in account.gids:
        of_groups.append(listed.owning_group)
    if of_groups:
        return any(not needed & ~(granted & listed.mask) for granted in of_groups)
    return not needed & ~mode


def _entries(data: bytes) -> Iterator[tuple[int, int, int]]:
    for offset in range(_VERSION.size, len(data) - _ENTRY.size + 1, _ENTRY.size):
        yield _ENTRY.unpack_from(data, offset)
