"""What a model needs of memory, part by part."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final, Literal


class Basis(StrEnum):
    """Where the figures come from; the later ones are the surer ones."""

    ESTIMATED = "estimated"
    """From the header's facts and the settings, by llama.cpp's rules."""
    REPORTED = "reported"
    """Buffers that llama-server itself reported when it loaded the model with the same settings."""
    MEASURED = "measured"
    """What a server used that ran with the same model, settings and binary."""


GpuBasis = Literal[Basis.ESTIMATED, Basis.REPORTED]
"""What was measured on GPUs is of one placement, and decides no other."""


class NeedUnknown(Exception):
    """A need that cannot be told; the message says why, in a sentence."""


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


NOTHING: Final = Split()


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """The memory of one server when it serves, and what it was reckoned with."""

    weights: Split = NOTHING
    """Mapped or read weights, and the copies that the CPU's kernels keep of them in another order."""
    kv_cache: Split = NOTHING
    recurrent_state: Split = NOTHING
    compute: Split = NOTHING
    """Buffers for one physical batch."""
    output: Split = NOTHING
    """Logits and embeddings."""
    projector: Split = NOTHING
    """The multimodal projector, and its own compute buffer."""
    draft: Split = NOTHING
    """All of the draft model."""
    lora: Split = NOTHING
    other: Split = NOTHING
    """Vocabulary, bookkeeping, a GPU driver's context."""
    basis: Basis = Basis.ESTIMATED
    """Of what is needed on the host."""
    gpu_basis: GpuBasis = Basis.ESTIMATED
    """Of what is needed on GPUs."""
    mapped: int = 0
    """Of the weights on the host, what is mapped from files: page cache, which the kernel can read again."""
    context: int = 0
    """Tokens of context, of all slots together, as llama-server makes them of the settings."""
    context_is_cut: bool = False
    """llama-server is expected to make the context shorter than the model's, because memory is short (``--fit``)."""
    slots: int = 1
    gpu_layers: int = 0
    """Layers on GPUs, the output layer counted as one."""
    measured_anonymous: int | None = None
    """Bytes of the host's anonymous memory, as measured; the parts stay what was estimated or reported."""
    may_grow: int = 0
    """Bytes of host memory by which it may grow beyond this while it serves: kept prompts and checkpoints."""

    @property
    def host_bytes(self) -> int:
        """Anonymous memory plus mapped weights."""
        return self.anonymous_bytes + self.mapped

    @property
    def gpu_bytes(self) -> int:
        """Memory of all GPUs together."""
        return sum(split.gpu for _, split in self.parts())

    @property
    def anonymous_bytes(self) -> int:
        """Of the host's bytes, those that no file holds."""
        if self.measured_anonymous is not None:
            return self.measured_anonymous
        return sum(split.host for _, split in self.parts()) - self.mapped

    def parts(self) -> Iterator[tuple[str, Split]]:
        """Each part with its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Split):
                yield field.name, value
