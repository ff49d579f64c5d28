"""Asks llama-servers for their version and devices, run for a moment as the servers are: same user, same sandbox."""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from magi_agent.host.listed_devices import listed_devices
from magi_agent.servers.launcher import probe_of
from magi_agent.settings.settings import Settings
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.transient import TransientService
from magi_agent.vocabulary import Scope

_CONNECT_SECONDS: Final = 5.0
_RUN_SECONDS: Final = 30.0
"""For one question; the unit itself is given less by systemd."""
_MAX_OUTPUT: Final = 64 * 1024
_VERSION: Final = "version:"


@dataclass(frozen=True, slots=True)
class Told:
    """What one binary said."""

    version: str = ""
    devices: tuple[str, ...] = ()
    problem: str | None = None
    """Why it could not be run; the rest is empty then."""


async def ask_binaries(binaries: Iterable[Path], settings: Settings) -> dict[Path, Told]:
    """Run each binary twice. Raises ``BusError`` where systemd cannot be reached."""
    told: dict[Path, Told] = {}
    runtime = os.environ.get("XDG_RUNTIME_DIR") if settings.systemd_scope is Scope.USER else "/run"
    with tempfile.TemporaryDirectory(prefix="magi-doctor-", dir=runtime) as folder:
        async with SystemdManager(settings.systemd_scope, pattern="magi-doctor-*.service") as manager:
            await manager.wait_connected(_CONNECT_SECONDS)
            for binary in binaries:
                told[binary] = await _ask(manager, binary, settings, Path(folder))
    return told


async def _ask(manager: SystemdManager, binary: Path, settings: Settings, folder: Path) -> Told:
    texts = []
    for option in ("--version", "--list-devices"):
        output = folder / option.strip("-")
        try:
            unit = _unit(binary, option, settings, output)
        except ValueError as error:
            return Told(problem=str(error))
        result = await manager.start_transient(unit, limit=_RUN_SECONDS)
        text = _start_of(output)
        if not result.ok:
            last = text.strip().rpartition("\n")[2]
            return Told(problem=f"{option}: {last or result}")
        texts.append(text)
    version, devices = texts
    return Told(_line_of(version), tuple(device.line for device in listed_devices(devices) or ()))


def _unit(binary: Path, option: str, settings: Settings, output: Path) -> TransientService:
    """The unit in which the agent asks a binary for its options, but with another question."""
    return replace(
        probe_of(binary, output, settings.llama_server_user or None, settings.systemd_scope),
        name=f"magi-doctor-{os.getpid()}.service",
        description=f"{option} of {binary}",
        argv=(str(binary), option),
    )


def _line_of(text: str) -> str:
    lines = text.splitlines()
    found = next((line for line in lines if line.startswith(_VERSION)), lines[0] if lines else "")
    return found.replace(":", "", 1).strip() or "it does not say its version"


def _start_of(output: Path) -> str:
    try:
        with output.open("rb") as file:
            return file.read(_MAX_OUTPUT).decode(errors="replace")
    except OSError:
        return ""
