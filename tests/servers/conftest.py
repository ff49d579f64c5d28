"""Serving agents on the private systemd, and proof that a test leaves nothing of its own behind."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from magi_agent.servers import launcher as launcher_module
from magi_agent.servers.launcher import DirectLauncher
from magi_agent.settings.loading import load_settings
from tests.conftest import PortRanges, SystemdUser
from tests.servers.serving_agent import MakeLauncher, ServingAgent

UNITS_OF_THESE_TESTS = "magi-llama-srv-*.service"
"""Every model of these tests has an id that begins with ``srv-``."""


class MakeAgent(Protocol):
    """Makes an agent on the test's folders of models and state; ``options`` are settings by name."""

    def __call__(
        self,
        *,
        make_launcher: MakeLauncher = DirectLauncher,
        bus_address: str | None = None,
        **options: str,
    ) -> ServingAgent: ...


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The test's folder of models; empty."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def no_units_left(systemd_user: SystemdUser) -> Iterator[None]:
    yield
    for command in ("stop", "reset-failed"):
        subprocess.run(["systemctl", "--user", command, UNITS_OF_THESE_TESTS], check=False, capture_output=True)
    left = subprocess.run(
        ["systemctl", "--user", "list-units", "--all", "--plain", "--no-legend", UNITS_OF_THESE_TESTS],
        check=True,
        capture_output=True,
        text=True,
    )
    assert left.stdout == ""


@pytest.fixture
def make_agent(
    tmp_path: Path,
    models: Path,
    llama_server: Path,
    unused_ports: PortRanges,
    systemd_user: SystemdUser,
    no_units_left: None,
) -> MakeAgent:
    low, high = unused_ports(8)

    def make(
        *,
        make_launcher: MakeLauncher = DirectLauncher,
        bus_address: str | None = None,
        **options: str,
    ) -> ServingAgent:
        chosen = {
            "model_scan_path": str(models),
            "registry_path": str(tmp_path / "state" / "registry.json"),
            "llama_server_path": str(llama_server),
            "port_range": f"{low}-{high}",
            "journal_directory": str(systemd_user.journal),
            "systemd_scope": "user",
            "readiness_check_interval": "0.2",
            "stop_timeout": "3",
            **options,
        }
        return ServingAgent(models, tmp_path / "state", load_settings(chosen, {}), make_launcher, bus_address)

    return make


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's own retries after 50 ms instead of a second."""
    monkeypatch.setattr(launcher_module, "_RETRY_PAUSE", 0.05)


@pytest.fixture(autouse=True)
def no_task_died_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever ends a task of the agent's that nobody foresaw is in the log, and fails the test."""
    yield
    died = [
        record.getMessage()
        for record in caplog.get_records("call")
        if "ended with a defect" in record.message or (record.name == "asyncio" and record.levelno >= logging.ERROR)
    ]
    assert died == []
