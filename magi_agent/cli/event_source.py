"""A stream of server-sent events as a command reads it: across lost connections and restarts of the agent.

The form is that of https://html.spec.whatwg.org/multipage/server-sent-events.html, as far as the agent uses it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from magi_agent.cli.client import Client
from magi_agent.cli.exits import CommandError, RefusedError, UnreachableError

_SILENCE = 60.0
"""Seconds; the agent says every 15 that it is there."""
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_PASSING = frozenset({502, 503, 504})
"""Statuses of an agent, or of a proxy before it, that says: not now."""


@dataclass(frozen=True, slots=True)
class Message:
    """One event."""

    kind: str
    data: str


class EventSource:
    """The events at one path. A connection that is lost is made again, and goes on after the last event."""

    def __init__(
        self,
        client: Client,
        path: str,
        *,
        on_loss: Callable[[CommandError | None], None],
        on_return: Callable[[], None],
    ) -> None:
        """``on_loss`` is called once for each time that there is no connection, ``on_return`` when there is again."""
        self._client = client
        self._path = path
        self._on_loss = on_loss
        self._on_return = on_return
        self._last_id = ""

    def __iter__(self) -> Iterator[Message]:
        """Yield events for ever. Raises ``CommandError`` where the agent cannot be asked to begin with."""
        was_there = lost = False
        pause = _FIRST_PAUSE
        while True:
            trouble: CommandError | None = None
            try:
                with self._client.follow(self._path, self._last_id, silence=_SILENCE) as lines:
                    if lost:
                        self._on_return()
                    was_there, lost, pause = True, False, _FIRST_PAUSE
                    yield from self._messages(lines)
            except UnreachableError as error:
                trouble = error
            except RefusedError as error:
                if error.http_status not in _PASSING:
                    raise
                trouble = error
            if trouble is not None and not was_there:
                raise trouble
            if not lost:
                self._on_loss(trouble)
            lost = True
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _messages(self, lines: Iterable[str]) -> Iterator[Message]:
        kind = "message"
        data: list[str] = []
        for line in lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            match name:
                case "" if not line:
                    if data:
                        yield Message(kind, "\n".join(data))
                    kind, data = "message", []
                case "id":
                    self._last_id = value
                case "event":
                    kind = value
                case "data":
                    data.append(value)
                case _:
                    pass
