"""The runtime settings that are limits of the unit: systemd's business, not llama-server's."""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from magi_agent.runtime_settings.settings import RuntimeSettings, numbers_in
from magi_agent.servers.memory_limits import MemoryLimits
from magi_agent.systemd.transient import NumaPolicy

LIMITS: Final = (
    "memory_high",
    "memory_max",
    "cpu_quota",
    "cpu_weight",
    "cpu_affinity",
    "io_weight",
    "io_read_bandwidth_max",
    "numa_policy",
    "numa_nodes",
)
_MISREAD: Final = re.compile(r"[\s%'\"\\]")


def unit_limits(settings: RuntimeSettings, model_path: str, memory: MemoryLimits | None = None) -> dict[str, Any]:
    """The fields of a ``TransientService`` that the limits are; ``ValueError`` where systemd would forget one.

    ``memory`` has those that were derived; what is set wins over them.
    """
    affinity, nodes, policy = settings.cpu_affinity, settings.numa_nodes, settings.numa_policy
    rate = settings.io_read_bandwidth_max
    derived = memory or MemoryLimits()
    memory_max = derived.max if settings.memory_max is None else settings.memory_max
    return {
        "memory_high": derived.high if settings.memory_high is None else settings.memory_high,
        "memory_max": memory_max,
        "memory_swap_max": 0 if memory is not None and memory_max is not None else None,
        "cpu_quota": settings.cpu_quota,
        "cpu_weight": settings.cpu_weight,
        "cpu_affinity": numbers_in(affinity) if affinity else (),
        "io_weight": settings.io_weight,
        "io_read_bandwidth_max": (_on_disk_of(model_path), rate) if rate else None,
        "numa_policy": NumaPolicy(policy) if policy else None,
        "numa_nodes": numbers_in(nodes) if nodes and policy else (),
    }


def _on_disk_of(model_path: str) -> PurePosixPath:
    """A path on the disk of the model that systemd finds again: its folder, or the first one above it that will do.

    systemd 252 writes the path down without quotes and with its ``%`` as they are, and reads both at a daemon-reload.
    """
    folder = PurePosixPath(model_path).parent
    if not _MISREAD.search(str(folder)):
        return folder
    try:
        device = Path(folder).stat().st_dev
        for candidate in folder.parents:
            if Path(candidate).stat().st_dev != device:
                break
            if not _MISREAD.search(str(candidate)):
                return candidate
    except OSError as error:
        raise ValueError(f"the disk of {str(folder)!r} cannot be told: {error.strerror}") from None
    raise ValueError(
        f"systemd cannot limit reading from {str(folder)!r}: the folder that its disk is mounted on has a space, a "
        "percent sign, a quote or a backslash in its name; mount it elsewhere, or leave io_read_bandwidth_max out"
    )


def limits_text(settings: RuntimeSettings) -> str:
    """The limits as one word for the unit's environment, where they can be read again; empty for none.

    The unit's own properties would not do: an operator's ``systemctl set-property`` changes them, rightly.
    """
    limits = {name: value for name in LIMITS if (value := getattr(settings, name)) is not None}
    return json.dumps(limits, separators=(",", ":")) if limits else ""


def limits_in(text: str) -> Mapping[str, object]:
    """The limits that ``limits_text`` wrote; none where it is not its text."""
    try:
        limits = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return limits if isinstance(limits, dict) else {}
