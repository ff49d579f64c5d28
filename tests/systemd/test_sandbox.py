"""What the user scope's sandboxes promise is in effect in a running unit."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Any

import locations
import pytest

from magi_agent.systemd.jobs import JobResult
from magi_agent.systemd.manager import SystemdManager
from magi_agent.systemd.sandbox import sandbox_entries
from magi_agent.systemd.transient import Sandbox, TransientService
from magi_agent.vocabulary import Scope
from tests.systemd import sandbox_probe
from tests.systemd.units import MakeName

Probe = Callable[[Sandbox], Awaitable[dict[str, Any]]]

ALLOWED = {"write /tmp", "write /var/tmp", "read own folder", "AF_INET", "AF_INET6", "AF_UNIX"}
DENIED = {
    "write /usr": "EROFS",
    "write /etc": "EROFS",
    "write /var": "EROFS",
    "write /root": "EROFS",
    "write own folder": "EROFS",
    "make a control group": "EROFS",
    "see the tests' /tmp": "ENOENT",
    "AF_NETLINK": "EAFNOSUPPORT",
    "AF_PACKET": "EAFNOSUPPORT",
    "new user namespace": "EPERM",
    "new UTS namespace": "EPERM",
    "real-time scheduling": "EPERM",
    "set-user-id file": "EPERM",
    "change an owner": "EPERM",
    "be traced": "EPERM",
    "change personality": "EPERM",
    "mount": "EPERM",
    "unload a module": "EPERM",
    "set the host name": "EPERM",
}


@pytest.fixture
def probe(manager: SystemdManager, unit_name: MakeName, tmp_path: Path) -> Probe:
    """Runs the probe in a unit with a sandbox, and returns its report."""

    async def run(sandbox: Sandbox) -> dict[str, Any]:
        shown = tmp_path / "shown"
        shown.mkdir(exist_ok=True)
        script = Path(shutil.copy(str(sandbox_probe.__file__), shown))
        outside = tmp_path / "outside"
        outside.touch()
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answer.set_result(await reader.read())
            writer.close()

        with socket.create_server(("127.0.0.1", 0)) as listening:
            unit = TransientService(
                name=unit_name("sandbox"),
                description="tries its sandbox",
                argv=(str(locations.PYTHON), str(script), str(listening.getsockname()[1])),
                environment={"OUTSIDE": str(outside)},
                read_only_paths=(PurePosixPath(shown),),
                sandbox=sandbox,
            )
            async with await asyncio.start_server(take, sock=listening):
                assert await manager.start_transient(unit, limit=30) is JobResult.DONE
                async with asyncio.timeout(30):
                    report = json.loads(await answer)
        assert isinstance(report, dict)
        return report

    return run


async def test_without_a_sandbox_everything_can_be_done(probe: Probe) -> None:
    # Or the other tests would prove nothing.
    report = await probe(Sandbox.NONE)

    # There is no such module, or the kernel has none at all.
    assert report["outcomes"].pop("unload a module") in {"ENOENT", "ENOSYS"}
    assert set(report["outcomes"].values()) == {"ok"}, report["outcomes"]
    assert (report["NoNewPrivs"], report["Seccomp"]) == ("0", "0")
    assert report["uid_map"] == ["0", "0", "4294967295"]


@pytest.mark.parametrize(
    ("sandbox", "code_at_run_time"), [(Sandbox.GPU, "ok"), (Sandbox.CPU, "EPERM")], ids=lambda value: str(value)
)
async def test_what_the_table_promises_is_in_effect(probe: Probe, sandbox: Sandbox, code_at_run_time: str) -> None:
    report = await probe(sandbox)

    assert report["outcomes"] == {
        **dict.fromkeys(ALLOWED, "ok"),
        **DENIED,
        "code made at run time": code_at_run_time,
    }
    assert (report["NoNewPrivs"], report["Seccomp"], report["umask"]) == ("1", "2", "0077")
    assert report["uid_map"] != ["0", "0", "4294967295"]
    # Nothing of the host's /tmp but the way to the folder that was to be shown.
    assert len(report["tmp"]) == 1


def test_every_attempt_has_its_expectation() -> None:
    assert sandbox_probe.ATTEMPTS.keys() == ALLOWED | DENIED.keys() | {"code made at run time"}


@pytest.mark.parametrize("scope", list(Scope))
def test_no_sandbox_is_nothing_at_all(scope: Scope) -> None:
    assert sandbox_entries(Sandbox.NONE, scope, 999) == ()
