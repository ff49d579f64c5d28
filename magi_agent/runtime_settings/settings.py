"""The runtime settings: what people may say of how one model's server is run.

One definition serves everything: the wire and its OpenAPI schema, the registry, profiles, ``agent.toml`` and the start
itself. What a field is passed on as stands in ``runtime_settings.passing`` for llama-server and in
``servers.unit_limits`` for systemd; here is what it may be.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Final, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen

from magi_agent.vocabulary import StartPolicy

_PATH: Final = 4096
_CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
_Path = Annotated[str, MinLen(1), MaxLen(_PATH)]
_Threads = Annotated[int, Ge(-1), Le(4096)]
_Layers = Annotated[int, Ge(-1), Le(100_000)]
_Tokens = Annotated[int, Ge(0), Le(100_000_000)]
_Batch = Annotated[int, Ge(1), Le(1_000_000)]
_Bytes = Annotated[int, Ge(1), Le(1 << 60)]
_Weight = Annotated[int, Ge(1), Le(10_000)]
_Ratio = Annotated[float, Gt(0), Le(1e9)]

NO_PROJECTOR: Final = "none"
_ALIAS: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*")
_BINARY: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_GPU: Final = re.compile(r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]|GPU-[0-9a-fA-F][0-9a-fA-F-]{7,63}")
_FLAG: Final = re.compile(r"--[a-z0-9][a-z0-9-]*(=.*)?")
_NUMBERS: Final = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", re.ASCII)
MOST_CPUS: Final = 8192
_TEMPLATE_BYTES: Final = 100_000
"""Linux takes 128 KiB for one string of an environment (MAX_ARG_STRLEN, execve(2)), the variable's name included."""


def wire_name(name: str) -> str:
    """A setting's name as it stands on the wire: camelCase."""
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def _describe(schema: dict[str, Any], settings: type) -> None:
    """Describe each setting, in a JSON schema of all, by the text that stands below it.

    pydantic can do so itself, but then it parses this file for every body that has settings in it, before that is used:
    6 ms and most of a megabyte each time, for what only a schema has.
    """
    [definition] = ast.parse(inspect.getsource(settings)).body
    for one, next_one in pairwise(ast.iter_child_nodes(definition)):
        match one, next_one:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                schema["properties"][wire_name(name)]["description"] = inspect.cleandoc(text)
            case _:
                pass


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter that the model is run with."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "alias_generator": wire_name, "populate_by_name": True}

    path: _Path
    scale: Annotated[float, Ge(-1000), Le(1000)] = 1.0


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """How a model's server is run; null leaves a setting to the defaults of its tier, of the host, of llama-server."""

    __pydantic_config__: ClassVar = {
        "extra": "forbid",
        "alias_generator": wire_name,
        "populate_by_name": True,
        "json_schema_extra": _describe,
    }

    n_gpu_layers: _Layers | None = None
    """Layers kept in GPU memory; -1 for all of them."""
    ctx_size: _Tokens | None = None
    """Context in tokens, shared by all slots; 0 for what the model was trained with."""
    n_threads: _Threads | None = None
    """CPU threads for generation; -1 leaves it to llama-server."""
    batch_size: _Batch | None = None
    """Tokens of a logical batch."""
    n_threads_batch: _Threads | None = None
    """CPU threads for prompts; -1 leaves it to llama-server."""
    ubatch_size: _Batch | None = None
    """Tokens of a physical batch."""
    parallel_slots: Annotated[int, Ge(-1), Le(1024)] | None = None
    """Requests answered at the same time; -1 leaves it to llama-server."""
    flash_attention: Literal["on", "off", "auto"] | None = None
    """Whether attention is computed without its whole matrix in memory."""
    cache_type_k: _CacheType | None = None
    """Data type of the KV cache's keys."""
    cache_type_v: _CacheType | None = None
    """Data type of the KV cache's values; a quantized one needs flash attention."""
    mmap: bool | None = None
    """Whether the weights are mapped from the file, instead of being read into memory."""
    mlock: bool | None = None
    """Whether memory is kept from being swapped out."""
    split_mode: Literal["none", "layer", "row", "tensor"] | None = None
    """How the model is split across GPUs."""
    tensor_split: Annotated[tuple[Annotated[float, Ge(0), Le(1e6)], ...], MinLen(1), MaxLen(128)] | None = None
    """The share of each GPU, as proportions."""
    main_gpu: Annotated[int, Ge(0), Le(255)] | None = None
    """Index of the GPU that holds the model (split mode none) or its small tensors (row)."""
    gpus: Annotated[tuple[Annotated[str, MinLen(1), MaxLen(100)], ...], MinLen(1), MaxLen(64)] | None = None
    """The GPUs to use and no other, by PCI address ("0000:01:00.0") or UUID ("GPU-…"), as magictl host shows them."""
    n_cpu_moe: Annotated[int, Ge(0), Le(100_000)] | None = None
    """Layers whose experts stay in main memory."""
    lora: Annotated[tuple[LoraAdapter, ...], MaxLen(32)] | None = None
    """LoRA adapters, inside the model folders."""
    draft_model: _Path | None = None
    """Model file that drafts for speculative decoding, inside the model folders."""
    draft_n_gpu_layers: _Layers | None = None
    """Layers of the draft model kept in GPU memory; -1 for all of them."""
    draft_max: Annotated[int, Ge(1), Le(1024)] | None = None
    """Most tokens to draft."""
    draft_min: Annotated[int, Ge(0), Le(1024)] | None = None
    """Fewest tokens to draft."""
    projector: _Path | None = None
    """Projector file inside the model folders, or "none" for none; null is the one that was found with the model."""
    rope_scaling: Literal["none", "linear", "yarn"] | None = None
    """How positions beyond the trained context are scaled."""
    rope_scale: _Ratio | None = None
    """Factor by which the context grows."""
    rope_freq_base: _Ratio | None = None
    """Base frequency of the rotary embedding; null is the model's own."""
    rope_freq_scale: _Ratio | None = None
    """Factor on its frequencies: a context that grows by N has 1/N."""
    yarn_orig_ctx: _Tokens | None = None
    """Context in tokens that the model was trained with."""
    mode: Literal["generate", "embedding", "rerank"] | None = None
    """What the server is for; null is what the model is made for."""
    pooling: Literal["none", "mean", "cls", "last", "rank"] | None = None
    """How an embedding is made of its tokens."""
    chat_template: Annotated[str, MinLen(1), MaxLen(65_536)] | None = None
    """Name of a template that llama-server knows, or Jinja on one line; longer ones belong into a file."""
    chat_template_file: _Path | None = None
    """File with a Jinja template, inside the model folders."""
    reasoning: Literal["on", "off", "auto"] | None = None
    """Whether the model thinks where its template lets one choose."""
    reasoning_format: Literal["none", "deepseek", "deepseek-legacy", "auto"] | None = None
    """In which form thoughts are returned."""
    reasoning_budget: Annotated[int, Ge(-1), Le(100_000_000)] | None = None
    """Tokens of thought; -1 for no limit."""
    numa: Literal["distribute", "isolate", "numactl"] | None = None
    """How llama-server spreads over NUMA nodes."""
    aliases: Annotated[tuple[Annotated[str, MinLen(1), MaxLen(200)], ...], MaxLen(64)] | None = None
    """Other names by which requests may ask for the model."""
    extra_flags: Annotated[tuple[Annotated[str, MinLen(3), MaxLen(1000)], ...], MaxLen(64)] | None = None
    """Further flags of llama-server, as "--flag" or "--flag=value", of those that servers.allowed_flags names."""
    binary: Annotated[str, MinLen(1), MaxLen(64)] | None = None
    """Name of another llama-server, of those in servers.llama_server_alternatives."""
    start_policy: StartPolicy | None = None
    """When an enabled model is started; null is alwaysOn."""
    pinned: bool | None = None
    """Whether the server is never stopped to make room for another."""
    idle_timeout_seconds: Annotated[int, Ge(1), Le(31_536_000)] | None = None
    """Seconds without a request after which an onDemand server is stopped; null for never."""
    max_concurrent: Annotated[int, Ge(1), Le(100_000)] | None = None
    """Requests that the gateway lets through to the model at once, others wait; null for no bound."""
    memory_high: _Bytes | None = None
    """Bytes of memory above which the unit is slowed down to give some back (MemoryHigh=)."""
    memory_max: _Bytes | None = None
    """Bytes of memory that the unit may not exceed (MemoryMax=)."""
    cpu_quota: Annotated[float, Ge(0.01), Le(MOST_CPUS)] | None = None
    """CPUs' worth of time: 2.5 is two and a half CPUs (CPUQuota=)."""
    cpu_weight: _Weight | None = None
    """Share of the CPU against other units, 100 being theirs (CPUWeight=)."""
    cpu_affinity: Annotated[str, MinLen(1), MaxLen(1000)] | None = None
    """CPUs that may be used, such as "0-7,16-23" (CPUAffinity=)."""
    io_weight: _Weight | None = None
    """Share of the disk against other units, 100 being theirs (IOWeight=)."""
    io_read_bandwidth_max: _Bytes | None = None
    """Bytes a second that may be read from the disk of the model (IOReadBandwidthMax=)."""
    numa_policy: Literal["default", "preferred", "bind", "interleave", "local"] | None = None
    """How memory is spread over NUMA nodes (NUMAPolicy=)."""
    numa_nodes: Annotated[str, MinLen(1), MaxLen(1000)] | None = None
    """NUMA nodes that the policy is about, such as "0-1" (NUMAMask=)."""

    def over(self, under: "RuntimeSettings") -> "RuntimeSettings":
        """These settings, and where they are silent, those of ``under``."""
        if under == _NOTHING:
            return self
        if self == _NOTHING:
            return under
        if self.chat_template or self.chat_template_file:
            # There is one template, in the one form or in the other.
            under = replace(under, chat_template=None, chat_template_file=None)
        return RuntimeSettings(
            **{
                name: under_value if (value := getattr(self, name)) is None else value
                for name, under_value in ((name, getattr(under, name)) for name in setting_names())
            }
        )

    def said(self) -> Iterator[tuple[str, object]]:
        """The settings that somebody spoke about, by name."""
        for name in setting_names():
            value = getattr(self, name)
            if value is not None:
                yield name, value


_NOTHING: Final = RuntimeSettings()


@cache
def setting_names() -> tuple[str, ...]:
    """The names of all settings, in order."""
    return tuple(field.name for field in fields(RuntimeSettings))


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one setting."""

    name: str
    message: str


def faults_of(settings: RuntimeSettings) -> tuple[Fault, ...]:
    """What no type says: values that are malformed, or do not go together."""
    return tuple(Fault(name, message) for name, message in _faults(settings))


def numbers_in(text: str) -> tuple[int, ...]:
    """The numbers in a list of numbers and ranges, such as ``0-3,8``. Raises ``ValueError`` for what is none."""
    if not _NUMBERS.fullmatch(text):
        raise ValueError("must be numbers and ranges, such as '0-7,16-23'")
    numbers = 0  # as bits: a few hundred wide ranges are no work then
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high or high >= MOST_CPUS:
            raise ValueError(f"has a range that is none, or beyond {MOST_CPUS - 1}: {part!r}")
        numbers |= (1 << high + 1) - (1 << low)
    return tuple(number for number, bit in enumerate(f"{numbers:b}"[::-1]) if bit == "1")


def _faults(settings: RuntimeSettings) -> Iterator[tuple[str, str]]:
    yield from _path_faults(settings)
    yield from _word_faults(settings)
    for name in ("cpu_affinity", "numa_nodes"):
        if (text := getattr(settings, name)) is not None:
            try:
                numbers_in(text)
            except ValueError as error:
                yield name, str(error)
    if settings.memory_high and settings.memory_max and settings.memory_high > settings.memory_max:
        yield "memory_high", "must be at most memory_max"
    if settings.parallel_slots == 0:
        yield "parallel_slots", "must be -1, or 1 or more"
    if settings.draft_min and settings.draft_max and settings.draft_min > settings.draft_max:
        yield "draft_min", "must be at most draft_max"
    if settings.tensor_split is not None and not any(settings.tensor_split):
        yield "tensor_split", "must give at least one GPU a share"
    if settings.chat_template and settings.chat_template_file:
        yield "chat_template_file", "goes with no chat_template: give one of them"
    if settings.numa_policy in ("preferred", "bind", "interleave") and settings.numa_nodes is None:
        yield "numa_nodes", f"must be given with the NUMA policy {settings.numa_policy!r}"
    elif settings.numa_policy == "preferred" and not (settings.numa_nodes or "").isdecimal():
        yield "numa_nodes", "must be one node with the NUMA policy 'preferred'"


def _path_faults(settings: RuntimeSettings) -> Iterator[tuple[str, str]]:
    paths = [(name, getattr(settings, name)) for name in ("draft_model", "chat_template_file")]
    paths.append(("projector", None if settings.projector == NO_PROJECTOR else settings.projector))
    paths += [("lora", adapter.path) for adapter in settings.lora or ()]
    for name, path in paths:
        if path is None:
            continue
        if not path.startswith("/") or ".." in path.split("/"):
            yield name, "must be an absolute path without '..'"
        elif not path.isprintable():
            yield name, "must not have control characters"
        elif name == "lora" and re.search(r"[,:;$]", path):
            yield name, "must be a path without ',', ':', ';' and '$', which llama-server or systemd would misread"


def _word_faults(settings: RuntimeSettings) -> Iterator[tuple[str, str]]:
    if settings.chat_template is not None:
        if not settings.chat_template.isprintable():
            yield (
                "chat_template",
                "must be one line; put a longer template into a file, and name it in chat_template_file",
            )
        elif len(settings.chat_template.encode()) > _TEMPLATE_BYTES:
            yield (
                "chat_template",
                f"is longer than {_TEMPLATE_BYTES} bytes; put it into a file, and name it in chat_template_file",
            )
    for alias in settings.aliases or ():
        if not _ALIAS.fullmatch(alias):
            yield "aliases", f"{alias!r} has other characters than letters, digits and '._:/@+-'"
        elif alias.casefold().startswith("tier:"):
            yield "aliases", f"{alias!r} would be taken for the name of a tier"
    if len(set(settings.aliases or ())) < len(settings.aliases or ()):
        yield "aliases", "must not name anything twice"
    yield from _gpu_faults(settings)
    for flag in settings.extra_flags or ():
        if not _FLAG.fullmatch(flag) or not flag.isprintable() or "$" in flag or ";" in flag:
            yield "extra_flags", f"{flag!r} must be '--flag' or '--flag=value', without '$' and ';'"
    if settings.binary is not None and not _BINARY.fullmatch(settings.binary):
        yield "binary", "must be a name made of lower-case letters, digits, '-' and '_'"


def _gpu_faults(settings: RuntimeSettings) -> Iterator[tuple[str, str]]:
    gpus = settings.gpus or ()
    for gpu in gpus:
        if not _GPU.fullmatch(gpu):
            yield "gpus", f"{gpu!r} is neither a PCI address (0000:01:00.0) nor a UUID (GPU-…); magictl host shows them"
    if len({gpu.lower() for gpu in gpus}) < len(gpus):
        yield "gpus", "must not name anything twice"
    if gpus and any(flag.startswith("--device=") for flag in settings.extra_flags or ()):
        yield "gpus", "goes with no --device among extra_flags: give one of them"
