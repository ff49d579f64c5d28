"""What goes over the wire about the memory that models need."""

from typing import Literal

from pydantic import Field

from magi_agent.api.schemas import Answer
from magi_agent.memory.need import Basis, GpuBasis


class SplitAnswer(Answer):
    """Bytes, by the memory that they are in."""

    host_bytes: int
    gpu_bytes: int = Field(description="on all GPUs together")


class MemoryPartsAnswer(Answer):
    """What a need is made of. Of a measured need these are what was reported, or else estimated."""

    weights: SplitAnswer
    kv_cache: SplitAnswer
    recurrent_state: SplitAnswer
    compute: SplitAnswer = Field(description="buffers for one physical batch")
    output: SplitAnswer = Field(description="logits and embeddings")
    projector: SplitAnswer
    draft: SplitAnswer = Field(description="all of the draft model")
    lora: SplitAnswer
    other: SplitAnswer = Field(description="vocabulary, bookkeeping, a GPU driver's context")


class MemoryNeedAnswer(SplitAnswer):
    """What a server needs when it serves: anonymous memory plus mapped weights."""

    mapped_bytes: int = Field(description="of hostBytes, weights mapped from files: the kernel can read them again")
    basis: Basis = Field(description="where hostBytes comes from")
    gpu_basis: GpuBasis = Field(description="where gpuBytes comes from")
    parts: MemoryPartsAnswer
    context_tokens: int = Field(description="of all slots together")
    context_is_cut: bool = Field(description="llama-server is expected to make it shorter, because memory is short")
    slots: int
    gpu_layers: int = Field(description="layers on GPUs, the output layer counted as one")
    may_grow_by_bytes: int = Field(
        description="host memory that it may take beyond hostBytes while it serves: kept prompts and checkpoints"
    )


class UsedMemoryAnswer(Answer):
    """What a server uses now."""

    host_bytes: int = Field(description="anonymous memory plus mapped weights")
    anonymous_bytes: int
    mapped_bytes: int = Field(description="weights that are mapped and in memory")
    gpu_bytes: int | None = Field(description="on all GPUs together, as drivers tell; null where one does not")
    gpu_unavailable: str | None = Field(description="why there is no gpuBytes")
    source: Literal["control group", "process"] = Field(description="what told of the host's memory")


class MemoryLimitAnswer(Answer):
    """One limit of a unit's memory."""

    limit_bytes: int
    source: Literal["derived", "set", "operator"] = Field(
        description="derived from the need, set for the model, or an operator's (systemctl set-property, a drop-in)"
    )


class MemoryLimitsAnswer(Answer):
    """Limits of a unit's memory, page cache included and swap not; null for no limit."""

    high: MemoryLimitAnswer | None = Field(description="MemoryHigh=: beyond it processes are slowed down")
    max: MemoryLimitAnswer | None = Field(description="MemoryMax=: beyond it processes are killed")


class MemoryAnswer(Answer):
    """What a model needs of memory, and uses."""

    model_id: str
    need: MemoryNeedAnswer | None
    problem: str | None = Field(description="why there is no need")
    estimated: SplitAnswer | None = Field(description="the totals by facts and settings alone")
    used: UsedMemoryAnswer | None
    used_unavailable: str | None = Field(description="why nothing is said of what is used")
    limits: MemoryLimitsAnswer = Field(description="of a server that is started now")
    running_limits: MemoryLimitsAnswer | None = Field(description="of the server that runs; null where none does")
    warnings: list[str] = Field(description="which limits that somebody set are below the need, and what comes of it")
