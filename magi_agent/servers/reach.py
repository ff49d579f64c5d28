"""How a server is reached from this host: at a port, or by a unix socket.

What a unit was started with says it (``llama_server.reach_of``), so a server that was started while another setting of
``server_access`` held is reached as well. Connections are opened by ``connections.ServerConnections`` alone.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.vocabulary import Scope

MAX_SOCKET_PATH: Final = 107
"""Bytes that a unix socket's path may have (unix(7), without the closing zero)."""
_SERVERS: Final = "magi-llama"
_SOCKET: Final = "server.sock"
_READABLE: Final = 40
_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class AtPort:
    """A server that listens on TCP."""

    host: str
    """The address to connect to."""
    port: int
    key_file: Path | None = None
    """Where the key is that it asks for."""

    @property
    def authority(self) -> str:
        """Host and port, as a request names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return f"http://{self.authority}"

    @property
    def words(self) -> str:
        """What it listens on, within a sentence."""
        return f"port {self.port}"


@dataclass(frozen=True, slots=True)
class AtSocket:
    """A server that listens on a unix socket."""

    path: Path

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return f"unix:{self.path}"

    @property
    def words(self) -> str:
        """What it listens on, within a sentence."""
        return f"socket {self.path}"


Reach = AtPort | AtSocket


def runtime_root(scope: Scope, environment: Mapping[str, str] | None = None) -> Path:
    """Where a manager of this scope makes its units' ``RuntimeDirectory=``; ``environment`` is this process's own."""
    if scope is Scope.SYSTEM:
        return Path("/run")
    environment = os.environ if environment is None else environment
    return Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")


def short_name(model_id: str) -> str:
    """A file name for what belongs to a model: always the same, unlike any other's, and at most 53 bytes long."""
    return f"{model_id[:_READABLE]}.{hashlib.sha256(model_id.encode()).hexdigest()[:_DIGITS]}"


def runtime_directory(model_id: str) -> str:
    """The folder of a model's server, below the runtime root."""
    return f"{_SERVERS}/{short_name(model_id)}"


def socket_path(root: Path, model_id: str) -> Path:
    """The unix socket of a model's server."""
    return root / runtime_directory(model_id) / _SOCKET
