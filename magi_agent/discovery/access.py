"""Why a path cannot be read, in words an operator can act on."""

import os
import pwd
import shlex
import stat
from pathlib import Path


def denial(path: str) -> str:
    """Say which component of a path keeps this process from reading it, and the command that would allow it.

    ``path`` names a file or a folder. Where every component seems to allow it (a security module, a change since),
    the sentence says so instead.
    """
    user = _user()
    try:
        real = os.path.realpath(path)
        for component in [*reversed(Path(real).parents), Path(real)]:
            mode = component.lstat().st_mode
            is_folder = stat.S_ISDIR(mode)
            needed = os.X_OK if is_folder else os.R_OK
            if is_folder and str(component) == real:
                needed |= os.R_OK
            if not os.access(component, needed, effective_ids=True):
                return _sentence(str(component), is_folder, str(component) == real, user)
    except OSError as error:
        return f"{user} may not read it: {error.strerror}"
    return f"{user} may not read it, though the modes of its folders allow it; a security module may forbid it"


def _sentence(component: str, is_folder: bool, is_last: bool, user: str) -> str:
    if not is_folder:
        what, permission = "its mode does not let", "o+r"
    elif is_last:
        what, permission = "the folder does not let", "o+rx"
    else:
        what, permission = f"the folder {shown(component)} does not let", "o+x"
    suffix = "through" if is_folder and not is_last else "read it"
    return f"{what} {user} {suffix}; to allow it: sudo chmod {permission} {shlex.quote(shown(component))}"


def shown(path: str) -> str:
    """Return a path as it may stand in a message: bytes that are not UTF-8 and control characters become ``?``."""
    return "".join(letter if letter.isprintable() else "?" for letter in path)


def _user() -> str:
    try:
        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    except KeyError:
        return f"uid {os.geteuid()}"
