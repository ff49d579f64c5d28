"""The devices that a llama-server would compute on, as ``llama-server --list-devices`` prints them.

A line for each below ``Available devices:``, with the name by which ``--device`` takes it, what the driver calls it,
and its memory in MiB (``common/arg.cpp`` of llama.cpp); the CPU is not among them. What a program prints is trusted in
nothing: what is no such line is passed over, and only so many count.
"""

import re
from dataclasses import dataclass
from typing import Final

MAX_TEXT: Final = 64 * 1024
"""Characters that are read."""
MOST_DEVICES: Final = 64
_HEADING: Final = "Available devices:"
_LINE: Final = re.compile(
    r"\s+(?P<name>(?P<backend>[A-Za-z][A-Za-z_]{0,30})(?P<number>\d{0,3})): "
    r"(?P<description>.{1,500}?)(?: \((?P<total>\d{1,9}) MiB, (?P<free>\d{1,9}) MiB free\))?"
)
_MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """One device; sizes are bytes, ``None`` where it tells none."""

    name: str
    """As options of llama-server take it: ``CUDA0``, ``Vulkan1``."""
    backend: str
    number: int
    description: str
    memory_total: int | None
    memory_free: int | None
    line: str
    """As it was printed."""


def listed_devices(text: str) -> tuple[ListedDevice, ...] | None:
    """The devices in what was printed; ``None`` where it is no list of devices.

    Libraries for the CPU that are listed too, as ``BLAS``, are left out: they have neither number nor memory.
    """
    _, heading, listed = text[:MAX_TEXT].partition(_HEADING)
    if not heading:
        return None
    found: dict[str, ListedDevice] = {}
    for line in listed.splitlines():
        if (match := _LINE.fullmatch(line.rstrip())) and (device := _device(match)):
            found.setdefault(device.name, device)
    return tuple(found.values())[:MOST_DEVICES]


def _device(match: re.Match[str]) -> ListedDevice | None:
    total = int(match["total"] or 0) * _MEBIBYTE
    if not match["number"] and not total:
        return None
    description = "".join(letter if letter.isprintable() else "?" for letter in match["description"]).strip()
    return ListedDevice(
        match["name"],
        match["backend"],
        int(match["number"] or 0),
        description,
        total or None,
        # A device without memory is one that did not tell; one that is full says 0.
        int(match["free"]) * _MEBIBYTE if total else None,
        match[0].strip(),
    )
