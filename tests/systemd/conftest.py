"""Units with names of their own, and a connected manager."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from magi_agent.systemd.manager import SystemdManager
from magi_agent.vocabulary import Scope
from tests.conftest import SystemdUser
from tests.systemd.units import PATTERN, MakeName, systemctl


@pytest.fixture
def unit_name(systemd_user: SystemdUser) -> Iterator[MakeName]:
    made: list[str] = []

    def make(stem: str = "unit", suffix: str = ".service") -> str:
        made.append(f"systemdtest-{stem}-{secrets.token_hex(4)}{suffix}")
        return made[-1]

    yield make
    if made:
        services = [name for name in made if name.endswith(".service")]
        systemctl("kill", "--signal=KILL", *services, check=False)
        systemctl("stop", *made, check=False)
        systemctl("reset-failed", *made, check=False)


@pytest.fixture
async def manager(systemd_user: SystemdUser) -> AsyncIterator[SystemdManager]:
    async with SystemdManager(Scope.USER, pattern=PATTERN) as connected:
        await connected.wait_connected(20)
        yield connected
