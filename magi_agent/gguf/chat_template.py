"""What a model's chat template (Jinja source) tells of the model.

A template that renders ``<think>`` somewhere need not belong to a model that thinks: most only clean earlier
answers. So three things are looked for: a variable by which the caller switches thinking, text that begins the
answer inside a thought, and text that tells the model to think. Templates are input from strangers: they are
scanned, never run, in time linear in their length.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from magi_agent.vocabulary import ThinkingMode

MAX_TEMPLATE_CHARACTERS: Final = 1_000_000
"""Longer templates are not judged; the longest in use are some 30,000 characters long."""

_EFFORT: Final = "reasoning_effort"
"""Chooses how much is thought: of a model that always thinks, or down to not at all."""

_SWITCHES: Final = ("enable_thinking", "enable_reasoning", "thinking", "thinking_budget", "reasoning", _EFFORT)
_GENERATION: Final = "add_generation_prompt"
_MAX_DEPTH = 64  # of conditions inside each other; templates in use have fewer than ten
# The variable itself: not an attribute, not a part of a longer name, not the target of an assignment.
_SWITCH = re.compile(rf"(?<![\w.])({'|'.join(_SWITCHES)})(?!\w|\s*=[^=])")
_SOFT_SWITCH = re.compile(r"/no_?think\b")
_OPENER = r"(?:<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]|<\|START_THINKING\|>|<\|begin_of_thought\|>)"
_CLOSER = r"(?:</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|<\|END_THINKING\|>|<\|end_of_thought\|>)"
_OPENS = re.compile(_OPENER + rf"(?!(?:\s|\\n)*{_CLOSER})")
# A thought spelled out in plain words between the marks; a rendered one has a quote or a brace of Jinja there.
_TOLD = re.compile(rf"{_OPENER}((?:[^<\[{{}}'\"+]|\{{(?![{{%])|(?<![}}%])\}}(?!\}}))++){_CLOSER}")
_ANALYSIS_CHANNEL = re.compile(r"<\|channel\|>analysis\b")
_LETTER = re.compile(r"[^\W\d_]")
_EXTRAS = re.compile(r"tool|document|function|thought|macro")  # what a request may bring, and need not
_TOOLS = re.compile(r"(?<![\w.])tools\b")
_KEYWORD = re.compile(r"[-+]?\s*(\w+)")
_WORD = re.compile(r"\w+")
# A string, or what is left of one that never ends: so no quote is looked at twice.
_STRING = re.compile(r"'(?:[^'\\]|\\.?)*+(?:'|\Z)|\"(?:[^\"\\]|\\.?)*+(?:\"|\Z)", re.DOTALL)
_OPEN = re.compile(r"\{[{%#]")
_CLOSE: Final = {"{{": "}}", "{%": "%}", "{#": "#}"}


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of a template: plain text, ``{{ an expression }}`` or ``{% a statement %}``."""

    kind: str  # "text", "{{" or "{%"
    source: str  # without the braces


@dataclass(frozen=True, slots=True)
class _Condition:
    """What counts of a condition. It is judged once, however much stands under it."""

    asks_for_answer: bool
    is_extra: bool  # on what a request may bring, and need not


def thinking_mode(template: str) -> ThinkingMode:
    """Return whether a model with this chat template reasons before it answers.

    ``NONE`` where the template says nothing of it; that includes templates which only take thoughts out of earlier
    answers, as both thinking and plain models have them.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return ThinkingMode.NONE
    if _ANALYSIS_CHANNEL.search(template):
        return ThinkingMode.ALWAYS  # the effort can be chosen there, and is never zero
    pieces = list(_pieces(template))
    switches = _switches(pieces)
    if _SOFT_SWITCH.search(template) or switches - {_EFFORT}:
        return ThinkingMode.OPTIONAL
    begins = _answer_begins(pieces)
    if begins is not ThinkingMode.NONE:
        return begins
    if switches:
        return ThinkingMode.OPTIONAL
    return ThinkingMode.ALWAYS if _is_told_to_think(pieces) else ThinkingMode.NONE


def mentions_tools(template: str) -> bool:
    """Return whether a chat template makes use of the tools that a request offers."""
    return len(template) <= MAX_TEMPLATE_CHARACTERS and any(
        piece.kind != "text" and _TOOLS.search(piece.source) for piece in _pieces(template)
    )


def _pieces(template: str) -> Iterator[_Piece]:
    position = 0
    while (match := _OPEN.search(template, position)) is not None:
        if match.start() > position:
            yield _Piece("text", template[position : match.start()])
        end = template.find(_CLOSE[match.group()], match.end())
        if end < 0:
            return
        if match.group() != "{#":
            yield _Piece(match.group(), template[match.end() : end])
        position = end + 2
    if position < len(template):
        yield _Piece("text", template[position:])


def _switches(pieces: list[_Piece]) -> set[str]:
    """Return the variables by which the caller may ask for thinking.

    One that the template sets itself without asking first is its own: it holds an earlier answer's thought.
    """
    own: set[str] = set()
    found: set[str] = set()
    for piece in pieces:
        if piece.kind == "text":
            continue
        code = _STRING.sub("''", piece.source)
        keyword = _keyword(piece)
        if keyword == "macro":
            own.update(_WORD.findall(code))
        found.update(name for name in _SWITCH.findall(code) if name not in own)
        if keyword in {"set", "for"}:
            own.update(_WORD.findall(code)[1:2])
    return found


def _answer_begins(pieces: list[_Piece]) -> ThinkingMode:
    """Judge the text with which a template begins the answer; ``NONE`` where it opens no thought."""
    found = ThinkingMode.NONE
    asked = any(_GENERATION in piece.source for piece in pieces)
    for piece, conditions in _placed(pieces if asked else _after_messages(pieces)):
        if not _OPENS.search(piece.source):
            continue
        asking = next((number for number, condition in enumerate(conditions, start=1) if condition.asks_for_answer), 0)
        if not asked or asking or (piece.kind == "{{" and _GENERATION in piece.source):
            if len(conditions) == asking:
                return ThinkingMode.ALWAYS
            found = ThinkingMode.OPTIONAL  # under a condition of its own
    return found


def _is_told_to_think(pieces: list[_Piece]) -> bool:
    """Whether the template itself tells the model to think, whatever the request brings."""
    return any(
        _LETTER.search(thought.replace("\\n", " "))
        for piece, conditions in _placed(pieces)
        if not any(condition.is_extra for condition in conditions)
        for thought in _TOLD.findall(piece.source)
    )


def _placed(pieces: list[_Piece]) -> Iterator[tuple[_Piece, list[_Condition]]]:
    """Yield what a template writes, with the conditions under which it does so, the outermost first.

    What a macro writes counts as written under a condition too: that it is called.
    """
    conditions: list[_Condition] = []
    for piece in pieces:
        keyword = _keyword(piece)
        if keyword in {"if", "macro"}:
            conditions.append(_condition(piece))
            if len(conditions) > _MAX_DEPTH:
                return
        elif keyword in {"elif", "else"} and conditions:
            conditions[-1] = _condition(piece)
        elif keyword in {"endif", "endmacro"} and conditions:
            conditions.pop()
        elif not keyword or keyword == "set":
            yield piece, conditions


def _condition(piece: _Piece) -> _Condition:
    return _Condition(asks_for_answer=_GENERATION in piece.source, is_extra=_EXTRAS.search(piece.source) is not None)


def _after_messages(pieces: list[_Piece]) -> list[_Piece]:
    """Return what a template writes after its last message."""
    loops = [number for number, piece in enumerate(pieces) if _keyword(piece) == "endfor"]
    return pieces[loops[-1] + 1 :] if loops else []


def _keyword(piece: _Piece) -> str:
    match = _KEYWORD.match(piece.source) if piece.kind == "{%" else None
    return match.group(1) if match else ""
