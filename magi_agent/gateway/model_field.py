"""Finding which model a body asks for, and putting another name there, without taking the body apart.

A body may hold images, tens of megabytes of them, and has to reach the server as it came. So the text of a large one is
passed over once, and only the members of the outermost object are looked at; a small one is taken apart, which is
faster. What is no JSON may pass: the server says so itself. Only where the agent is to choose a model by what a body
holds, a large one is taken apart as well, within bounds.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json

from magi_agent.errors import InvalidRequest

_MODEL: Final = "model"
_STREAM: Final = "stream"
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
"""Possessive: to give back a part of a string of megabytes would take memory, and end nowhere else."""
_OUTERMOST: Final = re.compile(rb'["{}\[\],:]')
_WITHIN: Final = re.compile(rb'["{}\[\]]')
_SCALAR: Final = re.compile(rb"[^\s,{}\[\]]+")
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_MOST_MARKS: Final = 2_000_000
"""Brackets and strings in one body; more than that is no question to a model."""
_MOST_COMMAS: Final = 2_000_000
"""In a body that is taken apart: so many are read in a tenth of a second, in which nothing else is done."""
_LONGEST_NAME: Final = 1000
_LONGEST_HEAD: Final = 8192
_SMALL: Final = 16 * 1024
"""Bytes that are taken apart in less time than they are passed over in."""
_FIELDS: Final = (_MODEL, _STREAM)
_FIELD_PART: Final = re.compile(
    rb'^content-disposition: *form-data;(?:[^\r\n]*;)? *name="(model|stream)"', re.IGNORECASE | re.MULTILINE
)
_MOST_PARTS: Final = 1000
"""Of one form."""


class UnreadableBody(InvalidRequest):
    """The body is not a JSON object, or does not say which model it is for in a way that can be understood."""

    error = "InvalidJson"


@dataclass(frozen=True, slots=True)
class ModelField:
    """What a body says of the model."""

    name: str | None
    """As it was asked for; ``None`` where no model is named."""
    wants_stream: bool
    """Whether the answer is to come piece by piece."""
    place: tuple[int, int] | None
    """Where the name begins in the body, with its quote, and ends; (0, 0) for nowhere, ``None`` where it is small, and
    was not looked for."""

    def renamed(self, body: bytes, name: str) -> bytes:
        """The body with another name in the place of this one; as it is where that is the same, or it has no place."""
        if self.name in (None, name):
            return body
        start, end = self.place or place_of(body, _MODEL)
        if not end:
            return body
        return b"".join((body[:start], json.dumps(name).encode(), body[end:]))


def model_field(body: bytes) -> ModelField:
    """What ``body``, a JSON object, says of the model. Of several members of one name the last one counts.

    Takes a time that grows with the body: some milliseconds for each megabyte. Raises ``UnreadableBody``.
    """
    if len(body) <= _SMALL and (field := _field_of_small(body)) is not None:
        return field
    found = _members(body, _FIELDS)
    start, end = found.get(_MODEL, (0, 0))
    value = _value(body[start:end]) if end - start <= _LONGEST_NAME else None
    if end and not (isinstance(value, str) and value):
        raise UnreadableBody('"model" must be the name of a model: GET /v1/models lists them')
    stream_start, stream_end = found.get(_STREAM, (0, 0))
    return ModelField(value if end else None, body[stream_start:stream_end] == b"true", (start, end))


def _field_of_small(body: bytes) -> ModelField | None:
    """The same, of what is JSON and names a model as one would; ``None`` for all else."""
    try:
        document: Any = from_json(body, cache_strings=False)
    except ValueError:
        return None
    name = document.get(_MODEL) if isinstance(document, dict) else None
    # A letter may take twelve bytes of the text.
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME // 12:
        return None
    return ModelField(name, document.get(_STREAM) is True, None)


def place_of(body: bytes, name: str) -> tuple[int, int]:
    """Where the value of a member of a JSON object begins and ends; nowhere, (0, 0), where there is none.

    Raises ``UnreadableBody``.
    """
    return _members(body, (name,)).get(name, (0, 0))


def taken_apart(body: bytes) -> Mapping[str, Any]:
    """The JSON object that a body is; empty for a form, and for what the server will refuse.

    For what is asked of no model by its name: to read all of it takes memory, and a time that grows with the body.
    Raises ``UnreadableBody``.
    """
    if body.count(b",") > _MOST_COMMAS:
        raise UnreadableBody("the body has too many parts for the agent to choose a model by them: name one")
    try:
        document: Any = from_json(body, cache_strings=False)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def form_field(body: bytes, boundary: str) -> ModelField:
    """What the fields of a form (multipart/form-data, RFC 7578) say of the model; the first of each name counts.

    Raises ``UnreadableBody``.
    """
    # As it came: aiohttp has no other way to show a header that is no text.
    delimiter = b"--" + boundary.encode(errors="surrogateescape")
    found: dict[str, str] = {}
    position, parts = body.find(delimiter), 0
    while position >= 0 and len(found) < len(_FIELDS):
        parts += 1
        if parts > _MOST_PARTS:
            raise UnreadableBody("the form has more parts than any question to a model")
        start = position + len(delimiter)
        head_end = body.find(b"\r\n\r\n", start, start + _LONGEST_HEAD)
        end = body.find(b"\r\n" + delimiter, head_end) if head_end >= 0 else -1
        if end < 0:
            break
        field = _FIELD_PART.search(body, start, head_end)
        if field and end - head_end <= _LONGEST_NAME:
            value = body[head_end + 4 : end].decode(errors="replace").strip()
            found.setdefault(field[1].decode().lower(), value)
        position = end + 2
    return ModelField(found.get(_MODEL) or None, found.get(_STREAM) == "true", (0, 0))


def _members(body: bytes, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where the values of some members of the outermost object stand."""
    position = _after_space(body, 3 if body.startswith(b"\xef\xbb\xbf") else 0)
    if body[position : position + 1] != b"{":
        raise UnreadableBody("the body must be a JSON object")
    position += 1
    found: dict[str, tuple[int, int]] = {}
    depth, marks, key, value_start = 1, 0, "", -1
    while mark := (_OUTERMOST if depth == 1 else _WITHIN).search(body, position):
        marks += 1
        if marks > _MOST_MARKS:
            raise UnreadableBody("the body has more parts than any question to a model")
        start, position = mark.span()
        match mark[0]:
            case b'"':
                string = _STRING.match(body, start)
                if string is None:
                    raise UnreadableBody("the body ends within a string")
                position = string.end()
                if depth == 1 and value_start < 0:
                    key = _key(string[0])
            case b":":
                value_start = _after_space(body, position)
            case b"{" | b"[":
                depth += 1
            case b",":
                _note(body, key, value_start, start, names, found)
                key, value_start = "", -1
            case _:
                depth -= 1
                if depth == 0:
                    _note(body, key, value_start, start, names, found)
                    return found
    raise UnreadableBody("the body ends before its outermost object does")


def _note(
    body: bytes, key: str, start: int, before: int, names: tuple[str, ...], found: dict[str, tuple[int, int]]
) -> None:
    if key not in names or start < 0:
        return
    string = _STRING.match(body, start)
    scalar = string or _SCALAR.match(body, start, before)
    found[key] = (start, scalar.end() if scalar else before)


def _key(quoted: bytes) -> str:
    """A member's name; empty for one that is of no interest."""
    if len(quoted) > _LONGEST_NAME:
        return ""
    value = _value(quoted)
    return value if isinstance(value, str) else ""


def _value(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _after_space(body: bytes, position: int) -> int:
    space = _SPACE.match(body, position)
    return space.end() if space else position
