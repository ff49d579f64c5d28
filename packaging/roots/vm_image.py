"""Disks for virtual machines: of a Debian root with its own kernel, which is made once and kept in `.cache/vm`.

A disk is made of a copy of the root, into which packages are installed, which an emulated processor would take minutes
for. Standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import locations
from root_cache import HOST_PACKAGES, RootKind

IMAGES = locations.CACHE / "vm"
"""Where roots are kept, and a run has its disks; `make clean` leaves it alone."""

PORT = "magi.commands"
"""The serial port of the machine through which it is told what to run."""

PARTS = "/opt/parts"
"""Where the machine mounts its second disk, which it can only read."""

_COPYING_SECONDS = 900.0
_DISK_SIZE = "4G"
_INSTALL_SECONDS = 300.0
_PROGRAM = "usr/local/lib/commands_port.py"
_PROGRAM_TEXT = Path(__file__).with_name("commands_port.py").read_text()
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


def image_of(root: Path, folder: Path, package: Path, files: Mapping[str, str]) -> Image:
    """Make a disk in ``folder``, with a package and files that the root has not. Raises ImageError, OSError.

    The files are there before the package is installed, as an operator's would be.
    """
    own = folder / "root"
    subprocess.run(["cp", "--archive", "--reflink=auto", str(root), str(own)], check=True, timeout=_COPYING_SECONDS)
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
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COPYING_SECONDS, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        raise ImageError(f"mke2fs made no disk of {source}: {made.stderr.strip()[-2000:]}")


def _furnish(root: Path) -> None:
    written = {
        _PROGRAM: _PROGRAM_TEXT,
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


MACHINE_ROOTS = RootKind(
    IMAGES,
    (*HOST_PACKAGES, "acl", "linux-image-cloud-amd64"),
    "about 400 MB",
    (1, _PROGRAM_TEXT, _UNIT, _FSTAB),
    _furnish,
)
"""Plain hosts with a kernel of their own."""
