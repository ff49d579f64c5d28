"""The shapes of the API's answers, and what in an answer is not as they say.

A shape is a function that takes a value and the place it stands at (``.models.x.port``), and yields one sentence for
each thing that is wrong.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from enum import StrEnum

Shape = Callable[[object, str], Iterator[str]]

_CAMEL_CASE = re.compile(r"[a-z][a-zA-Z0-9]*")


def text(value: object, place: str) -> Iterator[str]:
    """Accept a string."""
    if not isinstance(value, str):
        yield f"{place} is {_kind(value)}, not a string"


def flag(value: object, place: str) -> Iterator[str]:
    """Accept true or false."""
    if not isinstance(value, bool):
        yield f"{place} is {_kind(value)}, not a boolean"


def whole(value: object, place: str) -> Iterator[str]:
    """Accept an integer; systemd's word for "not set" (2**64-1) is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        yield f"{place} is {_kind(value)}, not an integer"
    elif value >= 2**63:
        yield f"{place} is {value}, which means that nothing is set, and must be null"


def decimal(value: object, place: str) -> Iterator[str]:
    """Accept a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{place} is {_kind(value)}, not a number"


def moment(value: object, place: str) -> Iterator[str]:
    """Accept a time: UTC, ISO 8601, with ``Z``."""
    if not isinstance(value, str):
        yield f"{place} is {_kind(value)}, not a time"
        return
    try:
        offset = datetime.fromisoformat(value).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0) or not value.endswith("Z"):
        yield f"{place} is {value!r}, not a time in UTC with Z"


def anything(value: object, place: str) -> Iterator[str]:  # noqa: ARG001  # a shape's signature
    """Accept anything at all."""
    yield from ()


def exactly(*expected: object) -> Shape:
    """Make the shape of this very value, or one of these."""

    def check(value: object, place: str) -> Iterator[str]:
        if not any(type(value) is type(one) and value == one for one in expected):
            yield f"{place} is {_shown(value)}, not {' or '.join(_shown(one) for one in expected)}"

    return check


def one_of(words: type[StrEnum] | tuple[str, ...]) -> Shape:
    """Make the shape of one of a closed set of words."""
    allowed = [str(word) for word in words]

    def check(value: object, place: str) -> Iterator[str]:
        if value not in allowed:
            yield f"{place} is {_shown(value)}, not one of {', '.join(allowed)}"

    return check


def or_null(shape: Shape) -> Shape:
    """Make the shape of null and of whatever is of ``shape``."""

    def check(value: object, place: str) -> Iterator[str]:
        if value is not None:
            yield from shape(value, place)

    return check


def list_of(shape: Shape) -> Shape:
    """Make the shape of a list, each item of ``shape``."""

    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{place or 'the answer'} is {_kind(value)}, not a list"
            return
        for index, item in enumerate(value):
            yield from shape(item, f"{place}[{index}]")

    return check


def map_of(shape: Shape) -> Shape:
    """Make the shape of an object whose keys are names people or files gave, each value of ``shape``."""

    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{place or 'the answer'} is {_kind(value)}, not an object"
            return
        for name, item in value.items():
            yield from shape(item, f"{place}.{name}")

    return check


def record_of(fields: Mapping[str, Shape], *, ordered: tuple[str, ...] = (), snake_case: bool = False) -> Shape:
    """Make the shape of an object with at least ``fields``; those of ``ordered`` come first, in that order.

    Every key, of what is beyond ``fields`` too, must be camelCase, unless the contract makes it ``snake_case``.
    """

    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{place or 'the answer'} is {_kind(value)}, not an object"
            return
        for name, shape in fields.items():
            if name in value:
                yield from shape(value[name], f"{place}.{name}")
            else:
                yield f"{place}.{name} is missing"
        if ordered and tuple(value)[: len(ordered)] != ordered and all(name in value for name in ordered):
            yield f"the keys of {place or 'the answer'} are not in the order of the contract"
        for name in value:
            if not snake_case and not _CAMEL_CASE.fullmatch(name):
                yield f"{place}.{name} is not camelCase"
            if name not in fields:
                yield from _camel_case(value[name], f"{place}.{name}")

    return check


def _camel_case(value: object, place: str) -> Iterator[str]:
    """Look for keys that are not camelCase in what no shape describes."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _camel_case(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        yield from record_of({})(value, place)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
