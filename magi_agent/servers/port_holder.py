"""Who holds a port or a unix socket, in words for a person."""

from pathlib import Path

import psutil

from magi_agent.host.listeners import listeners
from magi_agent.host.unix_listeners import unix_listener


def holder_of(port: int) -> str:
    """Who listens on a port, as well as this process may know; it looks at every process, which blocks for a while."""
    try:
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.pid
                and connection.laddr
                and connection.laddr.port == port
            ):
                return _described(connection.pid)
    except psutil.Error:
        pass
    owners = {listener.uid for listener in listeners(port)}
    return f"a process of user {', '.join(map(str, sorted(owners)))}" if owners else "another process"


def holder_of_socket(path: Path) -> str:
    """Who listens on a unix socket, as well as this process may know."""
    listener = unix_listener(path)
    if listener is None:
        return "another process"
    try:
        return _described(listener.pid)
    except psutil.Error:
        return f"a process of user {listener.uid} (process {listener.pid})"


def _described(pid: int) -> str:
    """Raises ``psutil.Error`` where this process may not know."""
    unit = _unit_of(pid)
    return f"{psutil.Process(pid).name()} (process {pid}{f', unit {unit}' if unit else ''})"


def _unit_of(pid: int) -> str | None:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    names = (line.rpartition("/")[2] for line in lines)
    return next((name for name in names if name.endswith((".service", ".scope"))), None)
