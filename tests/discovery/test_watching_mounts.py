"""Disks that come and go, and file systems on which no event tells of changes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from magi_agent.discovery.answering import AnsweringFileSystems
from magi_agent.discovery.file_systems import MountTable
from magi_agent.errors import RescanFailed
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import model_bytes, write_file
from tests.fuse_mount import FuseMount, fuse_mount
from tests.registry.kept_inventory import LONG, Kept, eventually, keeping

# From real hosts: a server with disks and network shares, a container, a virtual machine.
SERVER = """\
22 28 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
23 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
28 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
31 24 0:26 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw,inode64
91 28 8:1 / /srv/models rw,noatime shared:46 - xfs /dev/sda1 rw,attr2,inode64,logbufs=8,noquota
95 91 8:17 / /srv/models/big\\040disk rw,relatime shared:50 - btrfs /dev/sdb1 rw,ssd,space_cache=v2,subvolid=5,subvol=/
99 28 0:45 / /mnt/nas rw,relatime shared:52 - nfs4 nas:/export/models rw,vers=4.2,rsize=1048576,hard,proto=tcp
103 28 0:46 / /mnt/share rw,relatime shared:54 - cifs //nas/models rw,vers=3.1.1,cache=strict,username=magi
110 28 0:50 / /home/me/remote rw,nosuid,nodev,relatime shared:60 - fuse.sshfs me@host:/models rw,user_id=1000
112 28 8:33 / /media/usb rw,nosuid,nodev,relatime shared:62 - fuseblk /dev/sdc1 rw,user_id=0,group_id=0,allow_other
115 28 0:52 / /pool rw,relatime shared:64 - fuse.mergerfs a:b rw,user_id=0,group_id=0,allow_other
120 28 0:55 / /mnt/auto rw,relatime shared:70 - autofs systemd-1 rw,fd=50,pgrp=1,timeout=0,minproto=5,maxproto=5,direct
121 120 0:56 / /mnt/auto rw,relatime shared:72 - nfs nas:/auto rw,vers=3
130 28 259:2 /var/lib/models /exported rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
"""
CONTAINER = """\
1530 1262 0:151 / / rw,relatime master:432 - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/o/diff,workdir=/o/work
1531 1530 0:154 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
1540 1530 254:1 /models /models ro,relatime - ext4 /dev/vda1 rw,discard
1541 1530 0:160 / /host rw,relatime - 9p host rw,trans=virtio,version=9p2000.L
1542 1530 0:161 / /shared rw,relatime - virtiofs shared rw
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, as root")


@pytest.mark.parametrize(
    ("path", "kind", "heard"),
    [
        ("/models", "ext4", True),
        ("/srv/models/a", "xfs", True),
        ("/srv/models/big disk/x", "btrfs", True),
        ("/srv/models/big", "xfs", True),
        ("/srv/models-too", "ext4", True),
        ("/mnt/nas", "nfs4", False),
        ("/mnt/nas/a/b", "nfs4", False),
        ("/mnt/share/a", "cifs", False),
        ("/home/me/remote/models", "fuse.sshfs", False),
        ("/media/usb/models", "fuseblk", True),
        ("/pool/models", "fuse.mergerfs", False),
        ("/mnt/auto/models", "nfs", False),
        ("/exported", "ext4", True),
        ("/dev/shm/x", "tmpfs", True),
    ],
)
def test_the_longest_mount_point_says_whether_a_folder_is_heard_of(path: str, kind: str, heard: bool) -> None:
    table = MountTable(SERVER)
    mount = table.mount_of(path)
    assert mount is not None
    assert (mount.kind, table.is_heard(path)) == (kind, heard)


def test_links_are_followed_up_to_a_server(tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    table = MountTable(f"1 0 8:1 / / rw - ext4 x rw\n2 1 0:9 / {remote} rw - nfs4 x rw\n")
    for path, target in {
        "plain/deep": None,
        "link": "plain",
        "up": "plain/../link",
        "far": f"{remote}/models",
        "loop": "loop",
        "dangling": "nowhere",
        "odd": "./plain//deep/",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        if target is None:
            (tmp_path / path).mkdir()
        else:
            (tmp_path / path).symlink_to(target)
    remote.symlink_to(tmp_path)  # were it asked, it would lead back

    for path in ("plain/deep", "link/deep", "up/deep", "dangling/x", "odd", "odd/..", "plain/./x", ""):
        assert table.resolve(f"{tmp_path}/{path}") == os.path.realpath(tmp_path / path), path
    assert table.resolve("/") == table.resolve("/..") == "/"
    for path in ("far/a", "remote/models/a", "up/../far//b/../a"):
        assert table.resolve(f"{tmp_path}/{path}") == f"{remote}/models/a", path
        assert not table.is_heard(table.resolve(f"{tmp_path}/{path}"))
    assert table.resolve(f"{tmp_path}/loop/a") == f"{tmp_path}/loop/a"


def test_in_a_container() -> None:
    table = MountTable(CONTAINER)
    assert [table.is_heard(path) for path in ("/elsewhere/models", "/models/a", "/host/models", "/shared")] == [
        True,
        True,
        False,
        False,
    ]
    assert table.unheard_devices() == {os.makedev(0, 160), os.makedev(0, 161)}


def test_the_mounts_that_concern_some_folders() -> None:
    table = MountTable(SERVER)
    assert {mount.point for mount in table.concerning(["/srv", "/mnt/nas/models"])} == {
        "/",
        "/srv/models",
        "/srv/models/big disk",
        "/mnt/nas",
    }


def test_without_a_table_and_with_nonsense_in_it_all_is_heard_of() -> None:
    for text in ("", "\n\n", "1 2 3\n", "x y z w v - nfs a b\n", "1 2 a:b / /m rw - nfs x rw\n", " - - - \n"):
        table = MountTable(text)
        assert table.is_heard("/m/models")
        assert not table.concerning(["/m"])


def test_the_table_of_this_machine() -> None:
    table = MountTable.now()
    mount = table.mount_of("/proc/self")
    assert mount is not None
    assert (mount.kind, mount.device) == ("proc", os.stat("/proc").st_dev)  # noqa: PTH116


def write_model(path: Path) -> Path:
    return write_file(path, model_bytes("llama", texts={"general.name": path.name}))


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr}")


def unmount(point: Path) -> None:
    subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)


@contextmanager
def unmounted_after(point: Path) -> Iterator[None]:
    try:
        yield
    finally:
        unmount(point)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@as_root
async def test_a_bind_mount_comes_and_goes_below_a_folder(tmp_path: Path, models: Path) -> None:
    disk, source = models / "disk", tmp_path / "source"
    disk.mkdir()
    write_model(source / "deep" / "bound.gguf")
    write_model(disk / "beneath.gguf")
    async with keeping([models], tmp_path) as kept:
        assert kept.ids == ["beneath"]
        with unmounted_after(disk):
            for number in range(3):
                await asyncio.to_thread(mount, "--bind", source, disk)
                await eventually(lambda: "bound" in kept.ids and "beneath" not in kept.ids, "what is on it is listed")
                write_model(source / f"next{number}.gguf")
                await eventually(kept.has(f"next{number}"), "it is watched")
                await asyncio.to_thread(unmount, disk)
                await eventually(lambda: kept.ids == ["beneath"], "what lies beneath is listed")
        write_model(disk / "last.gguf")
        await eventually(lambda: kept.ids == ["beneath", "last"], "and watched")


@as_root
async def test_a_disk_is_mounted_late_on_a_configured_folder_and_goes(tmp_path: Path, models: Path) -> None:
    always = write_model(tmp_path / "always" / "always.gguf").parent
    async with keeping([models, always], tmp_path) as kept:
        with unmounted_after(models):
            for number in range(2):
                await asyncio.to_thread(mount, "-t", "tmpfs", "none", models)
                write_model(models / "sub" / f"late{number}.gguf")
                await eventually(kept.lists("always", f"late{number}"), "it is listed")
                write_model(models / "sub" / f"next{number}.gguf")
                await eventually(kept.has(f"next{number}"), "and watched")
                await asyncio.to_thread(unmount, models)
                await eventually(lambda: kept.ids == ["always"], "it is gone")


@pytest.fixture
def fuse(tmp_path: Path, models: Path) -> Iterator[FuseMount]:
    """Below the model folder."""
    with fuse_mount(tmp_path / "source", models / "remote") as mounted:
        yield mounted


@as_root
async def test_what_changes_behind_fuse_is_found_without_an_event(
    tmp_path: Path, models: Path, fuse: FuseMount
) -> None:
    first = write_model(fuse.source / "sub" / "first.gguf")
    async with keeping([models], tmp_path) as kept:
        assert kept.status("first") is ModelStatus.OK
        await eventually(lambda: str(fuse.point) in kept.inventory._watch.unheard, "it is known to be out of earshot")
        write_model(fuse.source / "new" / "second.gguf")
        await eventually(lambda: kept.status("second") is ModelStatus.OK, "what comes is found")
        first.unlink()
        await eventually(lambda: kept.ids == ["second"], "what goes is missed")
        write_model(models / "local.gguf")
        await eventually(lambda: kept.ids == ["local", "second"], "the local folder is watched as ever")
        unmount(fuse.point)
        await eventually(lambda: kept.ids == ["local"], "it is gone")
        assert not kept.inventory._watch.unheard


@asynccontextmanager
async def silent_between_looks(kept: Kept, fuse: FuseMount) -> AsyncIterator[None]:
    """Have a file system answer nothing, from a moment on at which nothing looks into it: such a look would hang."""
    with ExitStack() as stack:
        async with kept.inventory._one_look:
            stack.enter_context(fuse.silent())
        yield


@as_root
async def test_a_network_file_system_that_hangs_does_not_stop_the_event_loop(
    tmp_path: Path, models: Path, fuse: FuseMount
) -> None:
    write_model(fuse.source / "first.gguf")
    async with keeping([models], tmp_path) as kept:
        loop = asyncio.get_running_loop()
        await eventually(lambda: str(fuse.point) in kept.inventory._watch.unheard, "it is known to be out of earshot")
        async with silent_between_looks(kept, fuse):
            looks, before = kept.scanner.refreshes, loop.time()
            pauses: list[float] = []
            kept.inventory._watch.begin_anew()
            while loop.time() < before + 30 and (kept.scanner.refreshes == looks or len(pauses) < 200):
                begin = loop.time()
                await asyncio.sleep(0.01)
                pauses.append(loop.time() - begin)
            assert kept.scanner.refreshes > looks
            assert max(pauses) < 1
        write_model(fuse.source / "second.gguf")
        await eventually(lambda: kept.ids == ["first", "second"], "it goes on when it is back")


@as_root
async def test_a_network_file_system_that_hangs_holds_up_its_own_models_only(
    tmp_path: Path, models: Path, fuse: FuseMount
) -> None:
    write_model(fuse.source / "first.gguf")
    async with keeping([models], tmp_path) as kept:
        await eventually(lambda: str(fuse.point) in kept.inventory._watch.unheard, "it is known to be out of earshot")
        async with silent_between_looks(kept, fuse):
            write_model(models / "local.gguf")
            await eventually(lambda: kept.ids == ["first", "local"], "what is local is listed", 30)
            await kept.inventory.rescan(20)
            assert kept.ids == ["first", "local"]
            assert [problem.path for problem in kept.inventory.problems] == [str(fuse.point)]
            assert kept.inventory.problems[0].message.startswith("it has not answered for ")
        write_model(fuse.source / "second.gguf")
        await eventually(lambda: kept.ids == ["first", "local", "second"], "it goes on when it is back", 30)
        await eventually(lambda: kept.inventory.problems == (), "nothing is wrong")


@as_root
def test_one_that_was_waited_for_is_not_waited_for_again(models: Path, fuse: FuseMount) -> None:
    asked = AnsweringFileSystems()
    with fuse.silent():
        assert asked.silent([str(models)]).keys() == {str(fuse.point)}
        began = time.monotonic()
        assert asked.silent([str(models)]).keys() == {str(fuse.point)}
        assert time.monotonic() - began < 1
    deadline = time.monotonic() + 10
    while asked.silent([str(models)]):
        assert time.monotonic() < deadline, "it answers again"


@as_root
@pytest.mark.parametrize("by_link", [False, True])
async def test_a_configured_folder_that_hangs_holds_up_no_other(
    tmp_path: Path, models: Path, fuse: FuseMount, by_link: bool
) -> None:
    write_model(fuse.source / "sub" / "first.gguf")
    folder = fuse.point / "sub"
    if by_link:
        (tmp_path / "linked").symlink_to(fuse.point)
        folder = tmp_path / "linked" / "sub"
    local = write_model(tmp_path / "local" / "local.gguf").parent
    async with keeping([folder, local], tmp_path) as kept:
        await eventually(lambda: str(folder) in kept.inventory._watch.unheard, "it is known to be out of earshot")
        async with silent_between_looks(kept, fuse):
            await kept.inventory.rescan(20)
            write_model(local / "second.gguf")
            # Something else is mounted meanwhile, so that all is looked up again.
            with unmounted_after(local / "disk"):
                (local / "disk").mkdir()
                await asyncio.to_thread(mount, "-t", "tmpfs", "none", local / "disk")
                write_model(local / "disk" / "third.gguf")
                await eventually(lambda: kept.ids == ["first", "local", "second", "third"], "what is local is listed")
            assert [problem.path for problem in kept.inventory.problems] == [str(folder)]
        await eventually(lambda: kept.inventory.problems == (), "nothing is wrong", 30)


@as_root
async def test_a_file_system_whose_server_died_keeps_its_models(tmp_path: Path, models: Path, fuse: FuseMount) -> None:
    write_model(fuse.source / "first.gguf")
    async with keeping([models], tmp_path) as kept:
        fuse.die()
        await kept.inventory.rescan(20)
        assert kept.ids == ["first"]
        assert [problem.path for problem in kept.inventory.problems] == [str(fuse.point)]


@as_root
async def test_who_asks_for_a_scan_that_hangs_is_told_what_it_waits_for(
    tmp_path: Path, models: Path, fuse: FuseMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(fuse.source / "first.gguf")
    kept = Kept([models], tmp_path, LONG)
    await kept.registry.load()
    # As if it ceased to answer right after it was asked.
    monkeypatch.setattr("magi_agent.discovery.answering.AnsweringFileSystems.silent", lambda *_: {})
    with fuse.silent():
        with pytest.raises(RescanFailed, match=str(fuse.point)):
            await kept.inventory.rescan(1)
        assert kept.inventory.scanning
    await eventually(kept.lists("first"), "the scan went on")
    await kept.inventory.close()
