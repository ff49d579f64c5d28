"""What a server will need of memory, from the facts of its files, its settings, its build and the host's devices.

Pure functions. The rules are llama.cpp's own (release b10435; each part's module names its sources); where layers go
is ``llama_model_base::load_tensors``: the last ``n_gpu_layers`` layers lie on GPUs, the output counted as one, and what
looks tokens up lies on the host. Layers, caches and buffers on a GPU, and what ``--fit`` leaves there, were compared
with a software Vulkan device by hand. What could not be run, and rests on reading and on what is known of them: CUDA
and ROCm (what their drivers take), several GPUs, AMX, projectors' buffers. Where a file's blocks are not in order,
llama.cpp maps more of it than its layers on the host need; that is not counted.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from magi_agent.gguf.facts import HeaderFacts
from magi_agent.memory.build import Build
from magi_agent.memory.cache import Context, bookkeeping_bytes, cache_bytes, context_of, row_bytes, state_bytes
from magi_agent.memory.compute import compute_bytes, input_bytes, output_bytes
from magi_agent.memory.layers import Reach, layers_of
from magi_agent.memory.need import MemoryNeed, NeedUnknown, Split
from magi_agent.runtime_settings.settings import RuntimeSettings

_MIB: Final = 1 << 20
_PROGRAM: Final = 4 * _MIB
"""Anonymous memory of a llama-server without a model; this and the next two as measured with release b10434."""
_TOKEN: Final = 190
"""Bytes of the vocabulary for each token: its text twice, both ways, and a candidate when sampling."""
_MERGE: Final = 130
"""Bytes for each rule by which tokens are merged."""
_DRIVER: Final = {"CUDA": 400 * _MIB, "ROCm": 400 * _MIB, "SYCL": 200 * _MIB}
"""Bytes that a process takes on each GPU before it allocates anything, by the beginning of the device's name."""
_DRIVER_ON_HOST: Final = {"CUDA": 200 * _MIB, "ROCm": 200 * _MIB, "SYCL": 200 * _MIB, "Vulkan": 30 * _MIB}
_DEFAULT_CACHE_TYPE: Final = "f16"
_MOST_BYTES: Final = 1 << 60
_EMBEDS: Final = frozenset({"embedding", "rerank"})


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as llama-server lists it."""

    name: str
    """Such as CUDA0."""
    total_bytes: int
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The facts of all files that one server loads."""

    parts: tuple[HeaderFacts, ...]
    """Of a split set in order, or of the one file."""
    projector: HeaderFacts | None = None
    draft: tuple[HeaderFacts, ...] = ()
    lora: tuple[HeaderFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a server is started in, as far as its memory depends on it."""

    build: Build = field(default_factory=Build)
    devices: tuple[Device, ...] = ()
    """GPUs that the build lists; empty where there is none, or where it cannot use them."""
    host_bytes: int | None = None
    """RAM of the host; ``None`` where it is not known."""


def estimate(files: ModelFiles, settings: RuntimeSettings, where: Surroundings) -> MemoryNeed:
    """What a server of ``files`` needs when it serves. Raises ``NeedUnknown`` where the headers do not say enough."""
    need = _Estimate(files, settings, where).fitted()
    if need.host_bytes + need.gpu_bytes + need.may_grow > _MOST_BYTES:
        raise NeedUnknown("the header names sizes that no machine has")
    return need


@dataclass(frozen=True, slots=True)
class _Weights:
    """The bytes of a model's tensors, of all its parts."""

    input: int
    blocks: int
    experts: int
    rest: int
    embedding: int
    embedding_type: int | None
    has_output: bool
    matrices: tuple[tuple[int, int], ...]
    """ggml types, and bytes of them that could be repacked."""

    @classmethod
    def of(cls, parts: Sequence[HeaderFacts]) -> "_Weights":
        embedding = next((part for part in parts if part.embedding_bytes), parts[0])
        return cls(
            input=sum(part.input_bytes for part in parts),
            blocks=sum(part.block_bytes for part in parts),
            experts=sum(part.expert_bytes for part in parts),
            rest=sum(part.rest_bytes for part in parts),
            embedding=embedding.embedding_bytes,
            embedding_type=embedding.embedding_type,
            has_output=any(part.has_output_matrix for part in parts),
            matrices=tuple(
                entry
                for part in parts
                for entry in zip(part.matrices_by_type[::2], part.matrices_by_type[1::2], strict=True)
            ),
        )

    @property
    def total(self) -> int:
        return self.input + self.blocks + self.experts + self.rest


@dataclass(frozen=True, slots=True)
class _Plan:
    """What ``--fit`` decides: how long the context is, and what lies on GPUs."""

    tokens: int
    gpu_layers: int
    cpu_experts: int
    """Blocks whose experts stay on the host."""
    is_cut: bool = False


class _Estimate:
    """One estimate: what its steps have in common."""

    def __init__(self, files: ModelFiles, settings: RuntimeSettings, where: Surroundings) -> None:
        self._files = files
        self._settings = settings
        self._build = where.build
        self._where = where
        self._facts = files.parts[0]
        self._weights = _Weights.of(files.parts)
        self._layers = layers_of(self._facts)
        self._flags = dict(flag.partition("=")[::2] for flag in settings.extra_flags or ())
        self._devices = where.devices[:1] if settings.split_mode == "none" else where.devices
        self._all = len(self._layers.layers) + 1

    def fitted(self) -> MemoryNeed:
        """The need of what is left of the settings once llama-server has fitted what is not set into memory."""
        settings, build = self._settings, self._build
        asked = build.gpu_layers if settings.n_gpu_layers is None else settings.n_gpu_layers
        layers = 0 if not self._devices else self._all if asked < 0 else min(asked, self._all)
        kept = len(self._layers.layers) if "--cpu-moe" in self._flags else settings.n_cpu_moe or 0
        trained = self._facts.context_length or 0
        said = build.context if settings.ctx_size is None else settings.ctx_size
        plan = _Plan(said or trained, layers, kept)
        if not plan.tokens:
            raise NeedUnknown("neither the settings nor the header name a context length")
        if not build.fits or self._flags.get("--fit") in ("off", "0", "false"):
            return self._need(plan)
        if settings.ctx_size is None and not build.context:
            plan = self._with_context_cut(plan)
        if layers and settings.n_gpu_layers is None and settings.n_cpu_moe is None and not settings.tensor_split:
            plan = self._with_layers_cut(plan)
        return self._need(plan)

    def _with_context_cut(self, plan: _Plan) -> _Plan:
        """The plan with a context that fits, by llama.cpp's interpolation between the shortest and the trained one."""
        room, least = self._room(plan), self._build.fit_least_context
        if room is None or plan.tokens <= least:
            return plan
        full = self._fits_in(self._need(plan), plan)
        if full <= room:
            return plan
        short = self._fits_in(self._need(replace(plan, tokens=least)), plan)
        tokens = least
        if room > short and full > short:
            tokens += (plan.tokens - least) * (room - short) // (full - short)
        return replace(plan, tokens=max(tokens - tokens % 256, least), is_cut=True)

    def _with_layers_cut(self, plan: _Plan) -> _Plan:
        """The plan with as much on GPUs as fits there: without some blocks' experts, else with fewer layers."""
        room = self._room(plan)
        if room is None or self._fits_in(self._need(plan), plan) <= room:
            return plan
        if self._weights.experts:
            fewest = _first(
                range(self._all), lambda kept: self._fits_in(self._need(replace(plan, cpu_experts=kept)), plan) <= room
            )
            if fewest is not None:
                return replace(plan, cpu_experts=fewest)
            plan = replace(plan, cpu_experts=self._all - 1)
        fewer = _first(
            range(1, self._all + 1),
            lambda gone: self._fits_in(self._need(replace(plan, gpu_layers=self._all - gone)), plan) <= room,
        )
        return replace(plan, gpu_layers=0 if fewer is None else self._all - fewer)

    def _room(self, plan: _Plan) -> int | None:
        """Bytes that what is fitted may take; ``None`` where that is not known."""
        margin = self._build.fit_margin
        if not plan.gpu_layers:
            return None if self._where.host_bytes is None or self._devices else self._where.host_bytes - margin
        free = [device.total_bytes if device.free_bytes is None else device.free_bytes for device in self._devices]
        extra = self._projector().gpu + self._draft(plan.tokens).gpu + self._driver(_DRIVER)
        return sum(free) - margin * len(free) - extra

    def _fits_in(self, need: MemoryNeed, plan: _Plan) -> int:
        """Bytes of a need that llama-server counts when it fits: of the host, not what is repacked."""
        parts = (need.kv_cache, need.recurrent_state, need.compute)
        if plan.gpu_layers:
            return need.weights.gpu + sum(part.gpu for part in parts)
        weights = self._weights
        counted = weights.total - self._in_copies(weights.blocks + weights.experts)
        return counted + sum(part.host for part in parts)

    def _need(self, plan: _Plan) -> MemoryNeed:
        context = self._context(plan.tokens)
        flash = self._flash_attention
        weights, mapped = self._weights_split(plan)
        outputs = self._outputs(context)
        embeddings = self._embeds
        cache = cache_bytes(
            self._layers,
            context,
            self._settings.cache_type_k or _DEFAULT_CACHE_TYPE,
            self._settings.cache_type_v or _DEFAULT_CACHE_TYPE,
            transposed=not flash,
        )
        on_gpu = 0 if "--no-kv-offload" in self._flags else self._blocks_on_gpu(plan)
        logits = self._facts if self._makes_logits else replace(self._facts, vocabulary_size=0)
        compute = compute_bytes(logits, self._layers, context, flash_attention=flash, outputs=outputs)
        inputs = input_bytes(self._facts, self._layers, context, flash_attention=flash)
        return MemoryNeed(
            weights=weights,
            kv_cache=_split_layers(cache, on_gpu),
            recurrent_state=_split_layers(state_bytes(self._layers, context), on_gpu),
            # Without any layer there, GPUs are still used to multiply large batches.
            compute=Split(host=inputs, gpu=compute * len(self._devices)) if self._devices else Split(compute),
            output=Split(host=output_bytes(self._facts, outputs, embeddings=embeddings)),
            projector=self._projector(),
            draft=self._draft(plan.tokens),
            lora=self._lora(plan),
            other=self._process() + Split(vocabulary_bytes(self._facts) + bookkeeping_bytes(self._layers, context)),
            mapped=mapped,
            context=context.tokens,
            context_is_cut=plan.is_cut,
            slots=context.slots,
            gpu_layers=plan.gpu_layers,
            may_grow=self._may_grow(context),
        )

    def _context(self, tokens: int) -> Context:
        settings, build = self._settings, self._build
        asked = settings.parallel_slots if settings.parallel_slots is not None else build.slots
        slots = build.automatic_slots if asked < 0 else max(1, asked)
        unified = (asked < 0 or "--kv-unified" in self._flags) and "--no-kv-unified" not in self._flags
        ubatch = settings.ubatch_size or build.ubatch
        batch = settings.batch_size or build.batch
        if self._embeds:
            batch = min(batch, ubatch)
        causal = self._facts.causal_attention is not False
        return context_of(tokens, slots, batch, ubatch, unified=unified, causal=causal)

    @property
    def _embeds(self) -> bool:
        return self._settings.mode in _EMBEDS

    @property
    def _makes_logits(self) -> bool:
        """Whether the graph ends in the vocabulary; that of an encoder, which keeps nothing, ends in embeddings."""
        return self._layers.has_cache or self._layers.is_recurrent or self._facts.causal_attention is not False

    @property
    def _flash_attention(self) -> bool:
        said = self._settings.flash_attention
        return self._build.flash_attention if said in (None, "auto") else said == "on"

    def _outputs(self, context: Context) -> int:
        return context.batch if self._embeds else context.slots

    def _blocks_on_gpu(self, plan: _Plan) -> int:
        return max(0, plan.gpu_layers - 1)

    def _weights_split(self, plan: _Plan) -> tuple[Split, int]:
        """Bytes of weights by place, and those of the host's that are mapped."""
        weights, count = self._weights, len(self._layers.layers)
        blocks = self._blocks_on_gpu(plan)
        dense = min(self._facts.leading_dense_block_count or 0, count - 1)
        with_experts = max(0, count - max(count - blocks, plan.cpu_experts, dense))
        blocks_gpu = weights.blocks * blocks // count
        experts_gpu = weights.experts * with_experts // (count - dense)
        gpu = blocks_gpu + experts_gpu
        if plan.gpu_layers:
            gpu += weights.rest + (0 if weights.has_output else weights.embedding)
        host_blocks = weights.blocks + weights.experts - blocks_gpu - experts_gpu
        host = weights.input + host_blocks + (0 if plan.gpu_layers else weights.rest)
        is_mapped = self._settings.mmap is not False
        copies = self._repacked(host_blocks, plan)
        if not is_mapped:
            # They are what is read, and not there twice but for an embedding that serves twice.
            copies -= self._in_copies(host_blocks)
        return Split(host=host + copies, gpu=gpu), host if is_mapped else 0

    @property
    def _repacks(self) -> bool:
        """Whether the CPU reorders weights at all; with GPUs, what they can take in fast comes first."""
        return "--no-repack" not in self._flags and (not self._devices or "--no-host" in self._flags)

    def _repacked(self, host_blocks: int, plan: _Plan) -> int:
        """Bytes of the copies that the CPU keeps of mapped weights."""
        copied = sum(self._build.copy_bytes(kind, size) for kind, size in self._weights.matrices)
        return self._on_host(copied, host_blocks) + self._repacked_embedding(plan)

    def _in_copies(self, host_blocks: int) -> int:
        """Bytes of the blocks' weights of which there are copies."""
        return self._on_host(
            sum(size for kind, size in self._weights.matrices if kind in self._build.repacked), host_blocks
        )

    def _on_host(self, repacked: int, host_blocks: int) -> int:
        """What of all that could be repacked is, with so many bytes of the blocks on the host."""
        in_blocks = self._weights.blocks + self._weights.experts
        return repacked * host_blocks // in_blocks if self._repacks and in_blocks else 0

    def _repacked_embedding(self, plan: _Plan) -> int:
        """Bytes of the copy of the embedding matrix that serves as the output matrix."""
        weights = self._weights
        if weights.has_output or plan.gpu_layers or not self._repacks:
            return 0
        kind = weights.embedding_type
        return 0 if kind is None else self._build.copy_bytes(kind, weights.embedding)

    def _projector(self) -> Split:
        """The projector's weights, and its buffer for one image of the size that the header names."""
        facts = self._files.projector
        if facts is None:
            return Split()
        patches = 0
        if facts.vision_image_size and facts.vision_patch_size:
            patches = min((facts.vision_image_size // facts.vision_patch_size) ** 2, 1 << 20)
        width = 6 * (facts.vision_embedding_length or 0) + 3 * (facts.vision_feed_forward_length or 0)
        size = _Weights.of((facts,)).total + patches * width * 4
        return Split(gpu=size) if self._devices and self._settings.n_gpu_layers != 0 else Split(host=size)

    def _draft(self, tokens: int) -> Split:
        """All that the draft model adds; its context is as long as the model's."""
        if not self._files.draft:
            return Split()
        settings = replace(
            self._settings,
            ctx_size=tokens,
            n_gpu_layers=self._settings.draft_n_gpu_layers,
            draft_model=None,
            cache_type_k=None,
            cache_type_v=None,
            n_cpu_moe=None,
            mode=None,
        )
        where = replace(self._where, build=replace(self._build, fits=False))
        need = _Estimate(ModelFiles(self._files.draft), settings, where).fitted()
        shared = self._process()
        return Split(need.host_bytes - shared.host, need.gpu_bytes - shared.gpu)

    def _lora(self, plan: _Plan) -> Split:
        """The adapters' tensors, which lie where the tensors lie that they change."""
        size = sum(_Weights.of((facts,)).total for facts in self._files.lora)
        gpu = size * self._blocks_on_gpu(plan) // len(self._layers.layers)
        return Split(size - gpu, gpu)

    def _process(self) -> Split:
        """What a llama-server takes without any model."""
        return Split(_PROGRAM + self._driver(_DRIVER_ON_HOST), self._driver(_DRIVER))

    def _driver(self, table: dict[str, int]) -> int:
        return sum(size for device in self._devices for name, size in table.items() if device.name.startswith(name))

    def _may_grow(self, context: Context) -> int:
        """Kept prompts, up to the limit; and each slot's checkpoints of what cannot be rolled back."""
        cache = self._build.prompt_cache
        if self._flags.get("--cache-ram", "").lstrip("-").isdecimal():
            mebibytes = int(self._flags["--cache-ram"])
            cache = -1 if mebibytes < 0 else mebibytes * _MIB
        if cache < 0:
            cache = self._where.host_bytes or 0
        state = sum(state_bytes(self._layers, context)) // context.slots
        window = sum(
            row_bytes(layer.keys, self._settings.cache_type_k or _DEFAULT_CACHE_TYPE)
            + row_bytes(layer.values, self._settings.cache_type_v or _DEFAULT_CACHE_TYPE)
            for layer in self._layers.layers
            if layer.reach is Reach.WINDOW
        )
        kept = window * min(self._layers.window + context.ubatch, context.cells) + state
        return cache + kept * self._build.checkpoints * context.slots


def vocabulary_bytes(facts: HeaderFacts) -> int:
    """Bytes on the host that a vocabulary takes once it is loaded."""
    return (facts.vocabulary_size or 0) * _TOKEN + (facts.merges_count or 0) * _MERGE


def _split_layers(sizes: Sequence[int], on_gpu: int) -> Split:
    """Sizes of layers, of which the last so many are on GPUs."""
    first = len(sizes) - on_gpu
    return Split(sum(sizes[:first]), sum(sizes[first:]))


def _first(numbers: range, is_enough: Callable[[int], bool]) -> int | None:
    """The first of some numbers that is enough, where all behind it are too; ``None`` if none is."""
    found = bisect_left(numbers, True, key=is_enough)
    return numbers[found] if found < len(numbers) else None
