"""Facts of models that are nowhere, for tests of what is done with facts."""

import zlib
from dataclasses import replace

from magi_agent.discovery.facts import FileIdentity, ModelFacts
from magi_agent.vocabulary import ModelStatus, ThinkingMode, Tier


def facts_at(
    path: str, *, inode: int | None = None, size: int = 1000, fingerprint: str | None = None, **other: object
) -> ModelFacts:
    """One model's facts; its inode is made from its path unless it is given."""
    number = zlib.crc32(path.encode(errors="surrogatepass")) if inode is None else inode
    facts = ModelFacts(
        file_path=path,
        filename=path.rpartition("/")[2],
        display_name="Model",
        family="llama",
        version=None,
        size_params=7.0,
        quantization="q4_k_m",
        thinking_mode=ThinkingMode.NONE,
        is_instruct=True,
        is_coder=False,
        assigned_tier=Tier.BALANCED,
        architecture="llama",
        context_length=4096,
        size_bytes=size,
        parts=(path,),
        projector_path=None,
        has_vision=False,
        is_embedding=False,
        has_chat_template=True,
        status=ModelStatus.OK,
        problem=None,
        parameter_count=7_000_000_000,
        active_params=None,
        identity=FileIdentity(1, number, size, 1),
        fingerprint=fingerprint or f"fp-{path}",
    )
    return replace(facts, **other)  # type: ignore[arg-type]
