"""What a command is told about the systemd manager it runs beside. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


class SurroundingsError(Exception):
    """The surroundings could not be made; the text is a sentence for the person who asked."""


def environment_of_manager(runtime: Path) -> dict[str, str]:
    """Return the variables by which programs find the user manager whose runtime folder is given."""
    return {
        "XDG_RUNTIME_DIR": str(runtime),
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
        "MAGI_SYSTEMD_SCOPE": "user",
    }


def inside_private_systemd() -> bool:
    """Tell whether this process runs beside a private manager (see private_systemd.py)."""
    return "MAGI_PRIVATE_SYSTEMD_PID" in os.environ
