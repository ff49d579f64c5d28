"""The facts about one model, as discovery finds them."""

from dataclasses import dataclass, field

from magi_agent.gguf.facts import HeaderFacts
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a file is told by without reading it: equal identities mean equal content."""

    device: int
    inode: int
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TierThresholds:
    """The sizes, in billions of parameters, at which tiers change."""

    powerful_min: float = 14.0
    fast_max: float = 7.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model: a GGUF file, or a split set of them, with the projector that goes with it.

    All of it can be found again from the files, so nothing here is worth protecting.
    """

    file_path: str  # absolute; of a split set, its first part; surrogate-escaped where not UTF-8
    filename: str
    display_name: str
    family: str  # lower case: "qwen", "llama", ...; "unknown"
    version: str | None  # "2.5", "3.1", ...
    size_params: float  # billions, as people call it; 0.0 where nobody knows
    quantization: str  # lower case; "unknown"
    thinking_mode: ThinkingMode
    is_instruct: bool
    is_coder: bool
    assigned_tier: Tier
    architecture: str | None
    context_length: int | None
    size_bytes: int  # of all parts
    parts: tuple[str, ...]  # absolute paths of all parts, in order; one for a plain file
    projector_path: str | None  # the multimodal projector to load with it, chosen of ``projectors``
    has_vision: bool
    is_embedding: bool  # not for chat: it embeds, or it ranks
    has_chat_template: bool
    status: ModelStatus
    problem: str | None  # one sentence, where status is not "ok"
    parameter_count: int | None
    active_params: float | None  # billions, of a mixture of experts
    identity: FileIdentity | None  # of the first part
    fingerprint: str | None  # of the first part's header
    has_audio: bool = False
    is_reranker: bool = False  # an embedding model that scores a text against a question
    projectors: tuple[str, ...] = ()  # paths of all projectors that go with it, the chosen one first
    # Of the data of all parts. That it is known only now makes no difference between two facts.
    sample: str | None = field(default=None, compare=False)
    # Of the first part; not kept in the registry file, so that it makes no difference between two facts.
    header: HeaderFacts | None = field(default=None, compare=False)
