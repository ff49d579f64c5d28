"""The runtime settings that are limits of the unit: systemd's business, not llama-server's."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from magi_agent.runtime_settings.settings import RuntimeSettings, numbers_in
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


def unit_limits(settings: RuntimeSettings, model_path: str) -> dict[str, Any]:
    """The fields of a ``TransientService`` that the limits are."""
    affinity, nodes, policy = settings.cpu_affinity, settings.numa_nodes, settings.numa_policy
    rate = settings.io_read_bandwidth_max
    return {
        "memory_high": settings.memory_high,
        "memory_max": settings.memory_max,
        "cpu_quota": settings.cpu_quota,
        "cpu_weight": settings.cpu_weight,
        "cpu_affinity": numbers_in(affinity) if affinity else (),
        "io_weight": settings.io_weight,
        "io_read_bandwidth_max": (PurePosixPath(model_path).parent, rate) if rate else None,
        "numa_policy": NumaPolicy(policy) if policy else None,
        "numa_nodes": numbers_in(nodes) if nodes and policy else (),
    }


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
