"""How much of the host's memory a server's unit may use: derived from what the model needs, or set by a person.

A limit is there for the day on which a server leaks: it is stopped then, and told as ``oom-kill``, and the rest of the
host lives. A server that does what it should must never come near it. What is counted (the kernel's cgroup-v2.rst) is
more than what the need speaks of, so the limit is the sum of

* anonymous memory, and a share of it as head-room: an estimate is off by up to 15 %;
* what the server may grow by while it serves, as llama.cpp bounds it: kept prompts and checkpoints. A prompt is copied
  before an older one is dropped, so one state of all slots goes over that bound for a moment; the copy is made in the
  host's memory also where the cache is on GPUs;
* mapped weights, whole: their pages count for the unit that read them, and a server whose own weights do not fit beside
  the rest would read them again for each token. A 64th more is for the page tables and the kernel's books of them;
* 512 MiB for programs, libraries, requests and images; and 1 GiB more where GPUs are used: a driver's libraries and the
  buffers through which it fills the GPU.

A limit beyond what the host has would protect nobody, and kept prompts alone may be 8 GiB: so it is at most the host's
memory less a 16th, at least 512 MiB, unless the need without any growth is more than that.

Nothing is added for the files that are read into GPUs. Their pages are dropped where the limit is met, and nobody has
to wait for it: on Linux 6.1, emulated, a file of three times the limit took 1.0 to 2.1 times as long to read as without
one, 2 s in place of 1 for 253 MB.

``MemoryHigh=`` lies just below ``MemoryMax=``, by a hundredth and at most 128 MiB. Between both a process is slowed
down by the square of how far it is over: a leak on Linux 6.1 was killed after 4 s where the room was a hundredth, as it
was without any; where it was a tenth, after 88 s, and where it also read mapped weights, a twentieth was not crossed in
120 s. For that time the server neither works nor fails, and answers nobody. All that is gained from more room is that
pages of files are given back earlier, for which a hundredth does.

Swap is not to be used by a unit with a limit (``MemorySwapMax=0``). With 600 MB of swap the same leak was alive after
120 s, and the host's swap half full; without, it was killed after 15 s.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from magi_agent.memory.need import MemoryNeed
from magi_agent.runtime_settings.settings import RuntimeSettings

_MIB: Final = 1 << 20
SMALLEST_LIMIT: Final = 16 * _MIB
LARGEST_LIMIT: Final = 1 << 60
"""What is derived lies between these; whoever is told of a limit may check it."""
_ALWAYS: Final = 512 * _MIB
_WITH_GPUS: Final = 1024 * _MIB
_OF_MAPPED: Final = 64
_OF_HOST: Final = 16
_LEAST_OF_HOST: Final = 512 * _MIB
_BELOW_MAX: Final = 100
_MOST_BELOW_MAX: Final = 128 * _MIB
_OWN_MEMORY: Final = ("CUDA", "ROCm")
"""Back ends whose memory is no control group's, as their drivers take it; others may share the host's."""


LimitOrigin = Literal["set", "derived", "operator"]
"""Where a limit comes from: chosen for the model, derived from its need, or set at the unit by somebody else."""


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Bytes that the unit may use, swap left out; ``None`` for no limit."""

    high: int | None = None
    """``MemoryHigh=``"""
    max: int | None = None
    """``MemoryMax=``"""


def derived_limits(
    need: MemoryNeed, headroom: float, *, host_bytes: int | None = None, shares_host_memory: bool = False
) -> MemoryLimits:
    """The limits of a server that needs so much; see above.

    ``headroom`` is the share of anonymous memory that is added to it; ``host_bytes`` is all of the host's memory.
    ``shares_host_memory`` says that the memory of the GPUs may count for the unit, as that of integrated ones does with
    some drivers: it is added then, since a limit that is too wide does less harm than one that is too narrow.
    """
    in_use = need.anonymous_bytes + (need.gpu_bytes if shares_host_memory else 0)
    state = need.kv_cache.total + need.recurrent_state.total
    least = (
        in_use + round(in_use * headroom) + need.mapped + need.mapped // _OF_MAPPED
        + _ALWAYS + (_WITH_GPUS if need.gpu_bytes else 0)
    )  # fmt: skip
    most = least + need.may_grow + state
    if host_bytes is not None:
        most = min(most, max(least, host_bytes - max(host_bytes // _OF_HOST, _LEAST_OF_HOST)))
    most = min(max(most, SMALLEST_LIMIT), LARGEST_LIMIT) // _MIB * _MIB
    return MemoryLimits(_high_below(most), most)


def may_share_host_memory(devices: Iterable[str]) -> bool:
    """Whether the memory of GPUs of these names (``Vulkan0``) may be the host's; also where no name is known."""
    names = tuple(devices)
    return not names or not all(name.startswith(_OWN_MEMORY) for name in names)


def limits_with_set(derived: MemoryLimits, settings: RuntimeSettings) -> MemoryLimits:
    """The limits that hold where a person may have set some, which win.

    A derived high follows a set max, unless that is very small, and a derived max gives way to a higher set high:
    neither makes the other useless.
    """
    most = derived.max if settings.memory_max is None else settings.memory_max
    high = settings.memory_high
    if high is None:
        follows = most is not None and most >= 2 * SMALLEST_LIMIT
        return MemoryLimits(_high_below(most) if most is not None and follows else None, most)
    if settings.memory_max is None and most is not None and high >= most:
        most = min(high + max(_MIB, min(high // _BELOW_MAX, _MOST_BELOW_MAX)), LARGEST_LIMIT)
    return MemoryLimits(high, most)


def chosen_limits(settings: RuntimeSettings) -> MemoryLimits:
    """Those that a person set, and no other."""
    return MemoryLimits(settings.memory_high, settings.memory_max)


def _high_below(most: int) -> int:
    # Whole pages, of any size: the kernel would round it.
    return (most - min(most // _BELOW_MAX, _MOST_BELOW_MAX)) // _MIB * _MIB


def written_limits(limits: MemoryLimits) -> str:
    """The limits as one word for the unit's environment."""
    return json.dumps({"memory_high": limits.high, "memory_max": limits.max}, separators=(",", ":"))


def source_of(in_force: int | None, chosen: int | None, made_with: int | None) -> LimitOrigin | None:
    """Where a limit that is in force comes from: chosen for the model, else made with the unit, else from outside.

    ``None`` where there is no limit.
    """
    if in_force is None:
        return None
    return "set" if in_force == chosen else "derived" if in_force == made_with else "operator"


def read_limits(values: Mapping[str, object]) -> MemoryLimits:
    """The limits of what ``written_limits`` wrote, once that is read as JSON; none for what is no number."""
    high, most = (values.get(name) for name in ("memory_high", "memory_max"))
    return MemoryLimits(high if type(high) is int else None, most if type(most) is int else None)
