"""What a unit wrote to the journal, read by journalctl.

Fields whose names begin with ``_`` are journald's own word; any process may claim the others, ``SYSLOG_IDENTIFIER``
for one. A match is ``FIELD=value``. Fields: systemd.journal-fields(7); options: journalctl(1).

Two ways of journalctl's own are gone around. With ``--after-cursor=``, up to systemd 252, it leaves out the first entry
that matches, whether or not that is the one the cursor names: here a reading begins with the cursor's entry, which is
left out where it comes. With ``--since=`` and ``--lines=`` it prints the first lines, not the last: here it prints the
newest first, and the order is turned round afterwards.
"""

import contextlib
import os
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from magi_agent.systemd.errors import JournalError
from magi_agent.systemd.journal_entries import FIELDS, INVOCATION, JournalEntry, entry_of
from magi_agent.systemd.journalctl import GRANT, Journalctl

_MAX_OUTPUT: Final = 1 << 20
_MAX_MESSAGE: Final = 4096
"""Characters of a line that is read as evidence."""
_LONGEST_MESSAGE: Final = 1 << 16
"""Characters of a message; journald itself breaks what a service prints after 48 KiB, native messages may be longer."""
_MACHINE_ID: Final = Path("/etc/machine-id")
_CURSOR: Final = re.compile("s={0};i={1};b={0};m={1};t={1};x={1}".format("[0-9a-f]{32}", "[0-9a-f]{1,16}"))

_PARTIAL: Final = b"not seeing messages from other users"
"""journalctl's hint to one who may read some of the journal."""

Alternatives = Sequence[Sequence[str]]
"""What an entry must match: all of one of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which entries are meant."""

    any_of: Alternatives
    since: float | None = None
    """The oldest time, in seconds since the epoch."""
    until: float | None = None
    """Likewise the newest."""
    fields: tuple[str, ...] = ()
    """What else is to be read of each."""


def is_cursor(text: str) -> bool:
    """Whether it has the form of a cursor, as sd_journal_get_cursor(3) makes them."""
    return _CURSOR.fullmatch(text) is not None


class Journal:
    """Reads the host's journal, or the one below ``directory``."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._journalctl = Journalctl()

    async def read_last(self, identifier: str, *, lines: int, invocation_id: str | None = None) -> list[JournalEntry]:
        """Return the last entries of the service unit ``<identifier>.service``, ``lines`` at most, oldest first.

        With ``invocation_id``, those of that run alone: what the run itself wrote; where there is nothing of it, what
        systemd said about the run (why it could not be executed). Entries that the unit wrote in its last moments may
        take some milliseconds to appear. Raises ``JournalError``.
        """
        unit = f"{identifier}.service"
        own = f"_UID={os.getuid()}"
        of_unit = [[f"_SYSTEMD_UNIT={unit}"], [f"_SYSTEMD_USER_UNIT={unit}", own]]
        if invocation_id is None:
            return await self._last(of_unit, lines)
        entries = await self._last([[f"{INVOCATION}={invocation_id}"]], lines)
        if not entries:
            # A process may be gone before journald has looked who it is.
            claimed = await self._last([*of_unit, [f"SYSLOG_IDENTIFIER={identifier}", own]], lines)
            entries = [entry for entry in claimed if not entry.invocation_id]
        if not entries:
            by_systemd = [[f"INVOCATION_ID={invocation_id}", "_UID=0"], [f"USER_INVOCATION_ID={invocation_id}", own]]
            entries = await self._last(by_systemd, lines)
        return entries

    async def newest(self, selection: Selection, *, before: str | None = None) -> AsyncGenerator[JournalEntry, None]:
        """The entries from the newest on, or from the one on that stands before the cursor ``before``.

        Raises ``JournalError``.
        """
        words = ["--reverse"]
        if before is not None:
            # Beside a cursor journalctl takes no oldest time.
            words.append(f"--cursor={before}")
        else:
            words += _times(selection)
        async with contextlib.aclosing(self._read(words, selection, before)) as entries:
            async for entry in entries:
                if selection.since is not None and entry.timestamp < selection.since:
                    return
                if selection.until is None or entry.timestamp <= selection.until:
                    yield entry

    async def oldest(self, selection: Selection, *, after: str | None = None) -> AsyncGenerator[JournalEntry, None]:
        """The entries from the oldest on, or from the one on that comes after the cursor ``after``.

        Raises ``JournalError``.
        """
        words = _times(selection) if after is None else [f"--cursor={after}"]
        async with contextlib.aclosing(self._read(words, selection, after)) as entries:
            async for entry in entries:
                if selection.until is not None and entry.timestamp > selection.until:
                    return
                if selection.since is None or entry.timestamp >= selection.since:
                    yield entry

    async def follow(self, selection: Selection, after: str) -> AsyncGenerator[JournalEntry, None]:
        """The entries that come after a cursor, as they come; times of the selection count for nothing.

        journald tells whoever waits of new entries a quarter to half a second after they came, and not before.
        Raises ``JournalError``, also where too many follow already.
        """
        # Else it would follow what is of the present boot alone; which one that is, the sandbox of a service within a
        # container has another idea of than journald there, as it sees a /proc of its own.
        words = ["--follow", "--merge", "--no-tail", f"--cursor={after}"]
        # Merged are the journals of other machines too, such as containers.
        machine = [] if self._directory is not None else _this_machine()
        here = replace(selection, any_of=[[*alternative, *machine] for alternative in selection.any_of])
        lines = self._journalctl.followed(self._arguments(words, here))
        async with contextlib.aclosing(lines):
            async for line in lines:
                entry = entry_of(line, _LONGEST_MESSAGE)
                if entry is not None and entry.cursor != after:
                    yield entry

    async def end(self, *, of_others: bool) -> str:
        """The cursor of the last entry of all.

        Raises ``JournalError`` where there is no journal for this user to read, so that emptiness says nothing;
        ``of_others`` says whether other users' entries matter: some may read their own alone.
        """
        words = ["--no-pager", "--output=json", "--lines=1"]
        if self._directory is not None:
            words.append(f"--directory={self._directory}")
        said, complaint = await self._journalctl.said(words)
        if of_others and _PARTIAL in complaint:
            raise JournalError(f"the journal shows this user no entries of others; {GRANT}")
        entry = entry_of(said, _LONGEST_MESSAGE)
        if entry is None:
            raise JournalError(
                "there is nothing in this host's journal: is systemd-journald running, and is its Storage= not 'none'?"
            )
        return entry.cursor

    def refuse_where_full(self) -> None:
        """Raise ``JournalError`` where nobody else can follow now."""
        self._journalctl.refuse_where_full()

    async def _read(
        self, words: Sequence[str], selection: Selection, left_out: str | None
    ) -> AsyncGenerator[JournalEntry, None]:
        lines = self._journalctl.lines(self._arguments(words, selection))
        async with contextlib.aclosing(lines):
            async for line in lines:
                entry = entry_of(line, _LONGEST_MESSAGE)
                if entry is not None and (left_out is None or entry.cursor != left_out):
                    yield entry

    async def _last(self, any_of: Alternatives, lines: int) -> list[JournalEntry]:
        # The newest first: where there is too much to read, it is the older part that is left out.
        words = ["--reverse", f"--lines={lines}"]
        found: list[JournalEntry] = []
        left = _MAX_OUTPUT
        reading = self._journalctl.lines(self._arguments(words, Selection(any_of=any_of)))
        async with contextlib.aclosing(reading):
            async for line in reading:
                left -= len(line)
                if left < 0:
                    break
                if entry := entry_of(line, _MAX_MESSAGE):
                    found.append(entry)
        return found[::-1]

    def _arguments(self, words: Sequence[str], selection: Selection) -> list[str]:
        arguments = ["--no-pager", "--quiet", "--output=json", "--all"]
        arguments.append(f"--output-fields={','.join((*FIELDS, *selection.fields))}")
        if self._directory is not None:
            arguments.append(f"--directory={self._directory}")
        arguments += words
        for number, alternative in enumerate(selection.any_of):
            arguments += ["+", *alternative] if number else alternative
        return arguments


def _this_machine() -> list[str]:
    """What entries of this machine match, by machine-id(5)."""
    try:
        return [f"_MACHINE_ID={_MACHINE_ID.read_text().strip()}"]
    except OSError:
        return []


def _times(selection: Selection) -> list[str]:
    words = [] if selection.since is None else [f"--since=@{selection.since:.6f}"]
    return words if selection.until is None else [*words, f"--until=@{selection.until:.6f}"]
