"""What a unit wrote to the journal, read by journalctl.

Fields whose names begin with ``_`` are journald's own word; any process may claim the others, ``SYSLOG_IDENTIFIER``
for one. Fields: systemd.journal-fields(7); the JSON: journalctl(1) and systemd's JOURNAL_EXPORT_FORMATS.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.systemd.errors import JournalError

_TIMEOUT: Final = 10.0
_MAX_OUTPUT: Final = 1 << 20
_MAX_COMPLAINT: Final = 4096
_CHUNK: Final = 1 << 16
_MAX_MESSAGE: Final = 4096
"""Characters; journald itself breaks what a service prints after 48 KiB, native messages may be longer."""
_INVOCATION: Final = "_SYSTEMD_INVOCATION_ID"
_FIELDS: Final = f"MESSAGE,PRIORITY,_PID,{_INVOCATION}"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One entry of the journal."""

    message: str
    timestamp: float
    """When journald received it, in seconds since the epoch (UTC)."""
    priority: int | None
    """syslog(3): 0 is an emergency, 3 an error, 6 information, 7 debugging."""
    pid: int | None
    invocation_id: str
    """The run of the unit that wrote it; empty where journald came too late to find out."""


class Journal:
    """Reads the host's journal, or the one below ``directory``."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    async def read_last(self, identifier: str, *, lines: int, invocation_id: str | None = None) -> list[JournalEntry]:
        """Return the last entries of the service unit ``<identifier>.service``, ``lines`` at most, oldest first.

        With ``invocation_id``, those of that run alone: what the run itself wrote; where there is nothing of it, what
        systemd said about the run (why it could not be executed). Entries that the unit wrote in its last moments may
        take some milliseconds to appear. Raises ``JournalError``.
        """
        unit = f"{identifier}.service"
        own = f"_UID={os.getuid()}"
        of_unit = [f"_SYSTEMD_UNIT={unit}", "+", f"_SYSTEMD_USER_UNIT={unit}", own]
        if invocation_id is None:
            return await self._read(of_unit, lines)
        entries = await self._read([f"{_INVOCATION}={invocation_id}"], lines)
        if not entries:
            # A process may be gone before journald has looked who it is.
            claimed = await self._read([*of_unit, "+", f"SYSLOG_IDENTIFIER={identifier}", own], lines)
            entries = [entry for entry in claimed if not entry.invocation_id]
        if not entries:
            by_systemd = [f"INVOCATION_ID={invocation_id}", "_UID=0", "+", f"USER_INVOCATION_ID={invocation_id}", own]
            entries = await self._read(by_systemd, lines)
        return entries

    async def _read(self, matches: list[str], lines: int) -> list[JournalEntry]:
        # The newest first: where there is too much to read, it is the older part that is left out.
        command = ["journalctl", "--no-pager", "--quiet", "--output=json", "--all", "--reverse"]
        command += [f"--lines={lines}", f"--output-fields={_FIELDS}"]
        if self._directory is not None:
            command.append(f"--directory={self._directory}")
        output = await _output_of([*command, *matches])
        return list(_entries(reversed(output.split(b"\n", lines)[:lines])))


async def _output_of(command: list[str]) -> bytes:
    """Run a program and return what it prints, up to the bound. Raises ``JournalError``."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise JournalError(f"the journal cannot be read: {command[0]}: {error.strerror}") from None
    assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018  # asked for above
    try:
        async with asyncio.timeout(_TIMEOUT):
            output, complaint = await asyncio.gather(
                _read_up_to(_MAX_OUTPUT, process.stdout, process), _read_up_to(_MAX_COMPLAINT, process.stderr, process)
            )
            await process.wait()
    except TimeoutError:
        raise JournalError(f"the journal cannot be read: no answer within {_TIMEOUT:g} s") from None
    finally:
        if process.returncode is None:
            _kill(process)
            # What is left in the pipes must be read, or the process is never seen to end.
            await process.communicate()
    if process.returncode and not output and complaint:
        raise JournalError(f"the journal cannot be read: {complaint.decode(errors='replace').splitlines()[0]}")
    return output


async def _read_up_to(limit: int, stream: asyncio.StreamReader, process: asyncio.subprocess.Process) -> bytes:
    """Read all there is; a process that writes more than ``limit`` bytes is ended."""
    chunks = []
    while chunk := await stream.read(_CHUNK):
        if limit <= 0:
            _kill(process)
            continue
        chunks.append(chunk[:limit])
        limit -= len(chunk)
    return b"".join(chunks)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def _entries(lines: Iterable[bytes]) -> Iterable[JournalEntry]:
    for line in lines:
        try:
            fields = json.loads(line)
            timestamp = int(fields["__REALTIME_TIMESTAMP"]) / 1_000_000
        except (ValueError, KeyError, TypeError):
            # An empty line, or one that the bound has cut.
            continue
        yield JournalEntry(
            message=_text(fields.get("MESSAGE"))[:_MAX_MESSAGE],
            timestamp=timestamp,
            priority=_number(fields.get("PRIORITY")),
            pid=_number(fields.get("_PID")),
            invocation_id=_text(fields.get(_INVOCATION)),
        )


def _text(value: object) -> str:
    """Return a field's value: a string, or an array of bytes where it is not UTF-8; the first where there are more."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return ""
    if all(isinstance(item, int) for item in value):
        return bytes(value).decode(errors="replace")
    return _text(value[0])


def _number(value: object) -> int | None:
    text = _text(value)
    return int(text) if text.isdecimal() else None
