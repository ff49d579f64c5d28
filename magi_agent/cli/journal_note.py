"""What a command did that no service of ours saw: one line in the host's journal, with who did it."""

import contextlib
import os
import pwd
from pathlib import Path
from typing import Final

from logging_journald import JournaldTransport

_IDENTIFIER: Final = "magictl"
_NOTICE: Final = 5
"""The priority of syslog(3) for what is no fault and matters."""
_LOGIN: Final = Path("/proc/self/loginuid")
_NOBODY: Final = 2**32 - 1
"""Of proc(5): whoever runs this did not log in."""


def note_in_journal(done: str) -> None:
    """Write ``done`` and who did it; where there is no journal, or it takes nothing, nobody is told."""
    fields = (("MESSAGE", f"{done}, by {_person()}"), ("PRIORITY", _NOTICE), ("SYSLOG_IDENTIFIER", _IDENTIFIER))
    with contextlib.suppress(OSError):
        transport = JournaldTransport()
        with contextlib.closing(transport.socket):
            transport.send(fields)


def _person() -> str:
    """The user, and whom they logged in as where that is another one: root, mostly, is somebody who used sudo."""
    user = os.getuid()
    try:
        login = int(_LOGIN.read_text())
    except (OSError, ValueError):
        login = _NOBODY
    return _name(user) if login in (user, _NOBODY) else f"{_name(login)} as {_name(user)}"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
