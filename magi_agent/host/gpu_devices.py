"""GPUs as the kernel shows them, the device nodes a program needs to use them, and NVIDIA's two halves of a driver.

PCI classes and vendors: pci.ids. ``/proc/driver/nvidia/version``: the README of NVIDIA's driver, on its proc interface;
NVIDIA's nodes: ``nvidia_nodes``. AMD's nodes: ROCm's installation notes; ``/dev/dri``: the kernel's DRM pages.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from magi_agent.host.nvidia_nodes import gpu_minors, nvidia_nodes

CUDA: Final = "libcuda.so.1"
"""The library by which programs find NVIDIA's driver."""
_DISPLAY: Final = "0x03"
"""The PCI class of everything that draws or computes as a GPU, in its first byte."""
_VERSION: Final = re.compile(r"\b(\d{2,4}\.\d{1,4}(?:\.\d{1,4})?)\b")
_IN_FILE_NAME: Final = re.compile(r"\.so\.(\d{2,4}\.\d{1,4}(?:\.\d{1,4})?)$")
_NVIDIA_CARD: Final = re.compile(r"nvidia\d+")
_RENDER_NODE: Final = re.compile(r"renderD\d+")
_SIGNS: Final = ("module/nvidia", "module/nvgpu", "class/kfd", "class/misc/dxg", "class/misc/mali0")
"""In sysfs, of drivers that programs reach without a render node: NVIDIA's two, AMD's, that of WSL, Arm's own."""


class Vendor(StrEnum):
    """Whose GPU it is; the value is what people call it."""

    NVIDIA = "NVIDIA"
    AMD = "AMD"
    INTEL = "Intel"


_VENDORS: Final = {"0x10de": Vendor.NVIDIA, "0x1002": Vendor.AMD, "0x8086": Vendor.INTEL}


_SYS: Final = Path("/sys")


@dataclass(frozen=True, slots=True)
class Tree:
    """Where the kernel's file systems are."""

    proc: Path = Path("/proc")
    sys: Path = _SYS
    dev: Path = Path("/dev")


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU on the PCI bus."""

    vendor: Vendor
    address: str
    """As sysfs writes it, ``0000:01:00.0``."""
    folder: Path
    """Its folder in sysfs."""
    driver: str | None


@dataclass(frozen=True, slots=True)
class Gpus:
    """What there is of one vendor."""

    vendor: Vendor
    count: int
    """Cards on the PCI bus; 0 where only the driver tells of one."""
    driver: str | None
    """The kernel's driver for them; ``None`` where none has taken them."""
    nodes: tuple[Path, ...]
    """What a program opens to use them."""
    missing: tuple[Path, ...]
    """Of these, what should be there and is not."""


def is_any_driver_up(sys: Path = _SYS) -> bool:
    """Whether the kernel has a driver for anything that computes as a GPU, on whatever bus, be it of any vendor.

    Where it has none, no program finds a GPU.
    """
    nodes = sys / "class" / "drm"
    try:
        has_nodes = any(_RENDER_NODE.fullmatch(entry.name) for entry in nodes.iterdir())
    except OSError:
        has_nodes = False
    return has_nodes or any((sys / sign).exists() for sign in _SIGNS)


def gpus(tree: Tree) -> tuple[Gpus, ...]:
    """The GPUs of this host, by vendor."""
    cards: dict[Vendor, list[Path]] = {}
    for vendor, card in _cards(tree.sys):
        cards.setdefault(vendor, []).append(card)
    if nvidia_driver_version(tree) is not None:
        # In a container or on WSL the driver may be there without a PCI bus.
        cards.setdefault(Vendor.NVIDIA, [])
    return tuple(_of_vendor(vendor, found, tree) for vendor, found in sorted(cards.items()))


def cards(tree: Tree) -> tuple[Card, ...]:
    """The GPUs on the PCI bus, by address."""
    return tuple(Card(vendor, folder.name, folder, _driver(folder)) for vendor, folder in _cards(tree.sys))


def nvidia_driver_version(tree: Tree) -> str | None:
    """The version of NVIDIA's driver that the kernel has loaded; ``None`` where it has none."""
    try:
        text = (tree.proc / "driver" / "nvidia" / "version").read_text(errors="replace")
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith("NVRM version")), text)
    found = _VERSION.search(line)
    return found[1] if found else "unknown"


def version_in_name(library: Path) -> str | None:
    """The version that a library of NVIDIA's has in its file name, as all of them do."""
    found = _IN_FILE_NAME.search(library.name)
    return found[1] if found else None


def nvidia_mismatch(tree: Tree, cuda: Path | None) -> str | None:
    """Say that the kernel's part of NVIDIA's driver and its libraries are of two versions; only a boot mends that.

    ``cuda`` is the file of ``libcuda.so.1``, links followed. An upgrade, as an unattended one, replaces the libraries
    and leaves what the kernel has loaded.
    """
    running = nvidia_driver_version(tree)
    installed = version_in_name(cuda) if cuda else None
    if running is None or installed is None or running in {installed, "unknown"}:
        return None
    return (
        f"the kernel runs NVIDIA's driver {running}, and its libraries are {installed}: they were upgraded since "
        "the boot, and no program finds a GPU until both are the same"
    )


def _of_vendor(vendor: Vendor, cards: list[Path], tree: Tree) -> Gpus:
    driver = next((name for card in cards if (name := _driver(card))), None)
    if vendor is Vendor.NVIDIA:
        driver = "nvidia" if nvidia_driver_version(tree) is not None else driver
        wanted = [Path(node) for node in nvidia_nodes(str(tree.proc), str(tree.dev))]
        if wanted and not gpu_minors(str(tree.proc)):
            # As on WSL or in some containers: the driver lists no GPUs.
            numbered = sorted(path for path in _nodes(tree.dev) if _NVIDIA_CARD.fullmatch(path.name))
            wanted += numbered or [tree.dev / "nvidia0"]
    else:
        wanted = [tree.dev / "dri" / name for card in cards if (name := _render_node(card))]
        if not wanted:
            wanted = [tree.dev / "dri" / "renderD128"]
        if vendor is Vendor.AMD:
            wanted.append(tree.dev / "kfd")
    nodes = [path for path in wanted if path.exists()]
    return Gpus(vendor, len(cards), driver, tuple(nodes), tuple(path for path in wanted if path not in nodes))


def _cards(sys: Path) -> Iterator[tuple[Vendor, Path]]:
    for device in _nodes(sys / "bus" / "pci" / "devices"):
        vendor = _VENDORS.get(_line(device / "vendor"))
        if vendor is not None and _line(device / "class").startswith(_DISPLAY):
            yield vendor, device


def _driver(card: Path) -> str | None:
    try:
        return (card / "driver").readlink().name
    except OSError:
        return None


def _render_node(card: Path) -> str | None:
    return next((path.name for path in _nodes(card / "drm") if _RENDER_NODE.fullmatch(path.name)), None)


def _nodes(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
