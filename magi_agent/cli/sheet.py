"""A sheet of facts: sections of labelled lines, wrapped beside their labels on a terminal, whole in a pipe."""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from magi_agent.cli.grid import Cell
from magi_agent.cli.phrasing import safe
from magi_agent.cli.screen import Screen

_INDENT = 2
_GAP = 2
_NARROWEST_VALUE = 20


@dataclass(frozen=True, slots=True)
class Fact:
    """One line: what it is about, what is so, and a remark on it."""

    label: str
    value: Cell
    remark: str = ""


def write_section(screen: Screen, title: str, facts: Iterable[Fact], *, label_width: int) -> None:
    """Write ``facts`` below a title; nothing where there are none."""
    listed = list(facts)
    if not listed:
        return
    screen.line("")
    screen.line(Cell(title, "bold"))
    for fact in listed:
        _write(screen, fact, label_width)


def _write(screen: Screen, fact: Fact, label_width: int) -> None:
    before = _INDENT + label_width + _GAP
    for index, cells in enumerate(_lines(screen, fact, before)):
        label = " " * _INDENT + fact.label if index == 0 else ""
        screen.line(Cell(label.ljust(before), "dim"), *cells)


def _lines(screen: Screen, fact: Fact, before: int) -> list[list[Cell]]:
    """Return what stands beside the label, line by line."""
    value, remark = safe(fact.value.text), safe(fact.remark)
    if not screen.is_terminal(screen.out):
        return [[Cell(value, fact.value.style), Cell(f"{' ' * _GAP}{remark}" if remark else "", "dim")]]
    room = max(_NARROWEST_VALUE, shutil.get_terminal_size().columns - before)
    lines = [[Cell(line, fact.value.style)] for line in _wrapped(value, room) or [""]]
    if remark and len(lines[-1][0].text) + _GAP + len(remark) <= room:
        lines[-1].append(Cell(" " * _GAP + remark, "dim"))
    else:
        lines += [[Cell(line, "dim")] for line in _wrapped(remark, room)]
    return lines


def _wrapped(text: str, room: int) -> list[str]:
    # A path is left whole: one that is broken by us cannot be copied.
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
