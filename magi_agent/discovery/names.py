"""What a model's file name says about it.

Names are a convention of publishers, not a format: what is read here only fills what a header leaves open.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from magi_agent.discovery.families import family_in, version_in
from magi_agent.discovery.quantization import quantization_in, without_quantization
from magi_agent.discovery.sizes import size_in

_SUFFIX = ".gguf"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{16,}", re.IGNORECASE)
_GENERIC = re.compile(r"(?:ggml[-_]?)?(?:model|models|unsloth|consolidated|main|weights|llm|gguf|default|latest|)")

_NOT_THINKING = re.compile(r"(?<![a-z0-9])(?:non?|without|un|not)[-_ ]?(?:thinking|think|reasoning)(?![a-z0-9])")
_THINKING = re.compile(
    r"""(?<![a-z0-9])(?:
        r1(?:t2?)? | qwq | qvq | think | thinking | thinker | reasoner | reasoning | openthinker\d? | gpt[-_ ]?oss
      | (?:ace|open|opencode)reason(?:ing)? | magistral | deepscaler | marco-o1 | exaone-deep | glm-z1 | minimax-m[12]
    )(?![a-z0-9])""",
    re.VERBOSE,
)
_INSTRUCT = re.compile(
    r"(?<![a-z0-9])(?:instruct(?:ion)?(?:[-_]?v?\d+)?|inst|it|chat|assistant|sft|dpo|rlhf)(?![a-z0-9])"
)
_BASE = re.compile(r"(?<![a-z0-9])(?:base|pretrained?|pt)(?![a-z0-9])")
_FOR_PYTORCH = re.compile(r"[-_ ]pt(?![a-z0-9])")  # what "PT" means in ERNIE's names
_CODER = re.compile(
    r"(?<![a-z0-9])(?:(?:open)?code(?!c)[a-z0-9]*|coding|devstral|(?!en|de|trans)[a-z]*coder\d*)(?![a-z0-9])"
)
_EMBEDDING = re.compile(
    r"(?<![a-z0-9])(?:embed|embedder|embeddings?|embeddinggemma|retriever|colbert|bge|gte|e5|labse|minilm|mpnet|mxbai)"
    r"(?![a-z0-9])"
)
_RERANKER = re.compile(r"(?<![a-z0-9])(?:rerank(?:er|ing|qa)?|zerank|cross[-_ ]?encoder|ms[-_ ]?marco)(?![a-z0-9])")
_SUFFIXES_OF_REPOSITORIES = re.compile(r"(?i)[-_. ](?:gguf|imat|imatrix)$")


@dataclass(frozen=True, slots=True)
class NameFacts:
    """What a file name, with its folders as a hint, says; ``None`` where it is silent."""

    family: str | None = None
    version: str | None = None
    size_params: float | None = None  # billions
    size_is_product: bool = False  # "8x7B" read as 56
    active_params: float | None = None  # billions
    quantization: str | None = None
    is_instruct: bool = False
    is_base: bool = False  # the name says that it is not tuned
    is_coder: bool = False
    is_embedding: bool = False  # or a reranker
    is_reranker: bool = False
    thinks: bool = False  # it always reasons first


@dataclass(frozen=True, slots=True)
class SplitName:
    """The name of one part of a split model: ``<prefix>-00002-of-00005.gguf``."""

    prefix: str
    number: int  # from 1
    count: int


def is_model_filename(filename: str) -> bool:
    """Tell whether a file may be a model by its name: ``.gguf`` in any letter case, and not hidden.

    Unfinished downloads (``x.gguf.part``, ``.incomplete``, ``.tmp``, ``.aria2``, ``.crdownload``) do not end so;
    ``x.part.gguf`` and the like are refused too.
    """
    lower = filename.lower()
    if not lower.endswith(_SUFFIX) or filename.startswith("."):
        return False
    return not lower[: -len(_SUFFIX)].endswith((".part", ".partial", ".incomplete", ".tmp", ".aria2", ".crdownload"))


def stem_of(filename: str) -> str:
    """Return the file name without its extension and part numbers."""
    stem = filename[: -len(_SUFFIX)] if filename.lower().endswith(_SUFFIX) else filename
    return _SPLIT.sub("", stem)


def split_of(filename: str) -> SplitName | None:
    """Return which part of which set a file is by its name; ``None`` for a file of its own."""
    stem = filename[: -len(_SUFFIX)] if filename.lower().endswith(_SUFFIX) else filename
    match = _SPLIT.search(stem)
    if match is None:
        return None
    number, count = int(match.group(1)), int(match.group(2))
    if not 1 <= number <= count:
        return None
    return SplitName(prefix=stem[: match.start()], number=number, count=count)


def is_generic(filename: str) -> bool:
    """Tell whether a file's name says nothing about the model in it, as ``model-Q4_K_M.gguf`` does."""
    rest = without_quantization(stem_of(filename)).strip("-_. ").lower()
    return _GENERIC.fullmatch(rest) is not None


def facts_in(text: str) -> NameFacts:
    """Read one name (a stem, a header's ``general.name``, a folder's name)."""
    lower = text.lower()
    size = size_in(text)
    ranks = _RERANKER.search(lower) is not None
    family = family_in(text)
    return NameFacts(
        family=family,
        version=version_in(text),
        size_params=size.total,
        size_is_product=size.is_product,
        active_params=size.active,
        quantization=quantization_in(text),
        is_instruct=_INSTRUCT.search(lower) is not None,
        is_base=_BASE.search(_FOR_PYTORCH.sub("", lower) if family == "ernie" else lower) is not None,
        is_coder=_CODER.search(lower) is not None,
        is_embedding=ranks or _EMBEDDING.search(lower) is not None,
        is_reranker=ranks,
        thinks=_THINKING.search(_NOT_THINKING.sub("", lower)) is not None,
    )


def name_facts(filename: str, folders: Sequence[str] = ()) -> NameFacts:
    """Read a file's name; ``folders`` are the names of the folders above it, the nearest first.

    A folder fills what the file's name leaves open. What it says of the model itself (family, version, size, flags)
    counts only while no name nearer to the file has named a family: ``Qwen3-8B-GGUF/llama-7b.gguf`` is a llama.
    """
    facts = facts_in(stem_of(filename))
    for folder in folders:
        if facts.family is not None and facts.quantization is not None:
            break
        if _HASH.fullmatch(folder):
            continue
        hint = facts_in(folder)
        if facts.quantization is None:
            facts = replace(facts, quantization=hint.quantization)
        if facts.family is None and hint.family is not None:
            facts = _filled(facts, hint)
    return facts


def _filled(facts: NameFacts, hint: NameFacts) -> NameFacts:
    own_size = facts.size_params is not None
    return NameFacts(
        family=hint.family,
        version=hint.version or facts.version,
        size_params=facts.size_params if own_size else hint.size_params,
        size_is_product=facts.size_is_product if own_size else hint.size_is_product,
        active_params=facts.active_params if own_size else hint.active_params,
        quantization=facts.quantization or hint.quantization,
        is_instruct=facts.is_instruct or hint.is_instruct,
        is_base=facts.is_base or hint.is_base,
        is_coder=facts.is_coder or hint.is_coder,
        is_embedding=facts.is_embedding or hint.is_embedding,
        is_reranker=facts.is_reranker or hint.is_reranker,
        thinks=facts.thinks or hint.thinks,
    )


def display_name(text: str, quantization: str | None) -> str:
    """Make a name for people: ``Qwen3-30B-A3B-UD-Q4_K_XL.gguf`` becomes ``Qwen3 30B-A3B (Q4_K_XL)``.

    Characters that are not UTF-8 or would disturb a terminal become ``?``.
    """
    title = _SUFFIXES_OF_REPOSITORIES.sub("", without_quantization(stem_of(text)))
    title = re.sub(r"(?<=\d)_(?=\d)", ".", title)
    title = re.sub(r"[\s_]+|(?<=\w)-(?!oss\b)(?![aA]\d+(?:\.\d+)?[bBmM]\b)(?=\w)", " ", title)
    title = "".join(letter if letter.isprintable() else "?" for letter in title).strip(" -._")
    title = re.sub(r" {2,}", " ", title) or "model"
    return f"{title} ({quantization.upper()})" if quantization else title
