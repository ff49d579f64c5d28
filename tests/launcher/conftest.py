"""A launcher in the test's own process, on a real socket and the private systemd."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from magi_agent.launcher.messages import MAX_ANSWER, read_answer, written_request
from magi_agent.launcher.service import LauncherService
from magi_agent.settings.loading import load_settings
from magi_agent.settings.settings import Settings
from magi_agent.systemd.socket_activation import InheritedSocket
from magi_agent.vocabulary import Scope
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

PREFIX = "lau"
"""Every model of these tests has an id that begins so."""
UNITS = f"magi-llama-{PREFIX}-*.service"


@dataclass
class Running:
    """One launcher, and the configuration that it reads each time it is asked."""

    path: Path
    models: Path
    ports: tuple[int, int]
    options: dict[str, str]
    callers: set[int] = field(default_factory=lambda: {os.geteuid()})
    service: LauncherService = field(init=False)

    def settings(self) -> Settings:
        """The configuration as it is now."""
        return load_settings(self.options, {})

    async def ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """Ask, and return the answer's fields. Raises what the launcher says went wrong."""
        return read_answer(await self.send(written_request(verb, **fields)))

    async def send(self, data: bytes, *, ends: bool = False) -> bytes:
        """Send anything at all, and return what comes back."""
        reader, writer = await asyncio.open_unix_connection(self.path, limit=MAX_ANSWER)
        try:
            writer.write(data)
            if ends:
                writer.write_eof()
            async with asyncio.timeout(60):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def start_of(self, path: Path, **other: Any) -> dict[str, Any]:
        """The fields of a right request to start a model."""
        return {
            "model_id": path.stem,
            "display_name": "a toy",
            "model_path": str(path),
            "projector_path": None,
            "port": self.ports[0],
            "settings": {},
            **other,
        }


@pytest.fixture
def no_units_left(systemd_user: SystemdUser) -> Iterator[None]:
    yield
    for command in ("stop", "reset-failed"):
        subprocess.run(["systemctl", "--user", command, UNITS], check=False, capture_output=True)


@pytest.fixture
async def running(
    tmp_path: Path, llama_server: Path, unused_ports: PortRanges, systemd_user: SystemdUser, no_units_left: None
) -> AsyncIterator[Running]:
    ports = unused_ports(4)
    (tmp_path / "models").mkdir()
    launcher = Running(
        tmp_path / "launcher.sock",
        tmp_path / "models",
        ports,
        {
            "model_scan_path": str(tmp_path / "models"),
            "registry_path": str(tmp_path / "state" / "registry.json"),
            "llama_server_path": str(llama_server),
            "port_range": "{}-{}".format(*ports),
            "port_limits": "{}-{}".format(*ports),
            "systemd_scope": "user",
            "stop_timeout": "3",
            "tcp": f"127.0.0.1:{ports[1]}",
        },
    )
    listener = InheritedSocket(socket.AF_UNIX)
    listener.bind(str(launcher.path))
    socket.socket.listen(listener, 512)  # as its unit has systemd do
    launcher.path.chmod(0o666)  # whoever may connect is to be refused by who they are
    launcher.service = LauncherService(
        listener, launcher.settings, Scope.USER, launcher.callers, tmp_path / "launcher-state", idle_seconds=60
    )
    run = asyncio.create_task(launcher.service.run())
    yield launcher
    launcher.service.end.set()
    async with asyncio.timeout(30):
        await run


@pytest.fixture
def model(running: Running, toy_model: MakeToyModel) -> Path:
    """A model that may be started."""
    return toy_model(running.models / f"{PREFIX}-one.gguf")


def unit_property(name: str, *properties: str) -> dict[str, str]:
    """Some properties of a unit."""
    shown = subprocess.run(
        ["systemctl", "--user", "show", name, *(f"--property={each}" for each in properties)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(line.partition("=")[::2] for line in shown.stdout.splitlines())
