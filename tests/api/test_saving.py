"""A change is answered only when it is on disk: with a full disk and with a read-only one, both real."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.client import Api
from tests.api.conftest import Serve

DISK_BYTES = 256 * 1024
Faults = tuple[Callable[[], None], Callable[[], None], str]


def mount(*arguments: str) -> None:
    assert os.spawnvp(os.P_WAIT, "mount", ("mount", *arguments)) == 0


def unmount(*arguments: str) -> None:
    assert os.spawnvp(os.P_WAIT, "umount", ("umount", *arguments)) == 0


class Disk:
    """A small file system of the test's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with pytest.raises(OSError, match="No space left on device"):
            self._ballast.write_bytes(bytes(2 * DISK_BYTES))

    def make_room(self) -> None:
        self._ballast.unlink()

    def forbid_writing(self) -> None:
        # Over the one that is there, since nothing is made read-only that somebody has open for writing.
        mount("--bind", str(self.path), str(self.path))
        mount("-o", "remount,bind,ro", str(self.path))

    def allow_writing(self) -> None:
        unmount(str(self.path))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounted in this process's own mount namespace."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0755", "tmpfs", str(path))
    yield Disk(path)
    while path.is_mount():
        unmount("--lazy", str(path))


@pytest.fixture(params=["full", "read-only"])
def broken_and_mended(request: pytest.FixtureRequest, disk: Disk) -> Faults:
    """What breaks the disk, what mends it, and what the system says meanwhile."""
    if request.param == "full":
        return disk.fill, disk.make_room, "No space left on device"
    return disk.forbid_writing, disk.allow_writing, "Read-only file system"


async def serve_from(serve: Serve, disk: Disk) -> Api:
    api = await serve(
        "api-one", registry_path=str(disk.path / "registry.json"), profiles_path=str(disk.path / "profiles")
    )
    (await api.ask("POST", "/api/models/profiles", {"name": "day", "description": "before"})).success(201)
    return api


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("tier", {"tier": "fast"}, "tierOverride"),
        ("thinking", {"thinking": True}, "thinkingOverride"),
        ("enabled", {"enabled": True}, "enabled"),
        ("enabled?apply=true", {"enabled": True}, "enabled"),
    ],
)
async def test_a_choice_that_cannot_be_saved_is_undone(
    serve: Serve,
    disk: Disk,
    broken_and_mended: Faults,
    path: str,
    body: dict[str, object],
    key: str,
) -> None:
    breaking, mending, reason = broken_and_mended
    api = await serve_from(serve, disk)
    before = await api.get("/api/models/registry")
    stored = (disk.path / "registry.json").read_bytes()

    breaking()
    details = (await api.ask("PUT", f"/api/models/api-one/{path}", body)).failure(500, "RegistrySaveFailed")

    assert details == {"path": str(disk.path / "registry.json"), "reason": reason}
    # A scan may have ended meanwhile; it changes nothing else.
    assert {**await api.get("/api/models/registry"), "lastScan": None} == {**before, "lastScan": None}
    assert (disk.path / "registry.json").read_bytes() == stored
    assert not list(disk.path.glob("**/*.tmp")), "nothing half written is left"
    assert await api.state("api-one") == "stopped"
    mending()
    query = "&wait=60" if "apply" in path else ""
    (await api.ask("PUT", f"/api/models/api-one/{path}{query}", body)).success()
    assert (await api.model("api-one"))[key] == next(iter(body.values()))


async def test_a_profile_that_cannot_be_saved_is_not_there(serve: Serve, disk: Disk, broken_and_mended: Faults) -> None:
    breaking, mending, reason = broken_and_mended
    api = await serve_from(serve, disk)

    breaking()
    details = (await api.ask("POST", "/api/models/profiles", {"name": "night"})).failure(500, "ProfileCreationFailed")
    replaced = await api.ask("PUT", "/api/models/profiles/day", {"name": "day", "description": "after"})

    assert details == {"path": str(disk.path / "profiles" / "night.yaml"), "reason": reason}
    assert replaced.failure(500, "ProfileSaveFailed")["reason"] == reason
    assert await api.get("/api/models/profiles") == ["day"]
    assert (await api.get("/api/models/profiles/day"))["description"] == "before"
    assert not list(disk.path.glob("**/*.tmp")), "nothing half written is left"
    mending()
    (await api.ask("POST", "/api/models/profiles", {"name": "night"})).success(201)


async def test_a_profile_on_a_read_only_disk_is_not_deleted(serve: Serve, disk: Disk) -> None:
    api = await serve_from(serve, disk)

    disk.forbid_writing()
    (await api.ask("DELETE", "/api/models/profiles/day")).failure(500, "ProfileSaveFailed")

    assert await api.get("/api/models/profiles") == ["day"]
    disk.allow_writing()
    (await api.ask("DELETE", "/api/models/profiles/day")).success()


async def test_a_start_that_cannot_be_remembered_does_not_happen(
    serve: Serve, disk: Disk, broken_and_mended: Faults
) -> None:
    breaking, mending, _ = broken_and_mended
    api = await serve_from(serve, disk)
    (await api.ask("PUT", "/api/models/api-one/enabled", {"enabled": True})).success()

    breaking()
    (await api.ask("POST", "/api/models/servers/api-one/start")).failure(500, "RegistrySaveFailed")
    operation = (await api.ask("POST", "/api/models/servers/start-all?wait=30")).success()

    assert await api.state("api-one") == "stopped"
    assert operation["models"]["api-one"]["status"] == "failed"
    mending()
    (await api.ask("POST", "/api/models/servers/api-one/start?wait=60")).success()
