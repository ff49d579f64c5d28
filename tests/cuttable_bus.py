"""A way to the bus that can be cut at any moment, and leads there again at once.

Killing the bus itself does the same to the agent, and more to systemd: the user manager of systemd 252 starts its own
bus, and where it needs that for an answer in the same moment, it waits for itself for 90 seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Self

_CHUNK = 65536


class CuttableBus:
    """Hands bytes on between clients of ``path`` and the bus at ``bus``; both are D-Bus addresses by ``unix:path=``."""

    def __init__(self, bus_address: str, path: Path) -> None:
        self.address = f"unix:path={path}"
        self._path = path
        self._bus = bus_address.removeprefix("unix:path=").partition(",")[0]
        self._writers: set[asyncio.StreamWriter] = set()
        self._left: int | None = None
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """End every connection now."""
        for writer in self._writers:
            writer.transport.abort()

    def cut_after(self, answers: int) -> None:
        """End every connection right behind so many more pieces of what the bus says: they arrive together."""
        self._left = answers

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        from_bus, to_bus = await asyncio.open_unix_connection(self._bus)
        both = {to_client, to_bus}
        self._writers |= both
        try:
            await asyncio.gather(
                self._hand_on(from_client, to_bus, counted=False), self._hand_on(from_bus, to_client, counted=True)
            )
        finally:
            self._writers -= both

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                writer.write(data)
                if counted and self._left is not None:
                    self._left -= 1
                    if self._left == 0:
                        self._left = None
                        for each in self._writers:
                            each.close()
                await writer.drain()
        writer.close()
