"""Which GPUs a server is given: a pure choice, from what is free and from what it would need on them.

What the operator set by hand is followed and only reckoned with: pins, ``--device``, how the model is split, no layers
on GPUs. Else it is the one GPU that fits best, else as few as fit; else, where llama-server makes the model fit by
itself (``--fit``), those with room, and the rest stays on the host.

llama.cpp gives each GPU layers in proportion to its free memory (``llama_model_base::load_tensors``), and each a
compute buffer of its own. By default it uses every GPU but those that are integrated, and one integrated where there is
no other; a GPU that two back ends list counts once (``llama_prepare_model_devices``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Final

from magi_agent.host.gpus import Gpu
from magi_agent.memory.build import Build
from magi_agent.memory.estimate import Device
from magi_agent.memory.need import MemoryNeed
from magi_agent.runtime_settings.settings import RuntimeSettings
from magi_agent.servers.launch import NO_DEVICE
from magi_agent.servers.placed import GpuShortage

_MARGIN: Final = 256 << 20
"""Bytes that are left free of a GPU where they can be, an estimate being one; llama-server's ``--fit`` leaves more."""
_DEVICE_FLAG: Final = "--device="
_SET_LAYERS: Final = range(999)
"""Numbers of layers that no build with ``--fit`` takes for "not set"."""
_FIT_FLAGS: Final = "--fit"
"""What the flags begin with by which somebody says how llama-server is to fit models."""

NeedFor = Callable[[Sequence[Device], bool], MemoryNeed]
"""What is needed on some GPUs: wholly, or (``True``) as llama-server would make it fit."""


@dataclass(frozen=True, slots=True)
class UsableGpu:
    """A GPU that may be chosen; sizes are bytes."""

    name: str
    """As llama-server calls it."""
    address: str
    """What tells it from others of its size, and stays: its PCI address, or its name where it has none."""
    total: int
    free: int
    promised: int = 0
    """Of what is free, what other servers will take."""
    is_integrated: bool = False
    """Whether its memory is the host's."""

    @property
    def room(self) -> int:
        """Bytes that are free and promised to nobody."""
        return max(0, self.free - self.promised)

    @property
    def device(self) -> Device:
        """As estimates know it."""
        return Device(self.name, self.total, self.room)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, or what llama-server will do by itself."""

    devices: tuple[str, ...]
    """What it is to be told; empty for nothing."""
    used: tuple[UsableGpu, ...]
    need: MemoryNeed
    gpu_bytes: dict[str, int] = field(default_factory=dict)
    shortage: GpuShortage | None = None


def used_by_default(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Those of a llama-server's GPUs that it uses where nobody says which."""
    listed = [gpu for gpu in gpus if gpu.device]
    discrete: dict[str, Gpu] = {}
    for gpu in listed:
        if not gpu.is_integrated:
            discrete.setdefault(gpu.pci_address or gpu.device or "", gpu)
    return tuple(discrete.values()) or tuple(listed[:1])


def choose(
    gpus: Sequence[UsableGpu],
    need_for: NeedFor,
    settings: RuntimeSettings,
    build: Build,
    *,
    may_say: bool = True,
) -> Choice:
    """Choose among ``gpus``, those that llama-server would use by default in its order.

    Where ``may_say`` is false, or somebody has chosen, it is only told what they will take.
    """
    if not gpus or not may_say or _is_chosen_by_hand(settings):
        return reckoned(_chosen_by_hand(gpus, settings), need_for, settings)
    if not need_for([gpu.device for gpu in gpus], True).gpu_layers:
        # All is kept on the host: as it is set, or by a build that does so unless it is told otherwise.
        return reckoned(gpus, need_for, settings)
    flags = settings.extra_flags or ()
    fits = build.fits and not any(flag in ("--fit=off", "--fit=0", "--fit=false") for flag in flags)
    fits_layers = fits and settings.n_gpu_layers is None and settings.n_cpu_moe is None
    by_room = sorted(gpus, key=lambda gpu: (-gpu.room, gpu.address, gpu.name))
    for margin in (build.fit_margin,) if fits_layers else (_MARGIN, 0):
        found = _whole(gpus, by_room, need_for, settings, margin)
        if found is None and fits and not fits_layers and settings.ctx_size is None:
            found = _with_less_context(gpus, by_room, need_for, settings, margin)
        if found is not None:
            return found
    if fits_layers:
        return _in_part(gpus, by_room, need_for, settings)
    return reckoned(gpus, need_for, settings)


def names_devices(settings: RuntimeSettings) -> bool:
    """Whether the settings say by an extra flag which GPUs to use."""
    return any(flag.startswith(_DEVICE_FLAG) for flag in settings.extra_flags or ())


def leaves_nothing_to_fit(settings: RuntimeSettings, *, has_gpus: bool) -> bool:
    """Whether llama-server's ``--fit`` would change nothing: all that it might is set, or there is no GPU to fill.

    It makes a context smaller only where none is set, and gives up where somebody set how many layers go to GPUs
    (``common_fit_params``), but for the number by which the first builds with it had "not set". What it would leave of
    a draft model is not known here.
    """
    if not settings.ctx_size or settings.draft_model is not None:
        return False
    if any(flag.startswith(_FIT_FLAGS) for flag in settings.extra_flags or ()):
        return False
    return not has_gpus or (settings.n_gpu_layers is not None and settings.n_gpu_layers in _SET_LAYERS)


def reckoned(gpus: Sequence[UsableGpu], need_for: NeedFor, settings: RuntimeSettings) -> Choice:
    """These and no other; what they take, and what of it they do not have."""
    need = need_for([gpu.device for gpu in gpus], False)
    taken = shares(need, gpus, settings)
    shortage = None
    if any(taken[gpu.name] > gpu.room for gpu in gpus):
        shortage = GpuShortage(
            needed=need.gpu_bytes,
            free=sum(gpu.free for gpu in gpus),
            promised=sum(gpu.promised for gpu in gpus),
            devices=tuple(gpu.name for gpu in gpus),
        )
    return Choice((), tuple(gpus), need, taken, shortage)


def shares(need: MemoryNeed, gpus: Sequence[UsableGpu], settings: RuntimeSettings) -> dict[str, int]:
    """What each GPU takes of a need; together, all that it has on GPUs."""
    if not gpus:
        return {}
    each = (need.compute.gpu + need.other.gpu) // len(gpus)
    divided = max(0, need.gpu_bytes - need.projector.gpu - each * len(gpus))
    split = settings.tensor_split
    weights: list[float] = [gpu.free for gpu in gpus]
    if settings.split_mode == "none":
        weights = [1.0]
    elif split is not None and any(split[: len(gpus)]):
        weights = list(split)
    weights = [*weights, *(0.0 for _ in gpus)][: len(gpus)]
    if not any(weights):
        weights = [1.0 for _ in gpus]
    taken = {gpu.name: each + int(divided * (weight / sum(weights))) for gpu, weight in zip(gpus, weights, strict=True)}
    # The first one has the projector, and what is left when bytes are divided.
    taken[gpus[0].name] += need.gpu_bytes - sum(taken.values())
    return taken


def _is_chosen_by_hand(settings: RuntimeSettings) -> bool:
    by_hand = (settings.split_mode, settings.tensor_split, settings.main_gpu)
    return names_devices(settings) or any(said is not None for said in by_hand)


def _chosen_by_hand(gpus: Sequence[UsableGpu], settings: RuntimeSettings) -> Sequence[UsableGpu]:
    """Those that llama-server uses as it is set."""
    named = next((flag for flag in settings.extra_flags or () if flag.startswith(_DEVICE_FLAG)), None)
    if named is not None:
        names = named.removeprefix(_DEVICE_FLAG).split(",")
        gpus = [gpu for name in names for gpu in gpus if gpu.name == name]
    if settings.split_mode == "none":
        main = settings.main_gpu or 0
        return gpus[main : main + 1]
    return gpus


def _tried(
    gpus: Sequence[UsableGpu], need: MemoryNeed, settings: RuntimeSettings, margin: int
) -> Choice | None:  # fmt: skip
    """These, where a need fits there."""
    taken = shares(need, gpus, settings)
    if len(gpus) > 1 and margin:
        # No layer is divided, so one may have up to a layer more than its share.
        in_layers = need.weights + need.kv_cache + need.recurrent_state
        margin += in_layers.gpu // max(1, need.gpu_layers)
    if any(taken[gpu.name] + margin > gpu.room for gpu in gpus):
        return None
    return Choice(tuple(gpu.name for gpu in gpus), tuple(gpus), need, taken)


def _largest(gpus: Sequence[UsableGpu], by_room: Sequence[UsableGpu], count: int) -> list[UsableGpu]:
    """So many with the most room, in llama-server's order."""
    return [gpu for gpu in gpus if gpu in by_room[:count]]


def _whole(
    gpus: Sequence[UsableGpu], by_room: Sequence[UsableGpu], need_for: NeedFor, settings: RuntimeSettings, margin: int
) -> Choice | None:
    """The fullest one that all of it fits on, else as few as it fits on."""
    for gpu in sorted(gpus, key=lambda gpu: (gpu.room, gpu.address, gpu.name)):
        if found := _tried([gpu], need_for([gpu.device], True), settings, margin):
            return found
    for count in range(2, len(gpus) + 1):
        some = _largest(gpus, by_room, count)
        if found := _tried(some, need_for([gpu.device for gpu in some], True), settings, margin):
            return found
    return None


def _with_less_context(
    gpus: Sequence[UsableGpu], by_room: Sequence[UsableGpu], need_for: NeedFor, settings: RuntimeSettings, margin: int
) -> Choice | None:
    """As few as it fits on with the context that llama-server makes room for, nobody having set one."""
    for count in range(1, len(gpus) + 1):
        some = _largest(gpus, by_room, count)
        if found := _tried(some, need_for([gpu.device for gpu in some], False), settings, margin):
            return found
    return None


def _in_part(
    gpus: Sequence[UsableGpu], by_room: Sequence[UsableGpu], need_for: NeedFor, settings: RuntimeSettings
) -> Choice:
    """As many with room as help, for what fits there; none where nothing does."""
    with_room = list(takewhile(lambda gpu: gpu.room > 0, by_room))
    bare: Choice | None = None
    for count in range(len(with_room), 0, -1):
        some = _largest(gpus, by_room, count)
        need = need_for([gpu.device for gpu in some], False)
        # It fills each one by itself, as far as there is room.
        taken = shares(need, [replace(gpu, free=gpu.room, promised=0) for gpu in some], settings)
        if any(taken[gpu.name] > gpu.room for gpu in some):
            continue
        found = Choice(tuple(gpu.name for gpu in some), tuple(some), need, taken)
        if need.gpu_layers:
            return found
        # Without a layer there, one still helps with long prompts.
        bare = found if count == 1 else None
    return bare or Choice(NO_DEVICE, (), need_for([], False))
