"""What a transient unit may be, and that systemd keeps it as it was given."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

import locations
import pytest

from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.transient import Restart, Sandbox, TransientService
from tests.systemd.units import MakeName, systemctl, until

ODD_ENVIRONMENT = {
    "DOLLAR": "$HOME ${HOME} $$ $",
    "SEMICOLON": "a ; b; ;c \\; d",
    "QUOTES": 'it\'s "quoted" `so`',
    "BACKSLASH": "\\ \\\\ \\n \\x41 C:\\dir\\",
    "PERCENT": "100% %n %i %% %h",
    "SPACES": "  two  and\ttab  ",
    "UNICODE": "größe — 模型 → 🙂",
    "JSON": '{"a": [1, "x y"], "b": null, "c": "\\"$HOME\\""}',
    "EMPTY": "",
    "EQUALS": "a=b=c",
    "HASH": "# no comment",
    "LONG": "x" * 20_000,
}
ODD_ARGUMENTS = (
    "two words",
    "it's",
    '"quoted"',
    "back\\slash",
    "100%",
    "%n",
    "模型 → 🙂",
    "",
    "#",
    "=",
    "*",
    "~",
    "@x",
    "-",
)

REPORT = """\
import json, os, signal, socket, sys
connection = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
connection.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode() + b"\\n")
signal.pause()
"""


def service(**changes: object) -> TransientService:
    arguments = {"name": "x.service", "description": "x", "argv": ("/bin/true",), **changes}
    return TransientService(**arguments)  # type: ignore[arg-type]


class Reports:
    """What units sent, one after another: their arguments and their environment."""

    def __init__(self, port: int, script: Path) -> None:
        self.port = port
        self.script = script
        self._arrived: asyncio.Queue[tuple[list[str], dict[str, str]]] = asyncio.Queue()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arguments, environment = json.loads(await reader.readline())
        self._arrived.put_nowait((arguments, environment))
        writer.close()

    async def next(self) -> tuple[list[str], dict[str, str]]:
        async with asyncio.timeout(20):
            return await self._arrived.get()


@pytest.fixture
async def reports(tmp_path: Path) -> AsyncIterator[Reports]:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        reports = Reports(listening.getsockname()[1], script)
        async with await asyncio.start_server(reports.take, sock=listening, limit=1 << 20):
            yield reports


async def test_environment_and_arguments_survive_a_reload_and_a_restart(
    manager: SystemdManager, unit_name: MakeName, reports: Reports
) -> None:
    name = unit_name("odd")
    unit = service(
        name=name,
        description="odd: 100% größe",
        argv=(str(locations.PYTHON), str(reports.script), *ODD_ARGUMENTS),
        environment={**ODD_ENVIRONMENT, "PORT": str(reports.port)},
        restart=Restart.ON_FAILURE,
        restart_sec=0.1,
        sandbox=Sandbox.NONE,
    )
    assert await manager.start_transient(unit, limit=30) is JobResult.DONE
    first = await reports.next()
    described = manager.get(name)

    systemctl("daemon-reload")
    await until(lambda: manager.connected, "the manager is followed")
    again = await manager.refresh(name)
    assert described is not None
    assert again is not None
    os.kill(again.main_pid or 0, signal.SIGKILL)
    second = await reports.next()

    for arguments, environment in (first, second):
        assert arguments == list(ODD_ARGUMENTS)
        assert {key: environment.get(key) for key in ODD_ENVIRONMENT} == ODD_ENVIRONMENT
    for unit_status in (described, again):
        assert unit_status.argv == unit.argv
        assert set(unit_status.environment) == {f"{key}={value}" for key, value in unit.environment.items()}
        assert unit_status.description == unit.description


async def test_a_sandboxed_unit_still_sees_its_folders_after_a_reload_and_a_restart(
    manager: SystemdManager, unit_name: MakeName, reports: Reports, tmp_path: Path
) -> None:
    # Below /tmp, which the sandbox replaces; and with a name that systemd 252 would not read again.
    folder = tmp_path / "models: 'mine'"
    folder.mkdir()
    script = folder / "report.py"
    script.write_text(REPORT)
    unit = service(
        name=unit_name("folders"),
        argv=(str(locations.PYTHON), str(script)),
        environment={"PORT": str(reports.port)},
        restart=Restart.ON_FAILURE,
        restart_sec=0.1,
        read_only_paths=(PurePosixPath(folder),),
        sandbox=Sandbox.GPU,
    )
    await manager.start_transient(unit, limit=30)
    await reports.next()

    systemctl("daemon-reload")
    systemctl("kill", "--signal=KILL", unit.name)

    await reports.next()


@pytest.mark.parametrize(
    "name",
    ["magi-llama-smollm2-135m.q4_1.service", "a@b.service", "x:y.service", "a\\x2db.service", f"{'a' * 247}.service"],
)
def test_names_of_services_are_taken(name: str) -> None:
    assert service(name=name).name == name


@pytest.mark.parametrize(
    "name", ["", ".service", "x", "x.socket", "a b.service", "a/b.service", "é.service", f"{'a' * 248}.service"]
)
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name for a service unit"):
        service(name=name)


def test_a_slice_has_a_slices_name() -> None:
    assert service(slice="magi-llama.slice").slice == "magi-llama.slice"
    with pytest.raises(ValueError, match="no name for a slice"):
        service(slice="magi-llama.service")


@pytest.mark.parametrize("argv", [(), ("true",), ("bin/true",)])
def test_a_program_is_named_by_its_absolute_path(argv: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        service(argv=argv)


@pytest.mark.parametrize("argument", ["$HOME", "a$", ";", "a;b"])
def test_what_systemd_would_change_in_arguments_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="use the environment"):
        service(argv=("/bin/true", argument))


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "\r", "\x1b[31m", "\x7f", "lone \ud800"])
@pytest.mark.parametrize(
    "place",
    [
        "argv",
        "environment",
        "description",
        "syslog_identifier",
        "log_extra_fields",
        "read_only_paths",
        "working_directory",
        "standard_output",
    ],
)
def test_what_is_no_line_of_text_is_refused(text: str, place: str) -> None:
    values: dict[str, object] = {
        "argv": ("/bin/true", text),
        "environment": {"X": text},
        "log_extra_fields": {"X": text},
        "read_only_paths": (PurePosixPath("/", text),),
        "working_directory": PurePosixPath("/", text),
        "standard_output": PurePosixPath("/", text),
    }
    with pytest.raises(ValueError, match=r"control character|UTF-8"):
        service(**{place: values.get(place, text)})


def test_a_tab_is_fine_in_the_environment_only() -> None:
    assert service(environment={"X": "a\tb"}).environment["X"] == "a\tb"
    with pytest.raises(ValueError, match="control character"):
        service(argv=("/bin/true", "a\tb"))


@pytest.mark.parametrize("key", ["", "1X", "A B", "A=B", "É", "X\n"])
def test_names_of_variables_that_are_none_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="no name for an environment variable"):
        service(environment={key: "x"})


@pytest.mark.parametrize("name", ["", "x", "x.socket", "a b.service", "x.service\n"])
def test_only_services_are_wanted(name: str) -> None:
    with pytest.raises(ValueError, match="no name for a service unit"):
        service(wants=(name,))


@pytest.mark.parametrize("key", ["", "magi", "_MAGI", "1X", "X" * 65, "X\n"])
def test_names_of_journal_fields_that_are_none_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="no name for a journal field"):
        service(log_extra_fields={key: "x"})


@pytest.mark.parametrize("path", ["models", "/models/../etc"])
@pytest.mark.parametrize(
    "place",
    [
        "working_directory",
        "standard_output",
        "io_read_bandwidth_max",
        "read_only_paths",
        "requires_mounts_for",
        "environment_files",
        "load_credentials",
    ],
)
def test_folders_are_absolute_and_go_nowhere_else(path: str, place: str) -> None:
    folder = PurePosixPath(path)
    values: dict[str, object] = {
        "working_directory": folder,
        "standard_output": folder,
        "io_read_bandwidth_max": (folder, 1),
        "load_credentials": {"key": folder},
    }
    with pytest.raises(ValueError, match="no absolute path"):
        service(**{place: values.get(place, (folder,))})


@pytest.mark.parametrize("name", ["", "/run/x", "a//b", "a/", "../a", "a/../b", ".a", "a b", "a:b", "a%t", "a\n"])
def test_directories_are_names_below_the_managers(name: str) -> None:
    with pytest.raises(ValueError, match="runtime directory"):
        service(runtime_directory=name)
    with pytest.raises(ValueError, match="cache directory"):
        service(cache_directories=("magi-llama/x", name))


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a b", "a\n", "x" * 256])
def test_names_of_credentials(name: str) -> None:
    with pytest.raises(ValueError, match="credential"):
        service(load_credentials={name: PurePosixPath("/run/key")})


@pytest.mark.parametrize("path", ["/run/a b", "/run/a:b", "/run/'a", "/run/a%t", "/run/$a", "/run/a\\b"])
def test_a_credential_that_systemd_would_not_read_again_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="cannot read a credential"):
        service(load_credentials={"key": PurePosixPath(path)})
