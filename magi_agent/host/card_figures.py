"""How GPUs of AMD and Intel are, as their drivers say in sysfs.

AMD: "Misc AMDGPU driver information" and "GPU power controls and monitoring" of the kernel's documentation
(https://docs.kernel.org/gpu/amdgpu): ``mem_info_vram_*`` and ``mem_info_gtt_*`` in bytes, ``gpu_busy_percent``,
``unique_id``. The driver for computing (KFD) says below ``/sys/class/kfd/kfd`` which GPU has which of its numbers, by
``domain`` and ``location_id`` (bus, device and function as on the PCI bus), and what memory of it each process has
(``proc/<pid>/vram_<gpu id>``; drivers/gpu/drm/amd/amdkfd of the kernel). Temperatures: ``temp1_input`` and so
on, in thousandths of a degree (https://docs.kernel.org/hwmon/sysfs-interface.html; sysfs-driver-intel-xe-hwmon of the
kernel's ABI documentation).
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from magi_agent.host.gpu_devices import Card, Vendor

_MOST_PROCESSES: Final = 512
_MOST_NODES: Final = 256
_SENSOR: Final = re.compile(r"temp[1-9]_input")
_NOT_SHOWN: Final = "the kernel's driver {driver} shows none in sysfs"


@dataclass(frozen=True, slots=True)
class CardFigures:
    """One GPU; sizes are bytes. ``reasons`` says why a field is ``None``."""

    name: str | None = None
    uuid: str | None = None
    vram_total: int | None = None
    vram_free: int | None = None
    shared_total: int | None = None
    """Of the host's memory, what the GPU may use too."""
    shared_free: int | None = None
    temperature: float | None = None
    """Degrees Celsius."""
    utilization: float | None = None
    """Percent."""
    processes: Mapping[int, int | None] | None = None
    """The bytes that each process has of it which computes by ROCm, by process id; ``None`` where that is not told."""
    reasons: Mapping[str, str] = field(default_factory=dict)


def card_figures(card: Card, sys: Path) -> CardFigures:
    """Read what there is of one GPU; reads files."""
    driver = card.driver or "for it"
    not_shown = _NOT_SHOWN.format(driver=driver) if card.driver else "no driver has taken it"
    reasons: dict[str, str] = {}
    vram, shared = _memory(card.folder, "vram"), _memory(card.folder, "gtt")
    if vram is None:
        reasons["memory_total"] = reasons["memory_free"] = not_shown
    temperature = _temperature(card.folder)
    if temperature is None:
        reasons["temperature"] = not_shown
    utilization = _number(card.folder / "gpu_busy_percent")
    if utilization is None or not 0 <= utilization <= 100:
        utilization = None
        reasons["utilization"] = not_shown
    unique = _line(card.folder / "unique_id")
    if not unique:
        reasons["uuid"] = not_shown
    processes = _processes(card, sys)
    if processes is None:
        reasons["processes"] = "the driver tells of no processes"
    return CardFigures(
        name=_line(card.folder / "product_name") or None,
        # As ROCm writes it, so that ROCR_VISIBLE_DEVICES takes it.
        uuid=f"GPU-{unique.removeprefix('0x')}" if unique else None,
        vram_total=vram[0] if vram else None,
        vram_free=vram[1] if vram else None,
        shared_total=shared[0] if shared else None,
        shared_free=shared[1] if shared else None,
        temperature=temperature,
        utilization=utilization,
        processes=processes,
        reasons=reasons,
    )


def rocm_order(sys: Path) -> tuple[str, ...]:
    """The PCI addresses of GPUs in the order in which ROCm numbers them; empty without AMD's driver for computing."""
    return tuple(address for _, address in _kfd_nodes(sys))


def _memory(folder: Path, kind: str) -> tuple[int, int] | None:
    """Total and free."""
    total, used = (_number(folder / f"mem_info_{kind}_{word}") for word in ("total", "used"))
    if not total or used is None or used < 0:
        return None
    return total, max(0, total - used)


def _temperature(folder: Path) -> float | None:
    for monitor in _entries(folder / "hwmon"):
        # AMD's first is the one at the edge; Intel's xe begins with the second, the package's.
        for sensor in _entries(monitor):
            if _SENSOR.fullmatch(sensor.name) and (found := _number(sensor)) is not None:
                return found / 1000
    return None


def _processes(card: Card, sys: Path) -> dict[int, int | None] | None:
    if card.vendor is not Vendor.AMD:
        return None
    gpu_id = next((number for number, address in _kfd_nodes(sys) if address == card.address), None)
    folder = sys / "class" / "kfd" / "kfd" / "proc"
    if gpu_id is None or not folder.is_dir():
        return None
    found: dict[int, int | None] = {}
    for process in _entries(folder):
        file = process / f"vram_{gpu_id}"
        if process.name.isdecimal() and file in _entries(process) and (used := _number(file)) != 0:
            found[int(process.name)] = used if used is not None and used > 0 else None
    return dict(sorted(found.items())[:_MOST_PROCESSES])


def _kfd_nodes(sys: Path) -> Iterator[tuple[int, str]]:
    """The driver's number and the PCI address of each GPU, in the order of nodes; CPUs are nodes with the number 0."""
    nodes = _entries(sys / "class" / "kfd" / "kfd" / "topology" / "nodes")
    numbered = sorted((int(node.name), node) for node in nodes if node.name.isdecimal())
    for _, node in numbered[:_MOST_NODES]:
        gpu_id = _number(node / "gpu_id")
        pairs = (line.split() for line in _text(node / "properties").splitlines())
        said = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
        if gpu_id and "location_id" in said:
            place = said["location_id"]
            bus, device, function = place >> 8 & 0xFF, place >> 3 & 0x1F, place & 0x7
            yield gpu_id, f"{said.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)]
    except OSError:
        return []


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    try:
        return int(text) if len(text) < 24 else None
    except ValueError:
        return None


def _line(path: Path) -> str:
    text = _text(path).strip()[:256]
    return text if text.isprintable() else ""


def _text(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""
