"""Whether the picture of the servers is whole."""

from typing import Final

from magi_agent.errors import ServiceUnavailable
from magi_agent.systemd.errors import BusTimeout
from magi_agent.systemd.manager import SystemdManager

_PATIENCE: Final = 2.0
"""Seconds after the end of a connection in which the next one is waited for: systemd that executes itself anew, as each
upgrade of it has it do, is back in well under one."""


async def require_systemd(manager: SystemdManager) -> None:
    """See that systemd is followed; it may take a moment where it was a moment ago.

    Raises ``ServiceUnavailable`` while systemd is not reached: what was known last is no answer then.
    """
    if manager.connected:
        return
    try:
        await manager.wait_connected(max(0.0, _PATIENCE - manager.lost_for))
    except BusTimeout:
        raise ServiceUnavailable(
            "systemd", "systemd is not reachable, so nobody knows what runs now; try again in a moment"
        ) from None
