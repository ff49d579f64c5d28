"""One HTTP request over a unix socket, its answer's bytes as they come."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

_ANSWER_SECONDS = 30.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("magi", timeout=_ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def fetch(listening: Path, path: str) -> tuple[int, bytes]:
    """Return status and body of the answer to a GET. Raises OSError and http.client.HTTPException."""
    connection = _UnixConnection(listening)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
