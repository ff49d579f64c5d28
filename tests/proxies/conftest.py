"""An agent, and before it each of the proxies in turn."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import locations
import pytest

from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser
from tests.proxies.proxy_process import Proxy, program, running
from tests.proxies.shipped import NAME, Surroundings

MODEL = "prx-toy"
UNITS_OF_THESE_TESTS = "magi-llama-prx-*.service"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are for root alone."""
    made = Path(tempfile.mkdtemp(prefix="magi-proxies-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def agent(
    systemd_user: SystemdUser, folder: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    """The agent of one file of tests, with one model; a server of it runs where a test has started it."""
    toy_model(folder / "models" / f"{MODEL}.gguf", context_length=16_384)
    agent = AgentProcess(folder, folder / "models", unused_ports(2), llama_server)
    agent.settings["MAGI_TRUSTED_PROXIES"] = "unix 127.0.0.1"
    agent.settings["MAGI_TCP"] = f"127.0.0.1:{unused_ports()[0]}"
    agent.settings["MAGI_TCP_ACCESS"] = "full"
    agent.settings["MAGI_TOKENS_PATH"] = str(folder / "tokens")
    for scope in ("read", "admin"):
        made = subprocess.run(
            [locations.VENV / "bin" / "magictl", "token", "add", scope, "--scope", scope,
             "--tokens-path", folder / "tokens"],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        (folder / f"{scope}.token").write_text(made.stdout.strip())
    with ended(agent, UNITS_OF_THESE_TESTS):
        agent.start()
        wait_until(lambda: not agent.ask("GET", "/health/ready").body["scanning"], "the first scan")
        yield agent


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the name that the shipped files have, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here: as root, packaging/workbench/test_packages brings it")
    folder = tmp_path_factory.mktemp("certificate")
    made = folder / "magi.pem", folder / "magi.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-out", made[0],
         "-keyout", made[1]],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return made


class Bearer(Protocol):
    """Gives the header by which a caller says who they are; ``scope`` is that of their token."""

    def __call__(self, scope: str = "admin") -> dict[str, str]: ...


@pytest.fixture
def bearer(agent: AgentProcess) -> Bearer:
    def header(scope: str = "admin") -> dict[str, str]:
        token = (agent.folder / f"{scope}.token").read_text()
        return {"Authorization": f"Bearer {token}"}

    return header


@pytest.fixture(params=["nginx", "caddy"])
def kind(request: pytest.FixtureRequest) -> str:
    """The proxy of this run of the test."""
    name = str(request.param)
    if program(name) is None:
        pytest.skip(f"there is no {name} here: as root, packaging/workbench/test_packages brings it")
    return name


@pytest.fixture
def surroundings(agent: AgentProcess, certificate: tuple[Path, Path], unused_ports: PortRanges) -> Surroundings:
    return Surroundings(unused_ports()[0], *certificate, agent.socket)


@pytest.fixture
def proxy(kind: str, tmp_path: Path, surroundings: Surroundings) -> Iterator[Proxy]:
    """The proxy with the shipped file, run by root: on the agent's socket it could do everything itself."""
    with running(Proxy(kind, tmp_path / "proxy", surroundings)) as started:
        yield started
