"""One model's facts, joined from its header and its file name. The header goes first where both speak."""

import math
import re
from dataclasses import dataclass

from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.families import UNKNOWN_FAMILY, families_in, family_of_architecture
from magi_agent.discovery.kinds import is_embedding, is_reranker
from magi_agent.discovery.names import NameFacts, facts_in
from magi_agent.discovery.quantization import refined
from magi_agent.discovery.sizes import size_in
from magi_agent.discovery.tiers import tier_of
from magi_agent.gguf.facts import HeaderFacts
from magi_agent.vocabulary import ThinkingMode, Tier

# Converters wrote this name into every model of the llama architecture for a long time, whoever made it.
_LLAMA = "llama"
# Nobody's family: embedding models of many have this architecture.
_BERT = "bert"
# Expert sizes multiplied by their number ("256x20B"), and what one token uses ("17B-16E"), count as a size only this
# near to the truth.
_TOLERANCE = 1.5
# "12-2024": the version that converters find in names which end in a date.
_DATE = re.compile(r"^\d{1,2}-\d{4}$")


@dataclass(frozen=True, slots=True)
class Description:
    """What a model is, apart from where its files are and how they fare."""

    family: str
    version: str | None
    size_params: float  # billions
    quantization: str
    thinking_mode: ThinkingMode
    is_instruct: bool
    is_coder: bool
    is_embedding: bool
    is_reranker: bool
    tier: Tier
    active_params: float | None  # billions


def describe(
    name: NameFacts, header: HeaderFacts | None, parameter_count: int | None, thresholds: TierThresholds, filename: str
) -> Description:
    """Describe a model. ``parameter_count`` is the exact sum over all parts; ``None`` while some are missing."""
    titles = _titles(header)
    active = _active_params(name, header, titles)
    size = _size_params(name, header, titles, parameter_count, active)
    quantization = refined(header.quantization if header else None, name.quantization) or "unknown"
    names = [name, *titles]
    embeds = any(named.is_embedding for named in names) or (header is not None and is_embedding(header))
    ranks = any(named.is_reranker for named in names) or (header is not None and is_reranker(header))
    thinking = ThinkingMode.NONE if embeds else _thinking_mode(name, header, titles)
    return Description(
        family=_family(name, header, titles, filename),
        version=_version(name, header, titles),
        size_params=size,
        quantization=quantization,
        thinking_mode=thinking,
        is_instruct=_is_instruct(names, header, embeds=embeds),
        is_coder=any(named.is_coder for named in names),
        is_embedding=embeds,
        is_reranker=ranks,
        tier=tier_of(size, quantization, thinking, thresholds),
        active_params=active,
    )


def _titles(header: HeaderFacts | None) -> list[NameFacts]:
    """Read the names in the header as file names are read, the most telling first."""
    if header is None:
        return []
    # Converters cut the name into these two, at the first word that they know: "Llama" and "3_3-Nemotron-Super".
    joined = " ".join(text for text in (header.basename, header.finetune) if text)
    return [facts_in(text) for text in (header.name, joined) if text]


def _family(name: NameFacts, header: HeaderFacts | None, titles: list[NameFacts], filename: str) -> str:
    if header is None:
        return name.family or UNKNOWN_FAMILY
    of_architecture = family_of_architecture(header.architecture)
    titled = next((title.family for title in titles if title.family), None)
    if titled == _LLAMA and of_architecture == _LLAMA and name.family:
        return name.family
    if titled:
        return titled
    # A file name may call one family by another's architecture only if it names both (DeepSeek-R1-Distill-Qwen).
    fits = of_architecture in (None, _LLAMA, _BERT, name.family) or of_architecture in families_in(filename)
    if name.family and fits:
        return name.family
    return of_architecture or name.family or UNKNOWN_FAMILY


def _version(name: NameFacts, header: HeaderFacts | None, titles: list[NameFacts]) -> str | None:
    candidates = [title.version for title in titles if title.family] + [name.version]
    if header is not None and header.version and not _DATE.search(header.version):
        candidates += [facts_in(f"v{header.version.lower().lstrip('v')}").version]
    return next((version for version in candidates if version), None)


def _size_params(
    name: NameFacts,
    header: HeaderFacts | None,
    titles: list[NameFacts],
    parameter_count: int | None,
    active: float | None,
) -> float:
    exact = parameter_count / 1e9 if parameter_count else None
    if header is not None and header.size_label:
        label = size_in(header.size_label)
        if label.total is not None and _is_credible(label.total, exact, active, is_product=label.is_product):
            return label.total
    for named in (name, *titles):
        size = named.size_params
        if size is not None and _is_credible(size, exact, active, is_product=named.size_is_product):
            return size
    if exact is None:
        return 0.0
    return round(exact, 2 if exact >= 1 else 3)


def _is_credible(size: float, exact: float | None, active: float | None, *, is_product: bool) -> bool:
    if not math.isfinite(size):
        return False  # JSON knows neither infinity nor NaN
    if exact is None:
        return True
    if is_product:
        return size <= exact * _TOLERANCE
    # Converters keep the 17 of "17B-16E" as size label.
    return size != active or exact <= size * _TOLERANCE


def _active_params(name: NameFacts, header: HeaderFacts | None, titles: list[NameFacts]) -> float | None:
    label = size_in(header.size_label).active if header is not None and header.size_label else None
    named = [label, *(title.active_params for title in titles), name.active_params]
    found = next((value for value in named if value is not None and math.isfinite(value)), None)
    if found is None and header is not None and header.active_parameter_count:
        return round(header.active_parameter_count / 1e9, 2)
    return found


def _thinking_mode(name: NameFacts, header: HeaderFacts | None, titles: list[NameFacts]) -> ThinkingMode:
    # Names know what some templates leave out: early R1 and gpt-oss templates show no thought at all.
    if name.thinks or any(title.thinks for title in titles):
        return ThinkingMode.ALWAYS
    return header.thinking_mode if header is not None else ThinkingMode.NONE


def _is_instruct(names: list[NameFacts], header: HeaderFacts | None, *, embeds: bool) -> bool:
    if any(named.is_instruct for named in names):
        return True
    if any(named.is_base for named in names):
        return False
    # Embedding models keep the chat template of the model that they were made from.
    return header is not None and header.has_chat_template and not embeds
