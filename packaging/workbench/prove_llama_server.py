"""Proves that a llama-server runs on this machine's processor: it loads each sample model and answers.

    .venv/bin/python packaging/workbench/prove_llama_server.py PATH/TO/llama-server

Exit status 0: it does. 1: it does not, and the last line says why. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from locations import GEMMA, SMOLLM2

_SECONDS = 120.0
_POLL_SECONDS = 0.1


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(str(self._path))


def _answers(path: Path) -> bool:
    connection = _UnixConnection(path)
    try:
        connection.request("POST", "/completion", json.dumps({"prompt": "1, 2, 3,", "n_predict": 2}))
        response = connection.getresponse()
        return response.status == 200 and "content" in json.load(response)
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def fault_of(server: Path, model: Path) -> str | None:
    """Say in a sentence why the server does not run the model here; ``None`` if it does."""
    with tempfile.TemporaryDirectory(prefix="magi-prove-") as folder, (Path(folder) / "log").open("w+") as log:
        path = Path(folder) / "server.sock"
        arguments = [str(server), "--host", str(path), "--model", str(model), "--ctx-size", "256"]
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _SECONDS
            while time.monotonic() < deadline:
                if (status := process.poll()) is not None:
                    log.seek(0)
                    last = (log.read().splitlines() or ["nothing"])[-1]
                    how = signal.Signals(-status).name if status < 0 else f"status {status}"
                    return f"it ended with {how} on {model.name}; the last it said: {last}"
                if path.exists() and _answers(path):
                    return None
                time.sleep(_POLL_SECONDS)
            return f"it did not answer within {_SECONDS:.0f} s with {model.name}"
        finally:
            process.kill()
            process.wait()


def main() -> int:
    """Try both sample models."""
    server = Path(sys.argv[1])
    for model in (SMOLLM2, GEMMA):
        if fault := fault_of(server, model):
            print(fault)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
