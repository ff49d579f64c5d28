"""Disks for virtual machines: of a Debian root with its own kernel, which is made once and kept in `.cache/vm`.

A root is named by what went into it, so a change of the package list makes a new one; the old one is removed. Nothing
is ever written to a finished one: a disk is made of a copy, into which packages are installed, which an emulated
processor would take minutes for. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import locations
from releases import Release

IMAGES = locations.CACHE / "vm"
"""Where roots are kept, and a run has its disks; `make clean` leaves it alone."""

PORT = "magi.commands"
"""The serial port of the machine through which it is told what to run."""

PARTS = "/opt/parts"
"""Where the machine mounts its second disk, which it can only read."""

_PACKAGES = (
    *("acl", "apt", "curl", "dbus", "iproute2", "libgomp1", "linux-image-cloud-amd64", "passwd", "polkitd", "procps"),
    *("python3", "systemd-sysv"),
)
_RECIPE = 1
"""To be raised when the way a disk is made changes and its packages do not."""
_MAKING_SECONDS = 900.0
_DISK_SIZE = "4G"
_INSTALL_SECONDS = 300.0
_UNFINISHED = ".unfinished"
_PROGRAM = "usr/local/lib/commands_port.py"
_UNIT = f"""\
[Unit]
Description=Commands from outside
After=multi-user.target

[Service]
ExecStart=/usr/bin/python3 /{_PROGRAM} /dev/virtio-ports/{PORT}
OOMScoreAdjust=-1000

[Install]
WantedBy=graphical.target
"""
_FSTAB = f"""\
/dev/vda / ext4 defaults 0 0
/dev/vdb {PARTS} ext4 ro 0 0
"""


class ImageError(Exception):
    """A disk could not be made; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine boots from."""

    disk: Path
    kernel: Path
    initrd: Path


@contextlib.contextmanager
def machine_root(release: Release, more_packages: Iterable[str] = ()) -> Iterator[Path]:
    """Give a root with these packages on top of the usual ones, made if need be; it is only to be read.

    As long as it is given, no other run removes it. Raises ImageError.
    """
    packages = sorted({*_PACKAGES, *more_packages})
    root = IMAGES / f"{release.codename}-{_hash_of(release, packages)}"
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (IMAGES / f"{release.codename}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not root.exists():
            # To change a lock is to release it for a moment: what was true before has to be asked again.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not root.exists():
                _make(release, packages, root)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield root


def image_of(root: Path, folder: Path, package: Path, files: Mapping[str, str]) -> Image:
    """Make a disk in ``folder``, with a package and files that the root has not. Raises ImageError, OSError.

    The files are there before the package is installed, as an operator's would be.
    """
    own = folder / "root"
    subprocess.run(["cp", "--archive", "--reflink=auto", str(root), str(own)], check=True, timeout=_MAKING_SECONDS)
    for name, text in files.items():
        path = own / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copyfile(package, own / "package.deb")
    enter = Path(__file__).parents[1] / "deb" / "enter"
    command = ["dpkg", "--force-confold", "--install", "/package.deb"]
    installed = subprocess.run(
        [str(enter), str(own), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=_INSTALL_SECONDS,
    )  # fmt: skip
    if installed.returncode != 0:
        raise ImageError(f"{package} could not be installed: {(installed.stdout + installed.stderr)[-2000:]}")
    (own / "package.deb").unlink()
    boot = own / "boot"
    image = Image(folder / "disk", folder / "vmlinuz", folder / "initrd.img")
    for path in (image.kernel, image.initrd):
        shutil.copyfile(max(boot.glob(f"{path.name}-*")), path)
    write_disk(own, image.disk, _DISK_SIZE)
    shutil.rmtree(own)
    return image


def write_disk(source: Path, disk: Path, size: str) -> None:
    """Make a file that is a disk with the contents of a folder; ``size`` as for mke2fs(8). Raises ImageError."""
    made = subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0", "-d", str(source), str(disk), size],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MAKING_SECONDS, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        raise ImageError(f"mke2fs made no disk of {source}: {made.stderr.strip()[-2000:]}")


def _say(text: str) -> None:
    print(f"vm: {text}", file=sys.stderr, flush=True)


def _hash_of(release: Release, packages: list[str]) -> str:
    program = Path(__file__).with_name("commands_port.py").read_text()
    made_of = json.dumps([_RECIPE, release.codename, os.uname().machine, packages, program, _UNIT, _FSTAB])
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def _make(release: Release, packages: list[str], root: Path) -> None:
    """Make the root, and remove the release's others: whoever uses one holds the lock."""
    for old in IMAGES.glob(f"{release.codename}-*"):
        shutil.rmtree(old)
    _say(f"making a root of Debian {release.number} with its own kernel, about 400 MB; once")
    unfinished = root.with_name(root.name + _UNFINISHED)
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--format=directory",
        f"--include={','.join(packages)}", release.codename, str(unfinished),
    ]  # fmt: skip
    try:
        made = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MAKING_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"mmdebstrap was not through in {_MAKING_SECONDS:.0f} s; is the mirror reachable?") from error
    if made.returncode != 0:
        raise ImageError(f"mmdebstrap made no Debian {release.number}: {made.stderr.strip()[-2000:]}")
    _furnish(unfinished)
    unfinished.rename(root)


def _furnish(root: Path) -> None:
    program = Path(__file__).with_name("commands_port.py").read_text()
    written = {
        _PROGRAM: program,
        "etc/systemd/system/commands.service": _UNIT,
        "etc/fstab": _FSTAB,
        "etc/hostname": "magi-vm\n",
    }
    for name, text in written.items():
        (root / name).write_text(text)
    (root / PARTS.lstrip("/")).mkdir()
    units = root / "etc/systemd/system"
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "graphical.target.wants").mkdir(exist_ok=True)
    (units / "graphical.target.wants/commands.service").symlink_to("/etc/systemd/system/commands.service")
    for name in ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "getty@tty1.service"):
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
