"""Model families and versions, as names and architectures tell them."""

import re

UNKNOWN_FAMILY = "unknown"

# Family → what it is called in names. A word counts only from its beginning on; digits may follow it directly.
_FAMILY_WORDS: dict[str, str] = {
    "apertus": r"apertus",
    "apriel": r"apriel",
    "arctic": r"(?:snowflake[-_ ])?arctic",
    "aya": r"aya",
    "baichuan": r"baichuan",
    "bge": r"bge",
    "bitnet": r"bitnet",
    "bloom": r"bloomz?",
    "command-r": r"(?:c4ai[-_ ])?command[-_ ]?(?:r7b|r|a)(?![a-z0-9])",
    "dbrx": r"dbrx",
    "deepseek": r"deep[-_ ]?seek",
    "e5": r"e5(?![a-z0-9.])",
    "ernie": r"ernie",
    "exaone": r"exaone",
    "falcon": r"falcon",
    "gemma": r"(?:code|pali|med|shield|function|embedding|translate|recurrent)?gemma",
    "glm": r"(?:chat)?glm",
    "gpt-oss": r"gpt[-_ ]?oss",
    "granite": r"granite",
    "grok": r"grok",
    "gte": r"gte",
    "hunyuan": r"hunyuan",
    "internlm": r"internlm",
    "internvl": r"internvl",
    "jamba": r"jamba",
    "jina": r"jina",
    "kimi": r"kimi|moonlight",
    "lfm": r"lfm",
    "llama": r"(?:meta[-_ ]?)?(?:code)?llama",
    "llava": r"llava",
    "mamba": r"mamba",
    "mimo": r"mimo",
    "minicpm": r"minicpm",
    "minilm": r"(?:all[-_ ])?minilm",
    "minimax": r"minimax",
    "mistral": r"mistral|mixtral|ministral|magistral|devstral|codestral|pixtral|mathstral|voxtral",
    "mxbai": r"mxbai",
    "nemotron": r"(?:nvidia[-_ ])?nemotron",
    "nomic": r"nomic",
    "olmo": r"olmoe?",
    "phi": r"phi",
    "qwen": r"(?:code)?qwen|qwq|qvq",
    "rwkv": r"rwkv",
    "seed-oss": r"(?:bytedance[-_ ])?seed[-_ ]oss",
    "smollm": r"smollm",
    "smolvlm": r"smolvlm",
    "solar": r"solar",
    "stablelm": r"stablelm",
    "starcoder": r"starcoder",
    "tinyllama": r"tinyllama",
    "vicuna": r"vicuna",
    "yi": r"yi",
    "zephyr": r"zephyr",
}
_FAMILY = re.compile(
    r"(?<![a-z0-9])(?:"
    + "|".join(f"(?P<f{number}>{words})" for number, words in enumerate(_FAMILY_WORDS.values()))
    + r")(?![a-z])"
)
_FAMILY_NAMES = tuple(_FAMILY_WORDS)

# A model of these is often made from another family's weights and names both: it is theirs wherever the word stands.
_MADE_FROM_OTHERS = ("nemotron",)

# Architectures (general.architecture) whose name does not begin with their family's.
_ARCHITECTURES: dict[str, str] = {
    "bailingmoe": "ling",
    "bailingmoe2": "ling",
    "bert": "bert",
    "chatglm": "glm",
    "cohere2": "command-r",
    "gpt-oss": "gpt-oss",
    "jina-bert-v2": "jina",
    "jina-bert-v3": "jina",
    "mistral3": "mistral",
    "modern-bert": "bert",
    "neo-bert": "bert",
    "nomic-bert": "nomic",
    "nomic-bert-moe": "nomic",
    "seed_oss": "seed-oss",
}

_VERSION_NUMBER = r"(0\.\d{1,2}|[1-9]\d?(?:[._]\d{1,2}){0,2})"
_WORDS_BEFORE_A_VERSION = (
    r"a|chat|coder|code|edge|guard|guardian|large|lite|llm|math|medium|mini|moe|nano|nemo|o|omni|pro|reranker|small|speech|super"
    r"|ultra|v|vision|vl"
)
_VERSION_AFTER_FAMILY = re.compile(
    rf"(?:[-_ ](?:{_WORDS_BEFORE_A_VERSION})(?![a-z]))*[-_ .]?v?{_VERSION_NUMBER}(n)?v?(?![a-z0-9]|\.\d)"
)
_VERSION_TOKEN = re.compile(rf"(?<![a-z0-9])v{_VERSION_NUMBER}(?![a-z0-9]|\.\d)")
# Their numbers are dates.
_WITHOUT_VERSION = ("command-r",)
_LETTER_VERSIONS: dict[str, re.Pattern[str]] = {
    "deepseek": re.compile(r"[-_ ](r\d)(?:t\d?)?(?![a-z0-9])"),
    "falcon": re.compile(r"[-_ ](h\d)r?(?![a-z0-9])"),
    "glm": re.compile(r"[-_ ](z\d)(?![a-z0-9])"),
    "kimi": re.compile(r"[-_ ](k\d(?:\.\d)?)(?![a-z0-9])"),
    "minimax": re.compile(r"[-_ ](m\d(?:\.\d)?)(?![a-z0-9])"),
}


def family_in(text: str) -> str | None:
    """Return the family that a name mentions; of several the first, save for those made from other families."""
    families = families_in(text)
    for family in _MADE_FROM_OTHERS:
        if family in families:
            return family
    return families[0] if families else None


def families_in(text: str) -> list[str]:
    """Return every family that a name mentions, in order."""
    return [_name_of(match) for match in _FAMILY.finditer(text.lower())]


def family_of_architecture(architecture: str | None) -> str | None:
    """Return the family an architecture belongs to: ``qwen3moe`` is ``qwen``'s.

    ``llama`` is the architecture of many families, so it is the last thing to ask.
    """
    if not architecture:
        return None
    architecture = architecture.lower()
    if architecture in _ARCHITECTURES:
        return _ARCHITECTURES[architecture]
    for family in _FAMILY_NAMES:
        if architecture.startswith(family):
            return family
    letters = re.match(r"[a-z]+", architecture)
    return letters.group(0) if letters else None


def version_in(text: str) -> str | None:
    """Return the version of the family that a name mentions: ``2.5``, ``3n``, ``r1``; ``None`` if it has none.

    It stands behind the family's word (``Qwen2.5``, ``Mistral-Small-3.2``) or is a word with a ``v`` (``-v0.3``).
    Dates (``2507``, ``0528``) are no versions.
    """
    text = text.lower()
    matches = list(_FAMILY.finditer(text))
    family = family_in(text)
    if family in _WITHOUT_VERSION:
        return None
    own = [match for match in matches if _name_of(match) == family]
    others = [match for match in matches if _name_of(match) != family]
    for match in own:
        version = _version_after(text, match, family or "")
        if version:
            return version
    tokens: list[str] = _VERSION_TOKEN.findall(text)
    if tokens:
        return tokens[-1].replace("_", ".")
    if family in _MADE_FROM_OTHERS:
        for match in others:
            version = _version_after(text, match, "")
            if version:
                return version
    return None


def _version_after(text: str, match: re.Match[str], family: str) -> str | None:
    number = _VERSION_AFTER_FAMILY.match(text, match.end())
    if number:
        return number.group(1).replace("_", ".") + (number.group(2) or "")
    letters = _LETTER_VERSIONS.get(family)
    found = letters.search(text, match.end()) if letters else None
    return found.group(1) if found else None


def _name_of(match: re.Match[str]) -> str:
    return _FAMILY_NAMES[int((match.lastgroup or "f0")[1:])]
