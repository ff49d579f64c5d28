"""What tests ask of systemd, of the kernel and of a llama-server, past the agent."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import locations

from magi_agent.host.listeners import listeners

SCRIPT_MODE = 0o755

HELP = "--host HOST  address\n--port PORT  port\n--alias STRING  names\n--metrics  counters"
"""What a stand-in says it can do; the agent asks before it starts one."""

STAND_IN = """
import http.server, os, signal, sys, time

if sys.argv[1:] == ["--help"]:
    print({help!r})
    sys.exit()

def stop(number, frame):
    {stop}

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({health})
        self.end_headers()

signal.signal(signal.SIGTERM, stop)
host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), Healthy).serve_forever()
"""


async def systemctl(*arguments: str) -> str:
    """Run ``systemctl --user`` and return what it prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        "systemctl", "--user", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode()
    return output.decode().strip()


async def properties(unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit as ``systemctl show`` prints them."""
    lines = (await systemctl("show", unit, *(f"--property={name}" for name in names))).splitlines()
    return dict(line.partition("=")[::2] for line in lines)


def processes_of(control_group: str) -> list[int]:
    """The processes in a control group of systemd's; none where the group is gone."""
    for hierarchy in ("unified", "systemd", ""):
        file = Path("/sys/fs/cgroup", hierarchy, control_group.lstrip("/"), "cgroup.procs")
        if file.exists():
            return [int(line) for line in file.read_text().split()]
    return []


def is_free(port: int) -> bool:
    """Whether nobody listens on a port."""
    return not listeners(port)


async def complete(url: str, tokens: int = 4) -> str:
    """Have the server at ``url`` write on; returns the text."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/completion", json={"prompt": "a", "n_predict": tokens}) as response,
    ):
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        assert answer["tokens_predicted"] == tokens
        return str(answer["content"])


def script(path: Path, *lines: str, interpreter: str = "/bin/sh") -> Path:
    """Write a program that stands in for llama-server where a fault is wanted that a real one does not have."""
    answers = [f'if [ "$1" = --help ]; then echo "{HELP}"; exit; fi'] if interpreter == "/bin/sh" else []
    path.write_text("\n".join([f"#!{interpreter}", *answers, *lines, ""]))
    path.chmod(SCRIPT_MODE)
    return path


def stand_in(path: Path, *, stop: str = "os._exit(0)", health: int = 200) -> Path:
    """Write a program that answers on ``/health`` and nowhere else; ``stop`` is what it does on SIGTERM, in Python."""
    return script(path, STAND_IN.format(stop=stop, health=health, help=HELP), interpreter=str(locations.PYTHON))
