"""Reading a file of variables as systemd reads it for ``EnvironmentFile=`` (systemd.exec(5))."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MAX_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANK: Final = re.compile(r"\s*")
_COMMENT: Final = re.compile(r"[#;][^\n\r]*")
_KEY: Final = re.compile(r"([^=\n\r]*)(=|[\n\r]|\Z)")
_SPACES: Final = re.compile(r"[ \t]*")
_SINGLE: Final = re.compile(r"'([^']*)(?:'|\Z)")
_DOUBLE: Final = re.compile(r'"((?:[^"\\]|\\.)*)(?:"|\\?\Z)', re.DOTALL)
_PLAIN: Final = re.compile(r"((?:[^\\\n\r]|\\.)*)(?:\\?\Z|[\n\r])", re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPABLE: Final = '"\\`$'
"""What a backslash takes its meaning from between double quotes; before anything else it stays."""


def read_environment_file(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The variables of a file, and what of it systemd leaves out, as people would point at it.

    Raises ``OSError``, and ``ValueError`` where the file is no text or far too large.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"larger than {_MAX_BYTES} bytes")
    return read_variables(data.decode())


def read_variables(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The variables that ``text`` sets, the last of each name, and the lines that set none, shortened."""
    variables: dict[str, str] = {}
    left_out: list[str] = []
    for name, value in _assignments(text):
        if value is None or not _NAME.fullmatch(name):
            left_out.append(name[:40])
        else:
            variables[name] = value
    return variables, tuple(left_out)


def _assignments(text: str) -> Iterator[tuple[str, str | None]]:
    """Each name with its value; ``None`` for a line without ``=``."""
    position = 0
    while (position := _end(_BLANK, text, position)) < len(text):
        if comment := _COMMENT.match(text, position):
            position = comment.end()
            continue
        key = _KEY.match(text, position)
        if key is None:
            return
        position = key.end()
        if key[2] != "=":
            yield key[1].rstrip(), None
            continue
        value, position = _value(text, position)
        yield key[1].rstrip(), value


def _value(text: str, position: int) -> tuple[str, int]:
    """The value that begins at ``position``, made of pieces in quotes and at most one without, and where it ends."""
    pieces: list[str] = []
    while True:
        position = _end(_SPACES, text, position)
        if single := _SINGLE.match(text, position):
            pieces.append(single[1])
            position = single.end()
        elif double := _DOUBLE.match(text, position):
            pieces.append(_ESCAPED.sub(_in_double_quotes, double[1]))
            position = double.end()
        else:
            plain = _PLAIN.match(text, position)
            if plain is None:
                return "".join(pieces), len(text)
            pieces.append(_ESCAPED.sub(_outside_quotes, _without_end(plain[1])))
            return "".join(pieces), plain.end()


def _without_end(plain: str) -> str:
    """Leave out the white space that a value ends with, but for what a backslash stands before."""
    bare = plain.rstrip(" \t")
    backslashes = len(bare) - len(bare.rstrip("\\"))
    return plain[: len(bare) + 1] if backslashes % 2 and len(bare) < len(plain) else bare


def _in_double_quotes(match: re.Match[str]) -> str:
    letter = match[1]
    return letter if letter in _ESCAPABLE else "" if letter == "\n" else f"\\{letter}"


def _outside_quotes(match: re.Match[str]) -> str:
    return "" if match[1] in "\n\r" else match[1]


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position
