"""Agents in this process, with both listeners, on the private systemd."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import aiohttp
import pytest
import pytest_asyncio

from magi_agent.agent import Agent
from magi_agent.settings.loading import load_settings
from tests.api.client import Api, until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

UNITS_OF_THESE_TESTS = "magi-llama-api-*.service"
"""Every model of these tests has an id that begins with ``api-``."""


class Serve(Protocol):
    """Starts an agent with toy models, and returns a client of the listener that the test runs for.

    ``options`` are settings by name; a TCP caller may do everything unless they say otherwise. One that is not
    ``loaded`` listens already, and has done nothing else yet.
    """

    async def __call__(self, *model_ids: str, loaded: bool = True, **options: str) -> Api: ...


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest) -> str:
    """The listener that the client of this run of the test talks to."""
    return str(request.param)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The test's folder of models."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def systemctl(*arguments: str) -> bytes:
    return subprocess.run(["systemctl", "--user", *arguments], check=False, capture_output=True, timeout=60).stdout


@pytest.fixture
def no_units_left(systemd_user: SystemdUser) -> Iterator[None]:
    yield
    if systemctl("list-units", "--all", "--plain", "--no-legend", UNITS_OF_THESE_TESTS):
        systemctl("stop", UNITS_OF_THESE_TESTS)
        systemctl("reset-failed", UNITS_OF_THESE_TESTS)


@pytest.fixture
def options(
    tmp_path: Path, models: Path, llama_server: Path, unused_ports: PortRanges, systemd_user: SystemdUser
) -> dict[str, str]:
    """Settings by name, for one agent of this test."""
    low, high = unused_ports(4)
    tcp, _ = unused_ports()
    return {
        "model_scan_path": str(models),
        "registry_path": str(tmp_path / "state" / "registry.json"),
        "profiles_path": str(tmp_path / "profiles"),
        "active_profile": "",
        "llama_server_path": str(llama_server),
        "port_range": f"{low}-{high}",
        "journal_directory": str(systemd_user.journal),
        "systemd_scope": "user",
        "readiness_check_interval": "0.2",
        "stop_timeout": "10",
        "tcp": f"127.0.0.1:{tcp}",
        "tcp_access": "full",
        "socket": str(tmp_path / "api.sock"),
        "tokens_path": str(tmp_path / "tokens"),
    }


@pytest_asyncio.fixture
async def serve(
    options: dict[str, str], models: Path, toy_model: MakeToyModel, listener: str, no_units_left: None
) -> AsyncIterator[Serve]:
    started: list[Api] = []

    async def start(*model_ids: str, loaded: bool = True, **changed: str) -> Api:
        for model_id in model_ids:
            toy_model(models / f"{model_id}.gguf")
        settings = load_settings({**options, **changed}, {})
        agent = Agent(settings, {})
        if listener == "unix":
            session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(settings.socket)))
            base = "http://localhost"
        else:
            session = aiohttp.ClientSession()
            base = f"http://{settings.tcp}"
        api = Api(agent, session, base)
        started.append(api)
        if not loaded:
            await agent._listeners.start()
            return api
        await agent.start()

        async def scanned() -> bool:
            services = agent.services
            return services.is_settled() and set(model_ids) <= set(services.registry.models)

        await until(scanned, "the first scan is through")
        return api

    yield start
    for api in started:
        await api.session.close()
        await api.agent.stop()


@pytest.fixture(autouse=True)
def nothing_broke_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A defect that nobody foresaw is in the log, and fails the test; one that is about a defect clears the log."""
    yield
    broken = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.exc_info or (record.name == "asyncio" and record.levelno >= logging.ERROR)
    ]
    assert broken == []
