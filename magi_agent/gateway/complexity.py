r"""How much a request asks of a model: a score from 0 to 10, by which ``auto`` finds a tier.

The score is a sum, of at most 10. What does not depend on a language decides, and words only where a request is short::

    what                                                    points
    length of the last user message, in letters             3 * log2(1 + letters / 200), at most 4
    length of all other text, in letters                    0.5 * log2(1 + letters / 2000), at most 2
    code in the last user message (a fence, or lines of it) 2
    asked for in one message: list items and questions,
        from the second on                                  0.7 each, at most 3.5
    words of a kind: proof, design, steps, implement,
        compare, function; in several languages             2.5 a kind, at most 5
    signs of mathematics (∑ ∫ √ ∀ ≤ \frac …)                2
    tools                                                   1
    an answer by a JSON schema or a grammar                 1
    max_tokens of 2000 or more                              1.5
    reasoning effort: low, medium, high                     0, 2, 5

Letters of scripts that write a word or a syllable with one (Chinese, Japanese, Korean) count as three. Images count
for nothing: whether a model sees is no question of its size. At most 100 000 letters and 2 000 parts are looked at, so
the work is bounded whatever a body holds.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

HIGHEST: Final = 10.0
_MOST_LETTERS: Final = 100_000
_MOST_PARTS: Final = 2_000
_DEEPEST: Final = 4
_LONG_ANSWER: Final = 2000
_EFFORTS: Final = {"medium": 2.0, "high": 5.0, "xhigh": 5.0}
_WIDE: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# Each of these takes a time that grows with the text alone: nothing repeats within a repetition.
_CODE: Final = re.compile(
    r"```|~~~|^ {0,12}(?:def |class |import |from \w|#include|fn |func |public |SELECT |const |let |var )", re.MULTILINE
)
_ITEM: Final = re.compile(r"^[ \t]{0,8}(?:[-*•]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_QUESTION: Final = re.compile(r"[?\uff1f\u061f]+")
_MATHEMATICS: Final = re.compile(r"[∑∫√∀∃≤≥∈∂∇]|\\(?:frac|sum|int|sqrt|forall|exists)(?![a-zA-Z])")
_HARD: Final = tuple(
    re.compile(words, re.IGNORECASE)
    for words in (
        r"\b(?:prove|proof|derive|beweis|herleit|démontre|prouve|demuestra|dimostra|докаж)|证明|證明|証明|증명",
        r"\b(?:design|architecture|entwirf|entwurf|conçois|conception|diseña|progetta|спроектируй)|设计|設計|설계",
        r"step[- ]by[- ]step|schritt für schritt|étape par étape|paso a paso|passo a passo|пошагово|逐步|단계별",
        r"\b(?:implement|refactor|debug|optimi[sz]e|implementier|implémente|implementa|реализуй)|实现|實現|実装|구현",
        r"\b(?:trade-?off|compare|analy[sz]e|vergleich|analysier|analysiere|analiza|analizza|compara|сравни)|分析|比较|비교",
        r"\b(?:function|regex|sql|python|javascript|rust|java|bash|funktion|fonction|función|funzione|функци)|函数|関数|함수",
    )
)


@dataclass(frozen=True, slots=True)
class Question:
    """What of a request says how hard it is."""

    last: str
    """What the user said last."""
    rest: int
    """Letters of everything else that was said."""
    has_tools: bool = False
    wants_schema: bool = False
    max_tokens: int = 0
    effort: str = ""


@dataclass(frozen=True, slots=True)
class Complexity:
    """A score, and what it is made of."""

    score: float
    reasons: Mapping[str, float]
    """Points, by what they are for; only what gave any."""


def complexity(question: Question) -> Complexity:
    """How hard a request is. The same for the same request, always."""
    last = question.last[:_MOST_LETTERS]
    asked = len(_ITEM.findall(last)) + len(_QUESTION.findall(last))
    points = {
        "length": min(4.0, 3 * math.log2(1 + _letters(last) / 200)),
        "conversation": min(2.0, 0.5 * math.log2(1 + question.rest / 2000)),
        "code": 2.0 if _CODE.search(last) else 0.0,
        "instructions": min(3.5, 0.7 * max(0, asked - 1)),
        "words": min(5.0, 2.5 * sum(1 for words in _HARD if words.search(last))),
        "mathematics": 2.0 if _MATHEMATICS.search(last) else 0.0,
        "tools": 1.0 if question.has_tools else 0.0,
        "schema": 1.0 if question.wants_schema else 0.0,
        "answer": 1.5 if question.max_tokens >= _LONG_ANSWER else 0.0,
        "effort": _EFFORTS.get(question.effort, 0.0),
    }
    reasons = {name: round(value, 2) for name, value in points.items() if value > 0}
    return Complexity(round(min(HIGHEST, sum(points.values())), 2), reasons)


def question_of(body: Mapping[str, Any]) -> Question:
    """What a request's body says of how hard it is, in the form of any API; what makes no sense is passed over."""
    said = list(_messages(body))
    users = [index for index, (role, _) in enumerate(said) if role == "user"]
    last = users[-1] if users else len(said) - 1
    system = "".join(_texts([body.get("system"), body.get("instructions")]))
    rest = len(system) + sum(len(text) for index, (_, text) in enumerate(said) if index != last)
    return Question(
        said[last][1] if said else "",
        rest,
        has_tools=bool(body.get("tools") or body.get("functions")),
        wants_schema=_wants_schema(body),
        max_tokens=_most_tokens(body),
        effort=_effort(body),
    )


def _messages(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Who said what, of all that was said."""
    for name in ("messages", "input", "prompt", "input_prefix"):
        value = body.get(name)
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value[:1]):
            for item in value[-_MOST_PARTS:]:
                if isinstance(item, Mapping):
                    yield (
                        str(item.get("role", "user")),
                        "\n".join(_texts(item.get("content") or item.get("prompt_string"))),
                    )
            return
        if value:
            yield "user", "\n".join(_texts(value))
            return


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    """The texts in a message's content."""
    if isinstance(value, str):
        yield value[:_MOST_LETTERS]
    elif isinstance(value, Mapping):
        yield from _texts(value.get("text") or value.get("prompt_string"), depth + 1)
    elif isinstance(value, list) and depth < _DEEPEST:
        for item in value[-_MOST_PARTS:]:
            yield from _texts(item, depth + 1)


def _wants_schema(body: Mapping[str, Any]) -> bool:
    text = body.get("text")
    forms = (body.get("response_format"), text.get("format") if isinstance(text, Mapping) else None)
    named = any(isinstance(form, Mapping) and form.get("type") == "json_schema" for form in forms)
    return named or bool(body.get("json_schema") or body.get("grammar"))


def _most_tokens(body: Mapping[str, Any]) -> int:
    names = ("max_completion_tokens", "max_output_tokens", "max_tokens", "n_predict")
    return max((value for name in names if isinstance(value := body.get(name), int)), default=0)


def _effort(body: Mapping[str, Any]) -> str:
    reasoning = body.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, Mapping) else body.get("reasoning_effort")
    return effort if isinstance(effort, str) else ""


def _letters(text: str) -> int:
    return len(text) + 2 * len(_WIDE.findall(text))
