"""What the reconciler remembers of each server."""

import asyncio
from dataclasses import dataclass
from typing import Final

from magi_agent.servers.desired import Wish
from magi_agent.servers.failure import Failure
from magi_agent.servers.plan import UnitCondition, Verb, condition_of
from magi_agent.systemd.status import UnitStatus
from magi_agent.vocabulary import ServerState

_FIRST_COOLDOWN: Final = 10.0
_LONGEST_COOLDOWN: Final = 300.0
_MOST_DOUBLINGS: Final = 10
_STEADY: Final = 60.0
"""Seconds a server must have been ready for its earlier failures to be forgotten."""


@dataclass(slots=True)
class ServerRecord:
    """One model's server, as far as the agent has something to remember of it between two looks.

    All of it can be found out again: readiness by asking, failure from the unit, and a cool-down that a restart of the
    agent cuts short does no harm.
    """

    state: ServerState = ServerState.STOPPED
    """As it was told to everybody last."""
    proven: tuple[str, int | None] | None = None
    """Invocation and process that were proven ready."""
    lack: Failure | None = None
    """What the one that was proven ready does without, though it was asked for."""
    ready_since: float | None = None
    failure: Failure | None = None
    doubtful: str | None = None
    """Invocation of which it is not known yet whether systemd has given up on it."""
    counted: str | None = None
    """Invocation of which it is known already how it ended."""
    recording: Failure | None = None
    """The failure whose last log lines are being read; it is told with them."""
    stuck: Failure | None = None
    """What is left of its last run, though that was killed; nothing is done about it while something is."""
    attempts: int = 0
    retry_at: float | None = None
    is_early: bool = False
    """Whether the next try comes before its time, since something has changed that it lacked."""
    restart: bool = False
    """Whether what runs is to be ended, whatever is wished for afterwards."""
    ending: bool = False
    """Whether the agent itself is ending it, so that its end is nobody else's word."""
    leaving: Wish | None = None
    """What was wished for when somebody else began to stop it."""
    start_told: str | None = None
    """Invocation of the start that was noted last."""
    stop_told: str | None = None
    """Invocation of the stop that was noted last."""
    overruled: str | None = None
    """Why its last start did not fit into memory, where somebody had forced it."""
    retries_told: int = 0
    """How often systemd had started it again by itself, when that was noted last."""
    ended: Failure | None = None
    """How the run ended after which systemd starts it again by itself."""
    noting: bool = False
    """Whether it is being kept that it runs as wished."""
    let_go: Wish | None = None
    """The wish that somebody overruled by stopping it."""
    trouble: Failure | None = None
    """Why it could not be stopped or cleared when that was tried last."""
    troubled: Wish | None = None
    """What was wished for then; of another wish nobody knows yet whether it can be carried out."""
    tries: int = 0
    """How often in a row that could not be done."""
    step: asyncio.Task[None] | None = None
    verb: Verb | None = None
    """What the step does."""
    watch: asyncio.Task[None] | None = None
    watched: tuple[str, int | None] | None = None

    def is_doing(self, verb: Verb) -> bool:
        """Whether such a step is under way."""
        return self.verb is verb and self.step is not None and not self.step.done()

    def condition(self, unit: UnitStatus | None) -> UnitCondition:
        """What matters of its unit, a failure that is not certain yet being none."""
        if self.stuck is not None:
            return UnitCondition.STUCK
        condition = condition_of(unit)
        return UnitCondition.QUEUED if condition is UnitCondition.FAILED and self.doubtful is not None else condition

    def was_ready(self, unit: UnitStatus) -> bool:
        """Whether this run of the unit was proven ready."""
        return self.proven is not None and self.proven[0] == unit.invocation_id

    def count_failure(self, failure: Failure, now: float) -> None:
        """Let it cool down, each time twice as long; a try before its time that lacks the same says nothing new."""
        if self.ready_since is not None and now - self.ready_since >= _STEADY:
            self.attempts = 0
        self.ready_since = None
        is_same = self.is_early and self.failure is not None and self.failure.result == failure.result
        self.is_early = False
        self.failure = failure
        if not is_same:
            self.attempts += 1
        doublings = min(self.attempts - 1, _MOST_DOUBLINGS)
        self.retry_at = now + min(_FIRST_COOLDOWN * 2**doublings, _LONGEST_COOLDOWN)

    def try_early(self) -> None:
        """Let it be tried at once, whatever is left of its cool-down."""
        self.retry_at = 0.0
        self.is_early = True

    def forget_failure(self) -> None:
        """Forget how it failed last."""
        self.failure = self.recording = self.retry_at = None
        self.is_early = False

    def note_trouble(self, trouble: Failure, wish: Wish | None) -> bool:
        """Take note of why something could not be done about it; tells whether that is news."""
        is_news = self.trouble is None or self.trouble.message != trouble.message or self.troubled is not wish
        self.tries = 1 if self.troubled is not wish else self.tries + 1
        if is_news:
            self.trouble, self.troubled = trouble, wish
        return is_news

    def forget_trouble(self) -> None:
        """Forget that something could not be done about it."""
        self.trouble = self.troubled = None
        self.tries = 0
