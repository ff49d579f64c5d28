"""What a server in the system scope must not see: every place on the host where somebody may keep files.

Left are the programs and their configuration, the kernel's own file systems, and of the hidden folders what the unit
is to be shown (the model folders). So a link in a model folder, whenever it was made, leads nowhere else.
"""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import Final

from magi_agent.systemd.properties import NOT_BINDABLE

_ROOT: Final = PurePosixPath("/")
_VAR: Final = PurePosixPath("/var")
_PROGRAMS: Final = re.compile(r"usr|bin|sbin|lib(?:32|64|x32)?|etc|opt|nix|gnu")
_KERNELS: Final = frozenset({"proc", "sys", "dev", "run"})
_SANDBOXES: Final = frozenset({"home", "root", "tmp"})
"""Hidden by ``ProtectHome`` and ``PrivateTmp``."""


def hidden_folders(shown: Collection[PurePosixPath]) -> tuple[PurePosixPath, ...]:
    """The folders to hide from a unit that is to see ``shown``; looks at the disk."""
    return tuple(folder for folder in sorted(_places()) if all(_can_be_shown(each, folder) for each in shown))


def _places() -> Iterator[PurePosixPath]:
    for name in _folders_in(_ROOT):
        if not (_PROGRAMS.fullmatch(name) or name in _KERNELS | _SANDBOXES or _ROOT / name == _VAR):
            yield _ROOT / name
    # As a whole it cannot be hidden: /var/run leads to the sockets of GPU drivers' services.
    yield from (_VAR / name for name in _folders_in(_VAR) if name != "tmp")


def _folders_in(parent: PurePosixPath) -> Iterator[str]:
    try:
        with os.scandir(parent) as entries:
            yield from (
                entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not NOT_BINDABLE.search(entry.name)
            )
    except OSError:
        return


def _can_be_shown(folder: PurePosixPath, top: PurePosixPath) -> bool:
    """Whether something in ``top`` could be shown though ``top`` is hidden, or lies elsewhere."""
    if top == folder or folder in top.parents:
        return False
    if top not in folder.parents:
        return True
    # systemd 252 can bind nothing with odd characters in its path; the first folder below the top must do.
    return not NOT_BINDABLE.search(folder.relative_to(top).parts[0])
