"""What a model needs of memory, part by part."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum


class Basis(StrEnum):
    """Where the figures come from; the later ones are the surer ones."""

    ESTIMATED = "estimated"
    """From the header's facts and the settings, by llama.cpp's rules."""
    REPORTED = "reported"
    """Buffers that llama-server itself reported when it loaded the model with the same settings."""
    MEASURED = "measured"
    """What a server used that ran with the same model, settings and binary."""


@dataclass(frozen=True, slots=True)
class Split:
    """Bytes, by the memory that they are in."""

    host: int = 0
    gpu: int = 0

    def __add__(self, other: "Split") -> "Split":
        return Split(self.host + other.host, self.gpu + other.gpu)

    @property
    def total(self) -> int:
        """Bytes in both."""
        return self.host + self.gpu


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The memory of one server when it serves, and what it was reckoned with."""

    weights: Split = Split()
    """Mapped or read weights, and the copies that the CPU's kernels keep of them in another order."""
    kv_cache: Split = Split()
    recurrent_state: Split = Split()
    compute: Split = Split()
    """Buffers for one physical batch."""
    output: Split = Split()
    """Logits and embeddings."""
    projector: Split = Split()
    """The multimodal projector, and its own compute buffer."""
    draft: Split = Split()
    """All of the draft model."""
    lora: Split = Split()
    other: Split = Split()
    """Vocabulary, bookkeeping, a GPU driver's context; in a measured need also what no other part explains."""
    basis: Basis = Basis.ESTIMATED
    mapped: int = 0
    """Of the weights on the host, what is mapped from files: page cache, which the kernel can read again."""
    context: int = 0
    """Tokens of context, of all slots together, as llama-server makes them of the settings."""
    context_is_cut: bool = False
    """llama-server is expected to make the context shorter than the model's, because memory is short (``--fit``)."""
    slots: int = 1
    gpu_layers: int = 0
    """Layers on GPUs, the output layer counted as one."""
    may_grow: int = 0
    """Bytes of host memory by which it may grow beyond this while it serves: kept prompts and checkpoints."""

    @property
    def host_bytes(self) -> int:
        """Anonymous memory plus mapped weights."""
        return sum(split.host for _, split in self.parts())

    @property
    def gpu_bytes(self) -> int:
        """Memory of all GPUs together."""
        return sum(split.gpu for _, split in self.parts())

    @property
    def anonymous_bytes(self) -> int:
        """Of the host's bytes, those that no file holds."""
        return self.host_bytes - self.mapped

    def parts(self) -> Iterator[tuple[str, Split]]:
        """Each part with its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Split):
                yield field.name, value
