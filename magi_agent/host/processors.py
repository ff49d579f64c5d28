"""The host's processors: /proc/cpuinfo and /proc/loadavg (proc(5))."""

import os
import re
from dataclasses import dataclass
from typing import Final

import psutil

from magi_agent.host.gpu_devices import Tree

_MODEL: Final = re.compile(r"^(?:model name|Model|cpu model|cpu)\s*:\s*(.+)$", re.MULTILINE)
_MAX_TEXT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Processors:
    """What computes here beside GPUs; ``None`` where the kernel does not tell."""

    model: str | None
    cores: int | None
    threads: int | None
    load: tuple[float, float, float] | None
    """Over 1, 5 and 15 minutes."""


def processors(tree: Tree) -> Processors:
    """Look; reads files."""
    try:
        with (tree.proc / "cpuinfo").open(errors="replace") as file:
            found = _MODEL.search(file.read(_MAX_TEXT))
    except OSError:
        found = None
    try:
        load: tuple[float, float, float] | None = os.getloadavg()
    except OSError:
        load = None
    model = " ".join(found[1].split()) if found else None
    return Processors(model, psutil.cpu_count(logical=False), psutil.cpu_count(), load)
