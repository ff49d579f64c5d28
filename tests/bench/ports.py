"""Ports for the servers of a benchmark, outside the range that the tests take theirs from."""

from __future__ import annotations

import os
import socket

_PORTS = range(20_000, 21_000)


def is_free(port: int) -> bool:
    """Tell whether nothing listens on a port of the loopback address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on. Raises RuntimeError when there are too few."""
    # Starting where the process id says keeps two runs on one machine apart.
    order = [_PORTS[(os.getpid() * 10 + step) % len(_PORTS)] for step in range(len(_PORTS))]
    ports = [port for port in order if is_free(port)][:count]
    if len(ports) < count:
        raise RuntimeError(f"no {count} free ports from {_PORTS.start} to {_PORTS.stop - 1}")
    return ports
