"""An agent at work without OpenSSL, and the first scrape, which imports what tells metrics. The agent is a real one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.agent_process import AgentProcess, ended, wait_until
from tests.conftest import MakeToyModel, PortRanges, SystemdUser

MODEL = "no-tls-one"
HELD_IMPORT = """\
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).parent


class Held:
    def find_spec(self, name, path=None, target=None):
        if name == "magi_agent.metrics.prometheus_parts":
            with (FOLDER / "imports").open("a") as file:
                file.write(f"{threading.current_thread() is threading.main_thread()}\\n")
            while not (FOLDER / "go").exists():
                time.sleep(0.01)
        return None


sys.meta_path.insert(0, Held())
"""
"""What the first scrape imports takes until a file is there."""
WITHOUT = """\
from magi_agent import without_openssl
import hashlib, hmac, sys
print(*(hashlib.new(name).hexdigest()[:16] for name in ("sha256", "md5", "blake2b")))
print(hmac.compare_digest(b"a", b"a"))
try:
    import ssl
    print(True)
except ModuleNotFoundError:
    print(False)
"""


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, toy_model: MakeToyModel, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    """An agent that is not started yet, with one model."""
    toy_model(tmp_path / "models" / f"{MODEL}.gguf", name="One")
    with ended(AgentProcess(tmp_path, tmp_path / "models", unused_ports(4), llama_server), "magi-llama-no-tls-*") as it:
        yield it


def mapped(agent: AgentProcess) -> set[str]:
    """What the agent has mapped of that which is left out: OpenSSL, Python's modules on it, and the library of C++."""
    assert agent.process is not None
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert "libc.so" in maps
    return set(re.findall(r"/(libssl|libcrypto|_ssl|_hashlib|libstdc\+\+)[^/\n]*$", maps, re.MULTILINE))


def test_an_agent_at_work_has_no_openssl(agent: AgentProcess) -> None:
    agent.start()
    agent.wait_settled()
    assert mapped(agent) == set()
    agent.must("POST", f"/api/models/servers/{MODEL}/start?wait=60")
    agent.must("POST", "/v1/completions", {"model": MODEL, "prompt": "hello", "max_tokens": 2})
    for path in ("models/registry", f"models/{MODEL}/memory", "host", "export", "openapi.json", "docs"):
        agent.must("GET", f"/api/{path}")
    assert mapped(agent) == set()

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(agent.text, ["/metrics"] * 2))

    for answer in answers:
        assert f'magi_server_scrape_success{{model="{MODEL}"}} 1.0' in answer
        # Counted from the agent's start, and not from the scrape.
        assert 'magi_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0' in answer
    assert mapped(agent) == set()
    assert agent.stop() == 0


def test_the_first_scrapes_import_once_and_hold_nobody_up(agent: AgentProcess) -> None:
    (agent.folder / "sitecustomize.py").write_text(HELD_IMPORT)
    agent.settings["PYTHONPATH"] = str(agent.folder)
    agent.start()
    agent.wait_settled()
    imports = agent.folder / "imports"
    assert not imports.exists()
    with ThreadPoolExecutor(4) as pool:
        scrapes = [pool.submit(agent.text, "/metrics") for _ in range(4)]
        try:
            wait_until(imports.exists, "the first scrape imports")
            assert agent.ask("GET", "/health/live").status == 200
            assert MODEL in agent.must("GET", "/api/models/registry")["models"]
            assert not any(scrape.done() for scrape in scrapes)
        finally:
            (agent.folder / "go").touch()
        answers = [scrape.result() for scrape in scrapes]
    assert all("magi_agent_ready 1.0" in answer for answer in answers)
    assert imports.read_text() == "False\n", "once, and not in the thread of the event loop"


def test_what_is_left_out_can_be_done_without() -> None:
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()  # fmt: skip
    assert told == ["e3b0c44298fc1c14", "d41d8cd98f00b204", "786a02f742015903", "True", "False"]
