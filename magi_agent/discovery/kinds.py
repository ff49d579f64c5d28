"""What kind of thing a GGUF file holds, by its header."""

import re
from enum import Enum, auto

from magi_agent.gguf.facts import HeaderFacts

# Image and video generators that other programs keep in GGUF files. llama-server does not load them.
_NOT_FOR_LLAMA_SERVER = re.compile(
    r"aura|cosmos|flux|hidream|hyvid|ltxv|lumina2|pig|qwen_image|sd1|sd3|sdxl|wan|whisper|z_image"
)
_ENCODERS = re.compile(
    r"bert|eurobert|gemma-embedding|jina-bert-v[23]|llama-embed|modern-bert|neo-bert|nomic-bert(?:-moe)?|t5encoder"
)
# llama.cpp's numbers for {arch}.pooling_type.
_POOLING_NONE = 0
_POOLING_RANK = 4
_MAX_RANKING_LABELS = 2  # "yes" and "no"; classifiers of more sort texts instead of ranking them


class Kind(Enum):
    """What a file is to the agent."""

    MODEL = auto()
    PROJECTOR = auto()
    OTHER = auto()
    """An adapter, a control vector, an importance matrix, a vocabulary alone: nothing to list."""


def kind_of(header: HeaderFacts) -> Kind:
    """Tell models from what else is kept in GGUF files."""
    general_type = (header.general_type or "").lower()
    architecture = (header.architecture or "").lower()
    if general_type == "mmproj" or architecture == "clip":
        return Kind.PROJECTOR
    if general_type in {"adapter", "imatrix", "controlvector", "dataset"}:
        return Kind.OTHER
    if architecture in {"controlvector", "imatrix", "lora"}:
        return Kind.OTHER
    # The first part of a split set may hold metadata alone.
    if header.tensor_count == 0 and (header.split_count or 1) < 2:
        return Kind.OTHER
    return Kind.MODEL


def unusable(header: HeaderFacts) -> str | None:
    """Say why llama-server would not load a whole model file; ``None`` if nothing speaks against it."""
    if header.architecture is None:
        return "its header names no architecture"
    if _NOT_FOR_LLAMA_SERVER.fullmatch(header.architecture.lower()):
        return f"llama-server does not load models of the architecture {header.architecture}"
    return None


def is_embedding(header: HeaderFacts) -> bool:
    """Tell embedding and reranking models: they pool over the text, or are of an architecture that only encodes."""
    if _ENCODERS.fullmatch((header.architecture or "").lower()):
        return True
    return header.pooling_type not in (None, _POOLING_NONE) or is_reranker(header)


def is_reranker(header: HeaderFacts) -> bool:
    """Tell rerankers: they pool to a rank, or end in a classifier that can only mean one."""
    if header.pooling_type not in (None, _POOLING_NONE):
        return header.pooling_type == _POOLING_RANK
    return header.has_classifier and (header.classifier_labels or 1) <= _MAX_RANKING_LABELS
