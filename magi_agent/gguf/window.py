"""Reading a file from front to back through a small window, with every length checked first."""

import os
import struct
from hashlib import blake2b
from typing import Final

from magi_agent.gguf.errors import MalformedHeader, TruncatedHeader

WINDOW_BYTES: Final = 256 * 1024
"""Bytes of the file that are held at once: few calls to the kernel, and still inside a processor's cache."""

_LENGTH = struct.Struct("<Q")


class Window:
    """A position in an open file that only moves forward.

    What is read is also digested; what is skipped is not. Nothing is read or allocated for a length before it is
    known that the file is that long: a length that leads past the limit raises ``MalformedHeader``, one that leads
    past the end of the file ``TruncatedHeader``.
    """

    __slots__ = ("_base", "_data", "_digest", "_digested", "_fd", "_limit", "_pos", "_size")

    def __init__(self, fd: int, size: int, limit: int) -> None:
        """Stand at the first byte of ``fd``, of which ``size`` bytes exist and at most ``limit`` may be passed."""
        self._fd = fd
        self._size = size
        self._limit = limit
        self._base = 0  # where in the file the window begins
        self._data = b""
        self._pos = 0  # in the window
        self._digested = 0  # in the window
        self._digest = blake2b(digest_size=16)

    @property
    def position(self) -> int:
        """The byte of the file that is read next."""
        return self._base + self._pos

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """Read the integers that ``layout`` describes."""
        self._ensure(layout.size)
        values: tuple[int, ...] = layout.unpack_from(self._data, self._pos)
        self._pos += layout.size
        return values

    def take(self, length: int) -> bytes:
        """Read ``length`` bytes."""
        if length <= WINDOW_BYTES:
            self._ensure(length)
            begin = self._pos
            self._pos += length
            return self._data[begin : self._pos]
        self._check(self.position + length)
        data = self._read(length, length)
        self._digest_read()
        self._digest.update(data)
        self._move(self.position + length)
        return data

    def peek(self, length: int) -> bytes:
        """Return the next ``length`` bytes, or as many as there are, and stay where we are."""
        return os.pread(self._fd, length, self.position)

    def next_byte(self) -> int:
        """Return the next byte, and stay where we are."""
        self._ensure(1)
        return self._data[self._pos]

    def skip(self, length: int) -> None:
        """Step over ``length`` bytes without reading them."""
        self._check(self.position + length)
        self._digest_read()
        self._move(self.position + length)

    def skip_strings(self, count: int) -> None:
        """Step over ``count`` strings, each a 64-bit length and as many bytes, reading the lengths only."""
        self._check(self.position + count * _LENGTH.size)
        self._digest_read()
        unpack_from = _LENGTH.unpack_from
        left = count
        while left:
            self._ensure(_LENGTH.size)
            data, pos = self._data, self._pos
            # The one loop whose length a file decides by the hundred thousand. It leaves the window by the
            # exception instead of comparing each time.
            try:
                for left in range(left, 0, -1):  # noqa: B007, B020  # what is left is wanted after the exception
                    pos += unpack_from(data, pos)[0] + 8
                left = 0
            except (struct.error, OverflowError):
                pass
            self._digested = self._pos
            position = self._base + pos
            self._check(position)
            self._move(position)

    def digest(self) -> str:
        """Return the digest of all that was read so far, in hexadecimal."""
        self._digest_read()
        return self._digest.hexdigest()

    def _ensure(self, length: int) -> None:
        """Have the next ``length`` bytes, at most ``WINDOW_BYTES``, in the window."""
        if self._pos + length <= len(self._data):
            return
        self._check(self.position + length)
        self._digest_read()
        position = self.position
        self._data = self._read(WINDOW_BYTES, length)
        self._base, self._pos, self._digested = position, 0, 0

    def _read(self, length: int, least: int) -> bytes:
        """Read up to ``length`` bytes from here on, and never fewer than ``least``."""
        data = os.pread(self._fd, length, self.position)
        while len(data) < least:
            # Some file systems answer with less than there is; others lost their end since the file was opened.
            more = os.pread(self._fd, length - len(data), self.position + len(data))
            if not more:
                raise self._ends()
            data += more
        return data

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise MalformedHeader(
                f"the header claims at least {position} bytes for itself; at most {self._limit} are read", self.position
            )
        if position > self._size:
            raise self._ends()

    def _ends(self) -> TruncatedHeader:
        return TruncatedHeader(f"the file ends inside its header, after {self._size} bytes", self.position)

    def _digest_read(self) -> None:
        if self._digested < self._pos:
            self._digest.update(memoryview(self._data)[self._digested : self._pos])
        self._digested = self._pos

    def _move(self, position: int) -> None:
        """Go on at ``position``, everything before it being digested or left out on purpose."""
        pos = position - self._base
        if pos <= len(self._data):
            self._pos = self._digested = pos
        else:
            self._data = b""
            self._base, self._pos, self._digested = position, 0, 0
