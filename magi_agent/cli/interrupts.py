"""What Ctrl-C does to a command that must put things back before it ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from magi_agent.cli.exits import OutputError
from magi_agent.cli.screen import Screen

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedCheckError(Exception):
    """The person wants the check to end."""


class Interrupts:
    """Counts the wishes to end: the first ends the work before its next request, the second breaks a request off.

    Outside of requests nothing is broken off, so what puts things back always runs.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._count = 0
        self._may_break = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Count signals instead of dying of them until the block is left."""
        before = {number: signal.signal(number, self._on_signal) for number in _ENDING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Let one request be made. Raises ``InterruptedCheckError`` before it after one wish, within it at the next."""
        if self._count:
            raise InterruptedCheckError
        self._may_break = True
        try:
            yield
        finally:
            self._may_break = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # a handler's signature
        self._count += 1
        if self._count > 1 and self._may_break:
            raise InterruptedCheckError
        if self._count == 1 and not self._screen.as_json:
            with suppress(OutputError):  # The terminal may be gone, which must not stop what runs here.
                self._screen.note("interrupted: ending the request under way, then putting everything back")
