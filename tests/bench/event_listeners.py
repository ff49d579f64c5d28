"""Clients of the agent's stream of events, as many as a benchmark wants, in one thread."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

_PATIENCE = 30.0
_PIECE = 64 * 1024
_DATA = b"data: "


@dataclass
class Listener:
    """One client. What it hears is kept with the time at which it was here."""

    channel: socket.socket
    heard: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    has_place: bool = False
    """Whether it was told where the stream begins, so that it misses nothing from then on."""
    rest: bytes = b""

    def read(self) -> None:
        """Take in what is there."""
        piece = self.channel.recv(_PIECE)
        now = time.time()
        if not piece:
            raise RuntimeError("the stream has ended")
        *lines, self.rest = (self.rest + piece).split(b"\n")
        for line in lines:
            self.has_place = self.has_place or line.startswith(b"id: ")
            if line.startswith(_DATA):
                self.heard.append((now, json.loads(line.removeprefix(_DATA))))


@dataclass
class Listeners:
    """All clients, which are read together."""

    all: list[Listener]
    selector: selectors.BaseSelector

    def wait(self, what: str, each: str, **values: object) -> list[tuple[float, dict[str, Any]]]:
        """Read until each listener has heard an event of the kind ``each`` with these values; return those."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            found = [_first(listener, each, values) for listener in self.all]
            done = [event for event in found if event is not None]
            if len(done) == len(found):
                return done
            if time.monotonic() > deadline:
                raise RuntimeError(f"not heard by {len(found) - len(done)} of {len(found)}: {what}")
            self._read()

    def forget(self) -> None:
        """Keep nothing of what was heard so far, nor of what has arrived and was not read yet."""
        while self._read(0.0):
            pass
        for listener in self.all:
            listener.heard.clear()

    def settle(self) -> None:
        """Read until each was told where its stream begins."""
        deadline = time.monotonic() + _PATIENCE
        while not all(listener.has_place for listener in self.all):
            if time.monotonic() > deadline:
                raise RuntimeError("the streams do not begin")
            self._read()

    def _read(self, patience: float = 1.0) -> bool:
        """Read once from whoever has something within ``patience`` seconds; False where nobody has."""
        ready = self.selector.select(patience)
        for key, _ in ready:
            key.data.read()
        return bool(ready)


def seconds_since(event: tuple[float, dict[str, Any]]) -> float:
    """How long after it happened, as the agent says, an event was heard."""
    heard, told = event
    return heard - datetime.fromisoformat(told["at"]).timestamp()


@contextmanager
def listening(path: Path, count: int) -> Iterator[Listeners]:
    """Have ``count`` clients at the unix socket ``path``."""
    with ExitStack() as channels, selectors.DefaultSelector() as selector:
        made = []
        for _ in range(count):
            channel = channels.enter_context(socket.socket(socket.AF_UNIX))
            channel.settimeout(_PATIENCE)
            channel.connect(str(path))
            channel.sendall(b"GET /api/events HTTP/1.1\r\nHost: magi\r\nAccept: text/event-stream\r\n\r\n")
            made.append(Listener(channel))
            selector.register(channel, selectors.EVENT_READ, made[-1])
        listeners = Listeners(made, selector)
        listeners.settle()
        yield listeners


def _first(listener: Listener, kind: str, values: dict[str, object]) -> tuple[float, dict[str, Any]] | None:
    return next(
        (heard for heard in listener.heard if heard[1]["type"] == kind and values.items() <= heard[1].items()), None
    )
