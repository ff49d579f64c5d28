"""Whether a start fits into the memory there is: a pure function, and the arithmetic in words.

What a server needs is its anonymous memory and its mapped weights. What there is for it is the host's room, without
what is promised to servers that were admitted before and do not use it yet, and without the reserve. The room is
without what running servers have mapped. So weights that another server of the same file maps already are counted
twice, once as in use and once as needed: of a second server of one file, a little more is asked than it takes.
"""

from dataclasses import dataclass, field
from typing import Final

from magi_agent.errors import InsufficientMemory
from magi_agent.host.memory import HostMemory
from magi_agent.host.unit_memory import UnitMemory
from magi_agent.memory.need import Basis, GpuBasis
from magi_agent.servers.placed import GpuShortage, Placed

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
ADVICE: Final = (
    "stop another model, make ctx_size smaller, take a smaller quantization, or start it nevertheless: "
    "magictl start --force {}"
)


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for one more server on the host, in bytes."""

    available: int
    """The host's room: what is available and no running server has mapped, or what a limit leaves of it."""
    promised: int
    """To servers that are loading, or run, and do not use it yet."""
    reserve: int
    limit: str | None = None
    """The unit whose limit leaves least; ``None`` where that is the host itself."""

    @property
    def free(self) -> int:
        """What is neither promised nor reserved; below 0 where too much is."""
        return self.available - self.promised - self.reserve


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a start does not fit; sizes are bytes."""

    needed: int
    anonymous: int
    mapped: int
    shared: int
    """For GPUs that have no memory but the host's."""
    basis: Basis
    gpu_basis: GpuBasis
    room: Room | None
    """``None`` where nobody knows the host's figures."""
    gpu: GpuShortage | None = field(default=None)

    @property
    def short_by(self) -> int:
        """Bytes that are missing on the host."""
        return max(0, self.needed - self.room.free) if self.room else 0

    @property
    def gpu_short_by(self) -> int:
        """Bytes that are missing on GPUs."""
        return max(0, self.gpu.needed - (self.gpu.free - self.gpu.promised)) if self.gpu else 0


def room_of(memory: HostMemory, promised: int, reserve: int) -> Room:
    """The room for one more server."""
    binding = memory.binding
    limit = (binding.unit or binding.control_group) if binding else None
    return Room(memory.room, promised, reserve, limit)


def shortage_of(placed: Placed, room: Room | None) -> Shortage | None:
    """Why a start does not fit; ``None`` where it does, or where nobody knows: a figure that is missing is no 0."""
    need = placed.need
    needed = need.host_bytes + placed.shared_bytes if need else 0
    is_short = need is not None and room is not None and needed > room.free
    if not is_short and placed.gpu_shortage is None:
        return None
    return Shortage(
        needed=needed,
        anonymous=need.anonymous_bytes if need else 0,
        mapped=need.mapped if need else 0,
        shared=placed.shared_bytes,
        basis=need.basis if need else Basis.ESTIMATED,
        gpu_basis=need.gpu_basis if need else Basis.ESTIMATED,
        room=room,
        gpu=placed.gpu_shortage,
    )


def outstanding(placed: Placed, used: UnitMemory | None, *, is_ready: bool) -> int:
    """What a server that was admitted will take yet of the host's memory, where it uses so much now.

    One that is ready has mapped its weights, and takes the rest of its buffers with the first large batches.
    """
    need = placed.need
    if need is None:
        return 0
    if used is None:
        return 0 if is_ready else need.host_bytes + placed.shared_bytes
    # Of one that uses more than was foreseen of one kind, the other is still to come.
    anonymous = max(0, need.anonymous_bytes - used.anonymous)
    return anonymous if is_ready else anonymous + max(0, need.mapped - used.mapped) + placed.shared_bytes


def arithmetic(shortage: Shortage) -> str:
    """Why a start does not fit, in words."""
    parts = []
    room = shortage.room
    if room is not None and shortage.short_by:
        where = f" below the limit of {room.limit}" if room.limit else ""
        shared = f", {size(shortage.shared)} for GPUs without memory of their own" if shortage.shared else ""
        parts.append(
            f"it needs {size(shortage.needed)} of memory ({size(shortage.anonymous)} of its own and "
            f"{size(shortage.mapped)} of weights mapped from files{shared}, {shortage.basis}); "
            f"{size(room.available)} are available{where}, of which "
            f"{size(room.promised)} are promised to other servers and {size(room.reserve)} are kept in reserve "
            f"(memory_reserve): {size(shortage.short_by)} are missing"
        )
    if gpu := shortage.gpu:
        parts.append(
            f"it needs {size(gpu.needed)} of GPU memory ({shortage.gpu_basis}) on {', '.join(gpu.devices) or 'GPUs'}; "
            f"{size(gpu.free)} are free, of which {size(gpu.promised)} are promised to other servers: "
            f"{size(shortage.gpu_short_by)} are missing"
        )
    return "; and ".join(parts)


def insufficient_memory(model_id: str, shortage: Shortage) -> InsufficientMemory:
    """The refusal of a start, with the arithmetic in words and for programs."""
    details: dict[str, object] = {"modelId": model_id, "advice": ADVICE.format(model_id)}
    room = shortage.room
    if room is not None and shortage.needed:
        details |= {
            "neededBytes": shortage.needed,
            "anonymousBytes": shortage.anonymous,
            "mappedBytes": shortage.mapped,
            "sharedBytes": shortage.shared,
            "basis": str(shortage.basis),
            "availableBytes": room.available,
            "promisedBytes": room.promised,
            "reserveBytes": room.reserve,
            "limitOf": room.limit,
            "shortByBytes": shortage.short_by,
        }
    if gpu := shortage.gpu:
        details["gpu"] = {
            "devices": list(gpu.devices),
            "neededBytes": gpu.needed,
            "basis": str(shortage.gpu_basis),
            "freeBytes": gpu.free,
            "promisedBytes": gpu.promised,
            "shortByBytes": shortage.gpu_short_by,
        }
    return InsufficientMemory(f"model {model_id} does not fit: {arithmetic(shortage)}", details)


def size(count: int) -> str:
    """Bytes in words, in units of 1024."""
    if abs(count) >= _GIB:
        return f"{count / _GIB:.1f} GiB"
    # What is missing is never said to be nothing.
    return f"{-(-count // _MIB)} MiB"
