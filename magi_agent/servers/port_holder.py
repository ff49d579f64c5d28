"""Who holds a port, in words for a person."""

from pathlib import Path

import psutil

from magi_agent.host.listeners import listeners


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
                process = psutil.Process(connection.pid)
                unit = _unit_of(connection.pid)
                return f"{process.name()} (process {connection.pid}{f', unit {unit}' if unit else ''})"
    except psutil.Error:
        pass
    owners = {listener.uid for listener in listeners(port)}
    return f"a process of user {', '.join(map(str, sorted(owners)))}" if owners else "another process"


def _unit_of(pid: int) -> str | None:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    names = (line.rpartition("/")[2] for line in lines)
    return next((name for name in names if name.endswith((".service", ".scope"))), None)
