"""The options a llama-server has, as its own ``--help`` lists them.

Builds differ: options get other names, lose them, take a value where they took none. So the binary is asked, and what
it says is read here. The text comes from a program, so what is not understood in it is passed over.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

MAX_HELP: Final = 1 << 20
_NAME: Final = re.compile(r"--?[A-Za-z0-9][A-Za-z0-9.-]*")
_VARIABLE: Final = re.compile(r"\(env: ([A-Z][A-Z0-9_]*)\)")
_REMOVED: Final = "argument has been removed"


@dataclass(frozen=True, slots=True)
class KnownOption:
    """One option, by all its names."""

    names: tuple[str, ...]
    takes_value: bool
    variable: str | None
    """The environment variable that says the same."""
    text: str

    @property
    def is_removed(self) -> bool:
        """Whether it is listed only to say that it is no more."""
        return _REMOVED in self.text


@dataclass(frozen=True, slots=True)
class KnownOptions:
    """All options of one build."""

    options: tuple[KnownOption, ...]
    _by_name: Mapping[str, KnownOption] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {name: option for option in self.options if not option.is_removed for name in option.names}
        object.__setattr__(self, "_by_name", MappingProxyType(by_name))

    def __getitem__(self, name: str) -> KnownOption | None:
        return self._by_name.get(name)

    def first_of(self, names: Iterable[str]) -> str | None:
        """The first of some names that this build knows."""
        return next((name for name in names if name in self._by_name), None)


def read_help(text: str) -> KnownOptions:
    """Read what ``llama-server --help`` prints."""
    return KnownOptions(tuple(_options(text[:MAX_HELP])))


def _options(text: str) -> Iterator[KnownOption]:
    head: tuple[tuple[str, ...], bool] | None = None
    said: list[str] = []
    for line in text.splitlines():
        if line.startswith("-") and (begun := _head(line)) is not None:
            if head is not None:
                yield _option(*head, said)
            head, said = begun, [line]
        else:
            said.append(line)
    if head is not None:
        yield _option(*head, said)


def _head(line: str) -> tuple[tuple[str, ...], bool] | None:
    """The names that a line begins with, and whether a value follows them."""
    names = []
    rest = line
    while found := _NAME.match(rest):
        names.append(found.group())
        rest = rest[found.end() :]
        if not rest.startswith(","):
            break
        rest = rest[1:].lstrip(" ")
    if not names or not any(name.startswith("--") for name in names):
        return None
    # What the option does stands further to the right; its value follows right behind one space.
    return tuple(names), rest.startswith(" ") and not rest.startswith("  ")


def _option(names: tuple[str, ...], takes_value: bool, said: list[str]) -> KnownOption:
    text = " ".join(" ".join(said).split())
    variable = _VARIABLE.search(text)
    return KnownOption(names, takes_value, variable[1] if variable else None, text)
