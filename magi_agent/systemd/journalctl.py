"""journalctl as a program that is read from: its lines as they come, its complaint, and its end with its reader."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from magi_agent.systemd.errors import JournalError

_TIMEOUT: Final = 10.0
"""Seconds without a word of one that is to end by itself."""
_CHUNK: Final = 1 << 16
_LONGEST_LINE: Final = 1 << 20
"""Bytes of one entry. journald ends a service's line after 48 KiB, which as an array of numbers are some 200 KiB."""
_MAX_COMPLAINT: Final = 4096
_RETRY_AFTER: Final = 5
GRANT: Final = "make the agent's user a member of the group systemd-journal, and restart the agent"
"""What to do where the journal may not be read."""
_READING: Final = 4
"""Programs at a time that read what is there; who comes later waits."""
_FOLLOWING: Final = 16
"""Programs at a time that wait for what is to come."""


class Journalctl:
    """Runs journalctl, so many at a time and no more."""

    def __init__(self) -> None:
        self._reading = asyncio.Semaphore(_READING)
        self._following = 0

    async def lines(self, arguments: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """What it prints until it ends by itself, line by line; it ends at once when no more is asked for.

        Raises ``JournalError``, also where it neither says anything nor ends.
        """
        async with self._reading, contextlib.aclosing(_lines_of(arguments, _TIMEOUT)) as lines:
            async for line in lines:
                yield line

    async def said(self, arguments: Sequence[str]) -> tuple[bytes, bytes]:
        """The first line that it prints, and its complaint, of one that ends by itself. Raises ``JournalError``."""
        first, complaint = b"", bytearray()
        async with self._reading, contextlib.aclosing(_lines_of(arguments, _TIMEOUT, complaint)) as lines:
            async for line in lines:
                first = first or line
        return first, bytes(complaint)

    async def followed(self, arguments: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """What it prints for as long as it is asked for more. Raises ``JournalError``, also where too many follow."""
        self.refuse_where_full()
        self._following += 1
        try:
            async with contextlib.aclosing(_lines_of(arguments, None)) as lines:
                async for line in lines:
                    yield line
        finally:
            self._following -= 1

    def refuse_where_full(self) -> None:
        """Raise ``JournalError`` where nobody else can follow now."""
        if self._following >= _FOLLOWING:
            raise JournalError(
                f"{_FOLLOWING} logs are being followed, which is the most; end one, or ask again later", _RETRY_AFTER
            )


async def _lines_of(
    arguments: Sequence[str], patience: float | None, complaint: bytearray | None = None
) -> AsyncGenerator[bytes, None]:
    """What it prints; ``complaint`` takes what it says beside that. ``patience`` is how long it may be silent."""
    complaint = bytearray() if complaint is None else complaint
    try:
        process = await asyncio.create_subprocess_exec(
            "journalctl",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise JournalError(f"the journal cannot be read: journalctl: {error.strerror}") from None
    assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018  # asked for above
    handle = _handle_of(process)
    complaining = asyncio.create_task(_keep_start(process.stderr, complaint), name="complaint of journalctl")
    said = False
    try:
        async with contextlib.aclosing(_split(process.stdout, patience)) as lines:
            async for line in lines:
                said = True
                yield line
        async with asyncio.timeout(patience):
            await complaining
            status = await process.wait()
        if status and not said:
            raise JournalError(_problem(bytes(complaint), status))
    except TimeoutError:
        raise JournalError(f"the journal cannot be read: no answer within {patience:g} s") from None
    finally:
        await _end(process, handle, complaining)


async def _split(stream: asyncio.StreamReader, patience: float | None) -> AsyncGenerator[bytes, None]:
    """The whole lines of what comes; one that is too long to be an entry is left out."""
    held = bytearray()
    is_too_long = False
    while True:
        async with asyncio.timeout(patience):
            chunk = await stream.read(_CHUNK)
        if not chunk:
            return
        first, *rest = chunk.split(b"\n")
        held += first
        for next_line in rest:
            if not is_too_long:
                yield bytes(held)
            held[:] = next_line
            is_too_long = False
        if len(held) > _LONGEST_LINE:
            held.clear()
            is_too_long = True


async def _keep_start(stream: asyncio.StreamReader, kept: bytearray) -> None:
    """Read all that comes, and keep the first of it."""
    while chunk := await stream.read(_CHUNK):
        kept += chunk[: _MAX_COMPLAINT - len(kept)]


def _handle_of(process: asyncio.subprocess.Process) -> int | None:
    """What the process can be ended by, whatever becomes of its id; ``None`` where it has ended already.

    ``Process.kill`` looks whether it has, and thereby takes its exit status away from asyncio, which complains.
    """
    try:
        return os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None


async def _end(process: asyncio.subprocess.Process, handle: int | None, complaining: asyncio.Task[None]) -> None:
    """See that nothing of it is left, whatever became of its reader."""
    if handle is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    complaining.cancel()
    _ = await asyncio.gather(complaining, return_exceptions=True)
    # What is left in the pipes must be read, or the process is never seen to end.
    await asyncio.shield(asyncio.create_task(_drained(process), name="end of journalctl"))


async def _drained(process: asyncio.subprocess.Process) -> None:
    for stream in (process.stdout, process.stderr):
        while stream is not None and await stream.read(_CHUNK):
            pass
    _ = await process.wait()


def _problem(complaint: bytes, status: int) -> str:
    said = complaint.decode(errors="replace").strip().splitlines()
    what = said[0].rstrip(".") if said else f"journalctl ended with status {status}"
    advice = f"; {GRANT}" if "permission" in what.lower() else ""
    return f"the journal cannot be read: {what}{advice}"
