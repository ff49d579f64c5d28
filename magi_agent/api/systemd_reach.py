"""Whether the picture of the servers is whole."""

from magi_agent.errors import ServiceUnavailable
from magi_agent.systemd.manager import SystemdManager


def require_systemd(manager: SystemdManager) -> None:
    """Raise ``ServiceUnavailable`` while systemd is not reached: what was known last is no answer then."""
    if not manager.connected:
        raise ServiceUnavailable(
            "systemd", "systemd is not reachable, so nobody knows what runs now; try again in a moment"
        )
