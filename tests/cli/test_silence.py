"""An agent that takes the connection and does not answer: what is said meanwhile, and of one that cannot start."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import locations
import pytest

from magi_agent.cli.address import SocketAddress
from magi_agent.cli.client import Client
from magi_agent.cli.silence import Silence
from tests.cli.terminal import on_terminal, piped, surroundings
from tests.conftest import SystemdUser

SERVICE, SOCKET = "magi-agent.service", "magi-agent.socket"
SLOW = """
import os, socket, time
time.sleep({before})
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
    told.connect(os.environ["NOTIFY_SOCKET"])
    told.send(b"READY=1\\nSTATUS=it thinks")
time.sleep({after})
body = b'{{"error": "Unwell", "message": "it is I"}}'
while True:
    connection, _ = socket.socket(fileno=os.dup(3)).accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 x\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
    connection.close()
"""
LEAVING = """
import os, signal, socket, sys, time
told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
told.connect(os.environ["NOTIFY_SOCKET"])
def leave(*_):
    told.send(b"STOPPING=1\\nSTATUS=finishing 1 request, at most 4 s")
    time.sleep(4)
    sys.exit()
signal.signal(signal.SIGTERM, leave)
told.send(b"READY=1")
if os.path.exists("{folder}/again"):
    body = b'{{"error": "Unwell", "message": "it is I"}}'
    connection, _ = socket.socket(fileno=os.dup(3)).accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 x\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
open("{folder}/again", "w")
signal.pause()
"""
"""One that is stopped for as long as it takes it to finish, and whose next one answers."""
Install = Callable[[str, str], dict[str, str]]


def _systemctl(*words: str) -> None:
    subprocess.run(["systemctl", "--user", *words], check=False, capture_output=True, timeout=60)


@pytest.fixture
def install(systemd_user: SystemdUser) -> Iterator[Install]:
    """Puts the agent's units into the user's manager, as a user has them, and says the environment of `magictl`."""
    runtime = os.environ["XDG_RUNTIME_DIR"]
    units = Path(runtime, "systemd", "user")
    units.mkdir(parents=True, exist_ok=True)

    def put(command: str, more: str) -> dict[str, str]:
        (units / SOCKET).write_text("[Socket]\nListenStream=%t/magi-agent/api.sock\nFileDescriptorName=api\n")
        (units / SERVICE).write_text(
            "[Unit]\nStartLimitIntervalSec=0\n"
            f"[Service]\nType=notify\nNotifyAccess=all\nExecStart={command}\nRestart=always\nRestartSec=1\n"
            f"RestartPreventExitStatus=78\n{more}\n"
        )
        _systemctl("daemon-reload")
        _systemctl("start", SOCKET)
        return surroundings(XDG_RUNTIME_DIR=runtime, DBUS_SESSION_BUS_ADDRESS=os.environ["DBUS_SESSION_BUS_ADDRESS"])

    yield put
    _systemctl("stop", SOCKET, SERVICE)
    _systemctl("reset-failed", SOCKET, SERVICE)
    for name in (SOCKET, SERVICE):
        (units / name).unlink(missing_ok=True)
    _systemctl("daemon-reload")
    shutil.rmtree(Path(runtime, "magi-agent"), ignore_errors=True)


@pytest.mark.parametrize("words", [("status",), ("start", "some-model"), ("--json", "models")])
def test_an_agent_that_cannot_start_is_said_at_once(install: Install, tmp_path: Path, words: tuple[str, ...]) -> None:
    wrong = tmp_path / "agent.toml"
    wrong.write_text("[servers]\nport_rage = 1\n")
    environment = install(str(locations.VENV / "bin" / "magi-agent"), f"Environment=MAGI_CONFIG={wrong}")
    began = time.monotonic()

    told = piped(*words, environment=environment)

    assert told.returncode == 3
    assert told.stdout == ""
    assert time.monotonic() - began < 15
    message = json.loads(told.stderr)["message"] if "--json" in words else told.stderr
    assert "cannot start: magi-agent.service is " in message
    assert "see: systemctl --user status magi-agent.service; journalctl --user -u magi-agent.service -e" in message
    if words == ("status",):
        assert told.stderr.startswith("waiting for the agent: magi-agent.service is ")


def test_one_that_takes_its_time_is_waited_for_and_that_is_said(install: Install) -> None:
    environment = install(f"{locations.PYTHON} -c '{_escaped(SLOW.format(before=2.5, after=0))}'", "")

    told = piped("models", environment=environment)

    assert told.returncode == 1
    assert told.stderr == (
        "waiting for the agent: magi-agent.service is activating (start); Ctrl-C gives up\nmagictl: it is I\n"
    )


def test_one_that_runs_and_thinks_is_said_to(install: Install) -> None:
    environment = install(f"{locations.PYTHON} -c '{_escaped(SLOW.format(before=0, after=2))}'", "")

    told = piped("models", environment=environment)

    assert told.stderr == (
        "waiting for the agent: magi-agent.service is active (running): it thinks; Ctrl-C gives up\nmagictl: it is I\n"
    )


def test_one_that_was_asked_to_take_its_time_is_not_wondered_at(install: Install) -> None:
    environment = install(f"{locations.PYTHON} -c '{_escaped(SLOW.format(before=0, after=2))}'", "")

    told = piped("start", "some-model", "--wait", "20", environment=environment)

    assert "it is I" in told.stderr
    assert "waiting for the agent" not in told.stderr


def test_one_that_crashed_once_and_comes_up_is_waited_for(install: Install, tmp_path: Path) -> None:
    code = f"import os\nif not os.path.exists('{tmp_path}/once'):\n    open('{tmp_path}/once', 'w'); os._exit(1)\n"
    script = tmp_path / "agent"
    script.write_text(f"#!{locations.PYTHON}\n{code}{SLOW.format(before=0.5, after=0)}")
    script.chmod(0o755)

    told = piped("models", environment=install(str(script), ""))

    assert told.returncode == 1
    assert told.stderr.endswith("\nmagictl: it is I\n")


def test_what_an_agent_takes_to_finish_what_it_was_asked_is_nobodys_limit(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magi_agent.cli.client._PATIENT_SECONDS", 1.0)
    script = tmp_path / "agent"
    script.write_text(f"#!{locations.PYTHON}\n{LEAVING.format(folder=tmp_path)}")
    script.chmod(0o755)
    environment = install(str(script), "")
    _systemctl("start", SERVICE)
    _systemctl("restart", "--no-block", SERVICE)
    address = SocketAddress(Path(environment["XDG_RUNTIME_DIR"], "magi-agent", "api.sock").as_posix())
    said: list[str] = []
    began = time.monotonic()

    answer = Client(address, silence=Silence(address, said.append, environment)).ask("GET", "/", timeout=2)

    assert answer.status == 500
    assert 2 < time.monotonic() - began < 15
    [line] = said
    assert line.endswith("service is deactivating (stop-sigterm): finishing 1 request, at most 4 s; Ctrl-C gives up")


def test_where_systemd_knows_nothing_the_silence_alone_is_said(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with on_terminal("status", environment=surroundings(MAGI_SOCKET=str(path))) as terminal:
            terminal.wait_for(lambda text: "Ctrl-C gives up" in text, "it is said")
            terminal.type("\x03")
            assert terminal.end() == 1
    assert f"waiting for the agent: nothing comes from {path} yet; Ctrl-C gives up" in terminal.text
    assert "interrupted" in terminal.text


def _escaped(code: str) -> str:
    """A program as a word of a unit file, in single quotes."""
    return code.replace("\\", "\\\\").replace("'", "\\'").replace("%", "%%").replace("\n", "\\n")
