"""What a llama-server says of tokens and time at the two ends of an answer.

Answers pass through unread, so their ends are all there is to look at, once and at the end: usage as OpenAI and
Anthropic tell it, and ``timings``, llama-server's own. Where they stand depends on the path: last in an answer of text,
first in one of vectors, and in both in Anthropic's streams. A name with its quotes, followed by a colon, is a member's
name and no text of somebody's: within a string, the quote that ends it would have a backslash before it.

The server is not trusted: what is no plain number of a sane length is not read, and what is beyond the ends neither.
"""

import re
from dataclasses import dataclass
from typing import Final

HEAD: Final = 1024
"""Bytes of an answer's beginning that are looked at."""
TAIL: Final = 4096
"""Bytes of its end."""
_REACH: Final = 512
"""Bytes after a member's name in which its own members stand."""
_NUMBER: Final = re.compile(
    rb'"(prompt_tokens|completion_tokens|input_tokens|output_tokens|cache_read_input_tokens|prompt_n|cache_n|predicted_n'
    rb'|prompt_ms|predicted_ms|predicted_per_second|tokens_predicted|tokens_evaluated)": ?'
    rb"([0-9]{1,9}(?:\.[0-9]{1,20})?)(?=[,}])"
)
_USAGE: Final = b'"usage":'
_TIMINGS: Final = b'"timings":'
_NATIVE: Final = b'"tokens_predicted":'
_ID: Final = re.compile(rb'"id": ?"((?:chatcmpl|cmpl|resp|msg)[-_][A-Za-z0-9]{8,64})"')


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """What an answer says of itself; ``None`` for what it does not."""

    prompt_tokens: int | None = None
    """Of the whole prompt, with what came from the server's cache."""
    completion_tokens: int | None = None
    prompt_read: int | None = None
    """Tokens of the prompt that were not in the cache."""
    prompt_ms: float | None = None
    """Milliseconds for these."""
    completion_ms: float | None = None
    """Milliseconds for the tokens of the answer."""
    tokens_per_second: float | None = None
    """Of the answer. Builds differ in whether its first token counts, which came of reading the prompt."""


def answer_figures(head: bytes, tail: bytes, *, is_stream: bool) -> AnswerFigures:
    """What the ``head`` and the ``tail`` of an answer say, some microseconds of work."""
    usage = {**_members(head, _USAGE), **_members(tail, _USAGE)}
    timings = _members(tail, _TIMINGS)
    # In a stream the first event counts its own token only; of a whole answer it is said early as well.
    native = {} if timings else _members(tail if is_stream else head, _NATIVE)
    prompt, completion = _whole(usage, "prompt_tokens"), _whole(usage, "completion_tokens", "output_tokens")
    if prompt is None and "input_tokens" in usage:
        # Anthropic's input is what was not in the cache; OpenAI's is all, and has this third number under another name.
        prompt = int(usage["input_tokens"] + usage.get("cache_read_input_tokens", 0))
    if prompt is None and "prompt_n" in timings:
        prompt = int(timings["prompt_n"] + timings.get("cache_n", 0))
    return AnswerFigures(
        _whole(native, "tokens_evaluated") if prompt is None else prompt,
        _whole(timings, "predicted_n") or _whole(native, "tokens_predicted") if completion is None else completion,
        _whole(timings, "prompt_n"),
        timings.get("prompt_ms"),
        timings.get("predicted_ms"),
        timings.get("predicted_per_second"),
    )


def answer_id(head: bytes, tail: bytes) -> str | None:
    """What the server calls its answer (``chatcmpl-…``), as the client sees it."""
    found = _ID.search(head) or _ID.search(tail)
    return found[1].decode() if found else None


def _members(part: bytes, name: bytes) -> dict[str, float]:
    at = part.rfind(name)
    if at < 0:
        return {}
    return {key.decode(): float(value) for key, value in _NUMBER.findall(part, at, at + _REACH)}


def _whole(found: dict[str, float], *names: str) -> int | None:
    return next((int(found[name]) for name in names if name in found), None)
