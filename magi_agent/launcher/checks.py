"""What may be launched: only what an operator could have configured. Everything here looks at the host itself.

A path is checked as it is and with all links resolved. A link may be another a moment later; what holds then is the
unit's mount namespace, which shows the server the model folders and no other place where people keep files.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from magi_agent.launcher.messages import Refused
from magi_agent.runtime_settings.known_options import KnownOptions
from magi_agent.servers.launch import Wanted
from magi_agent.servers.settings_faults import settings_faults, settings_not_usable
from magi_agent.settings.settings import Settings

_SUFFIX: Final = ".gguf"


def check(wanted: Wanted, settings: Settings, known: KnownOptions | None) -> None:
    """See that a server may be started so. Raises ``Refused``, ``SettingsNotUsable``."""
    low, high = settings.port_limits
    if not low <= wanted.port <= high:
        raise Refused(f"port {wanted.port} is outside of servers.port_limits, {low} to {high}")
    if settings.tcp is not None and wanted.port == settings.tcp.port:
        raise Refused(f"port {wanted.port} is the agent's own")
    if not wanted.display_name.isprintable():
        raise Refused("the display name is more than one printable line")
    _check_path(wanted.model_path, settings.model_scan_path)
    if wanted.projector_path is not None:
        _check_path(wanted.projector_path, settings.model_scan_path)
    if faults := settings_faults(wanted.runtime_settings, settings, known, as_reader=False):
        raise settings_not_usable(wanted.model_id, faults)


def check_binary(binary: str, settings: Settings) -> Path:
    """The configured llama-server of this path. Raises ``Refused``."""
    for path in settings.binaries:
        if str(path) == binary:
            return path
    raise Refused(f"{binary} is no configured llama-server")


def _check_path(path: str, folders: Sequence[Path]) -> None:
    if not path.startswith("/") or path.startswith("//") or os.path.normpath(path) != path:
        raise Refused(f"{path!r} is no absolute path in its shortest form")
    if not path.lower().endswith(_SUFFIX):
        raise Refused(f"{path!r} is not called like a model")
    # One that may not be looked into, as of a folder that only the servers may read, stays as it is written.
    if not _is_within(path, map(str, folders)) or not _is_within(
        os.path.realpath(path), map(os.path.realpath, folders)
    ):
        raise Refused(f"{path!r} leads out of the model folders ({', '.join(map(str, folders))})")
    try:
        status = os.stat(path)  # noqa: PTH116  # the string is what there is
    except OSError:
        return  # not there, or not for us to see: what the server finds there is its own affair
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"{path!r} is no file")


def _is_within(path: str, folders: Iterable[str]) -> bool:
    return any(path.startswith(f"{folder.rstrip('/')}/") for folder in folders)
