"""Sockets that a real systemd made and handed over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import locations
import pytest

from magi_agent.systemd.socket_activation import inherited_sockets
from tests.conftest import PortRanges
from tests.systemd.units import MakeName, run, wait_until

PROGRAM = f"""
import json, os, pathlib, sys
sys.path.insert(0, {str(locations.CHECKOUT)!r})
from magi_agent.errors import ConfigurationError
from magi_agent.systemd.socket_activation import inherited_sockets

report = pathlib.Path(sys.argv[1])
if sys.argv[2:] == ["ours"]:
    os.environ["LISTEN_PID"] = str(os.getpid())
try:
    sockets = inherited_sockets(os.environ)
except ConfigurationError as error:
    told = {{"error": str(error)}}
else:
    told = {{
        "sockets": [[name, s.family.name, s.getsockname(), s.get_inheritable()] for name, s in sockets],
        "variables": [name for name in os.environ if name.startswith("LISTEN_")],
    }}
    if sockets and sockets[0][1].type.name == "SOCK_STREAM":
        connection, _ = sockets[0][1].accept()
        connection.sendall(b"hello")
        connection.close()
report.with_suffix(".new").write_text(json.dumps(told))
report.with_suffix(".new").rename(report)
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, str, str]:
    """A program that tells in a file what it was handed."""
    script = tmp_path / "activated.py"
    script.write_text(PROGRAM)
    return sys.executable, str(script), str(tmp_path / "report")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report"


def told(report: Path) -> Any:
    wait_until(report.exists, "the program tells what it got")
    return json.loads(report.read_text())


def activate(name: str, program: tuple[str, ...], *properties: str) -> None:
    words = [f"--socket-property={item}" for item in properties]
    unit = f"--unit={name.removesuffix('.socket')}"
    run("systemd-run", "--user", "--quiet", unit, *words, *program)


def test_sockets_come_with_their_names_in_their_order(
    unit_name: MakeName, program: tuple[str, ...], report: Path, tmp_path: Path, unused_ports: PortRanges
) -> None:
    port, _ = unused_ports()
    name = unit_name("activated", ".socket")
    activate(
        name,
        program,
        f"ListenStream=127.0.0.1:{port}",
        f"ListenStream={tmp_path}/api.sock",
        "FileDescriptorName=api",
    )

    # The kernel holds the connection until the program, which it starts, accepts it.
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        assert client.recv(16) == b"hello"

    assert told(report) == {
        "sockets": [
            ["api", "AF_INET", ["127.0.0.1", port], False],
            ["api", "AF_UNIX", f"{tmp_path}/api.sock", False],
        ],
        "variables": [],
    }


def test_what_is_no_socket_is_refused_in_words(
    unit_name: MakeName, program: tuple[str, ...], report: Path, tmp_path: Path
) -> None:
    name = unit_name("fifo", ".socket")
    activate(name, program, f"ListenFIFO={tmp_path}/fifo", "FileDescriptorName=pipe")

    (tmp_path / "fifo").write_text("wake up")

    error = told(report)["error"]
    assert error.startswith("systemd handed over 'pipe' (file descriptor 3), which is no socket")


def test_what_a_program_in_between_passes_on_is_not_taken(
    program: tuple[str, ...], report: Path, unused_ports: PortRanges
) -> None:
    port, _ = unused_ports()
    # The shell does not become the program: it starts it, with variables that name the shell's own process.
    between = ("sh", "-c", f"{' '.join(program)}; true")
    with subprocess.Popen(
        ["systemd-socket-activate", f"--listen=127.0.0.1:{port}", *between], stderr=subprocess.DEVNULL
    ) as front:
        try:
            wait_until(lambda: reachable(port), "it listens")
            assert told(report) == {"sockets": [], "variables": []}
        finally:
            front.kill()


def reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("names", "expected"),
    [(None, ["unknown", "unknown"]), ("", ["unknown", "unknown"]), ("a", ["a", "unknown"]), ("a:b:c", ["a", "b"])],
)
def test_a_socket_without_a_name_is_called_so(
    program: tuple[str, ...], report: Path, names: str | None, expected: list[str]
) -> None:
    variables = {"LISTEN_FDS": "2"} | ({} if names is None else {"LISTEN_FDNAMES": names})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one, socket.socket(socket.AF_INET6) as other:
        hand_over(one.fileno(), other.fileno(), program=program, variables=variables)

    assert [entry[:2] for entry in told(report)["sockets"]] == [[expected[0], "AF_UNIX"], [expected[1], "AF_INET6"]]


def hand_over(*descriptors: int, program: tuple[str, ...], variables: dict[str, str]) -> None:
    """Run the program with these files from 3 on, as systemd does; the program sets LISTEN_PID itself."""
    # By way of numbers above them all: one may be where another is to go.
    above = max(*descriptors, 2 + len(descriptors)) + 1
    moves = [f"os.dup2({descriptor}, {above + index})" for index, descriptor in enumerate(descriptors)]
    moves += [f"os.dup2({above + index}, {3 + index})" for index in range(len(descriptors))]
    script = f"import os; {'; '.join(moves)}; os.execv({program[0]!r}, {[*program, 'ours']!r})"
    subprocess.run(
        [sys.executable, "-c", script], pass_fds=descriptors, env={**os.environ, **variables}, check=True, timeout=20
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "api", "LISTEN_PIDFDID": "7"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
        {"LISTEN_PID": "self", "LISTEN_FDS": "1"},
    ],
)
def test_what_is_not_for_us_is_left_alone_and_forgotten(variables: dict[str, str]) -> None:
    environment = {**variables, "PATH": "/bin"}

    assert inherited_sockets(environment) == []

    assert environment == {"PATH": "/bin"}
