"""Requests that take long, made beside a live line: each in a thread of its own that nobody has to wait for.

A daemon thread is right here: on Ctrl-C the process ends at once, the connection with it, and what the agent was told
to do goes on.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from magi_agent.cli.client import Reply


@dataclass
class Errand:
    """One long request, the name of what it is about, and what came of it."""

    name: str
    ask: Callable[[], Reply]
    started: float | None = None
    finished: float | None = None
    reply: Reply | None = None
    crash: BaseException | None = None

    @property
    def begun(self) -> bool:
        """Whether the request is made; of many errands some wait for others to end."""
        return self.started is not None

    @property
    def ended(self) -> bool:
        """Whether there is a result."""
        return self.finished is not None

    def result(self) -> Reply:
        """Return the answer, or raise what stood in its way. Only for an errand that has ended."""
        if self.crash is not None:
            raise self.crash
        if self.reply is None:
            raise RuntimeError(f"the errand for {self.name} has not ended")
        return self.reply

    @property
    def seconds(self) -> float:
        """How long it has taken, or took."""
        now = time.monotonic()
        return (self.finished or now) - (self.started or now)


class Errands:
    """Several errands at once, at most ``at_once`` of them under way."""

    def __init__(self, errands: list[Errand], at_once: int = 8) -> None:
        self.all = errands
        self._changed = threading.Condition()
        self._places = threading.Semaphore(at_once)

    def begin(self) -> None:
        """Start them all."""
        for errand in self.all:
            threading.Thread(target=self._run, args=(errand,), name=f"errand {errand.name}", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait until one ends, at most ``seconds``; return whether all have ended."""
        with self._changed:
            if not self._all_ended():
                self._changed.wait(seconds)
            return self._all_ended()

    def _all_ended(self) -> bool:
        return all(errand.ended for errand in self.all)

    def _run(self, errand: Errand) -> None:
        with self._places:
            errand.started = time.monotonic()
            try:
                errand.reply = errand.ask()
            except BaseException as crash:  # noqa: BLE001  # raised again where the result is read
                errand.crash = crash
            with self._changed:
                errand.finished = time.monotonic()
                self._changed.notify_all()
