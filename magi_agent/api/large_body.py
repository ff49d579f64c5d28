"""A body too large to be written at once."""

from typing import Final

from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

SLICE: Final = 192 * 1024
"""Bytes that are handed to the socket at once: about as many as the kernel takes of them."""
_FIRST: Final = 4096
"""Bytes that go ahead of them: by the time the rest comes, the reader is awake."""


class LargeBody(Payload):
    """Bytes that are written slice by slice, each once the one before is on its way.

    Written whole, what the socket does not take at once would be copied for each caller, more than once; and memory
    that comes and goes by the megabyte costs more in page faults than the answer does otherwise.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._content = content
        self._size = len(content)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The body as text."""
        return self._content.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write it all. Raises ``ConnectionError`` when the caller is gone."""
        content = memoryview(self._content)
        await writer.write(content[:_FIRST])
        for start in range(_FIRST, len(content), SLICE):
            await writer.write(content[start : start + SLICE])
