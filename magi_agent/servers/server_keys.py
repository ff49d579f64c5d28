"""The servers' keys: for each start of a server a new one, in a file that few may read.

Whoever makes a unit writes the key, and systemd hands it to the server as a credential (systemd.exec(5),
``LoadCredential=``): a copy that the server's user alone can read, made anew at each automatic restart. The agent reads
the file itself. So a key is in no argument, no environment variable and no property of a unit, all of which every user
of the host can read; the unit's environment says only where the file is, by which a later agent finds it.

::

    <runtime root>/magi-llama-keys/<model>.<random>     this file: its folder says who may read it
    <runtime root>/credentials/<unit>/api-key           systemd's copy, for the server
"""

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

from magi_agent.servers.reach import short_name

CREDENTIAL: Final = "api-key"
_FOLDER: Final = "magi-llama-keys"
_KEY_BYTES: Final = 32
_NAME_BYTES: Final = 4
_MAX_KEY_FILE: Final = 4096


def new_key(root: Path, model_id: str) -> Path:
    """Make a key for the next start of a model's server below a runtime root; returns the file. Raises ``OSError``.

    A folder that is not there is made for this user alone. Where the operator's unit has made it for a group, as the
    launcher's does for the agent's, the group may read the key.
    """
    folder = root / _FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{short_name(model_id)}.{secrets.token_hex(_NAME_BYTES)}"
    readers = stat.S_IMODE(folder.stat().st_mode) & 0o440
    # Nobody else sees it between the two calls, whatever the umask is.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, readers)
        file.write(f"{secrets.token_hex(_KEY_BYTES)}\n")
    return path


def drop_keys(root: Path, model_id: str, *, keep: Path | None = None) -> None:
    """Remove a model's keys, but for one. Raises ``OSError``."""
    ours = re.compile(rf"{re.escape(short_name(model_id))}\.[0-9a-f]{{{2 * _NAME_BYTES}}}")
    for path in (root / _FOLDER).glob(f"{short_name(model_id)}.*"):
        if path != keep and ours.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def read_key(path: Path) -> str:
    """The key in a file. Raises ``OSError``."""
    with path.open("rb") as file:
        return file.read(_MAX_KEY_FILE).decode(errors="replace").strip()


def credential_path(root: Path, unit: str) -> Path:
    """Where systemd puts the key for the server of a unit."""
    return root / "credentials" / unit / CREDENTIAL
