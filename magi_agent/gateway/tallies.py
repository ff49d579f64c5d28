"""What becomes of the requests for each model: counted for ``/metrics``, and told in the journal, one by one.

Bounded by the models of the registry: nothing that a client or a server says is a label. An answer is not looked into
as it passes; its last pieces are kept, and read once it is through.
"""

import asyncio
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from magi_agent.errors import MagiError
from magi_agent.gateway.answer_figures import HEAD, TAIL, AnswerFigures, answer_figures, answer_id
from magi_agent.registry.registry import Registry
from magi_agent.request_id import REQUEST_ID

_LOG: Final = logging.getLogger(__name__)
SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of times, but for the last one, which has none."""
SPEEDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Those of tokens in a second."""
_PIECES: Final = 4
"""Of an answer's end: what servers say of themselves stands in the last three events of a stream at the furthest."""
_LEAST_SECONDS: Final = 0.1
"""What comes faster than that says how the pieces were passed on, and not how fast they were made."""
_TOO_MANY: Final = 429
_CLIENTS_FAULT: Final = 400
_SERVERS_FAULT: Final = 500
_NOT_SUPPORTED: Final = 501
"""What llama-server answers where it is not started for a path, such as embeddings: the client's mistake."""


class Outcome(StrEnum):
    """What became of a request."""

    ANSWERED = "answered"
    """The server's answer went through as a whole."""
    REFUSED = "refused"
    """So did its error about the request (a status of 4xx, or 501: it is not started for what was asked)."""
    FAILED = "failed"
    """It said that it failed (5xx), or gave no answer at all."""
    BROKEN_OFF = "broken_off"
    """It broke off in the middle."""
    ABANDONED = "abandoned"
    """The client left before the end."""
    CUT_OFF = "cut_off"
    """The agent stopped, and had waited for it as long as it does (``gateway_drain``)."""
    QUEUE_FULL = "queue_full"
    """As many waited for the model as may."""
    NOT_READY = "not_ready"
    """The model was not up, and could not be had up."""


_IS_TROUBLE: Final = frozenset({Outcome.FAILED, Outcome.BROKEN_OFF, Outcome.CUT_OFF})


@dataclass(frozen=True, slots=True)
class SpreadCounts:
    """A histogram."""

    buckets: tuple[int, ...]
    """By bucket; not added up."""
    total: float


class Spread:
    """Counts values by how large they are."""

    __slots__ = ("_bounds", "_buckets", "_total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._buckets = [0] * (len(bounds) + 1)
        self._total = 0.0

    def note(self, value: float) -> None:
        """Count one."""
        self._buckets[bisect_left(self._bounds, value)] += 1
        self._total += value

    def taken(self) -> SpreadCounts:
        """What was counted up to now."""
        return SpreadCounts(tuple(self._buckets), self._total)


@dataclass(frozen=True, slots=True)
class ModelTallies:
    """The requests for one model, from the agent's start on."""

    outcomes: Mapping[str, int]
    """All that there are, by name."""
    waiting: int
    """Requests that wait for the model now."""
    under_way: int
    """Requests that ask it now."""
    waits: SpreadCounts
    """Seconds that each waited to be let in."""
    first_pieces: SpreadCounts
    """Seconds from a request's arrival to the first piece of its stream."""
    servers_first_pieces: SpreadCounts
    """The same, from when it was let in."""
    durations: SpreadCounts
    """Seconds from arrival to end."""
    speeds: SpreadCounts
    """Tokens in a second, of each answer."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _Account:
    """One model's."""

    open: int = 0
    asking: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    waits: Spread = field(default_factory=Spread)
    first_pieces: Spread = field(default_factory=Spread)
    servers_first_pieces: Spread = field(default_factory=Spread)
    durations: Spread = field(default_factory=Spread)
    speeds: Spread = field(default_factory=lambda: Spread(SPEEDS))
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def taken(self) -> ModelTallies:
        return ModelTallies(
            {outcome.value: count for outcome, count in self.outcomes.items()},
            self.open - self.asking,
            self.asking,
            self.waits.taken(),
            self.first_pieces.taken(),
            self.servers_first_pieces.taken(),
            self.durations.taken(),
            self.speeds.taken(),
            self.prompt_tokens,
            self.completion_tokens,
        )


class Tally:
    """What becomes of one request. It begins as it asks for its model, and ends when nothing more comes of it."""

    __slots__ = (
        "_account", "_asked_at", "_came_at", "_first_at", "_head", "_is_broken", "_is_cut_off", "_is_stream",
        "_is_whole", "_last", "_let_in_at", "_model_id", "_request_id", "_status",
    )  # fmt: skip

    def __init__(self, model_id: str, account: _Account, came_at: float, is_cut_off: Callable[[], bool]) -> None:
        self._model_id = model_id
        self._account = account
        self._is_cut_off = is_cut_off
        self._request_id = REQUEST_ID.get()
        self._came_at = self._asked_at = came_at
        self._let_in_at: float | None = None
        self._first_at: float | None = None
        self._head = b""
        self._last: deque[bytes] = deque(maxlen=_PIECES)
        self._status: int | None = None
        self._is_stream = self._is_whole = self._is_broken = False

    def begin(self) -> None:
        """It asks for its model now."""
        self._account.open += 1
        self._asked_at = time.monotonic()

    def end(self, error: BaseException | None) -> None:
        """Count it, once; ``error`` is why there is no answer of the server's to it."""
        self._end(self._outcome(error))

    def let_in(self) -> None:
        """The model may be asked now."""
        self._let_in_at = time.monotonic()
        self._account.asking += 1

    def answered(self, status: int, *, is_stream: bool) -> None:
        """The server's answer has begun."""
        self._status = status
        self._is_stream = is_stream

    def keep(self, piece: bytes) -> None:
        """A piece of the answer is here. The last few are held on to, and not copied."""
        if self._first_at is None:
            self._first_at = time.monotonic()
            self._head = piece[:HEAD]
        self._last.append(piece)

    def whole(self) -> None:
        """The answer has gone through."""
        self._is_whole = True

    def broken(self) -> None:
        """The server broke off."""
        self._is_broken = True

    def _outcome(self, error: BaseException | None) -> Outcome:
        if error is None:
            status = self._status or 0
            if self._is_broken:
                return Outcome.BROKEN_OFF
            if not self._is_whole:
                return self._unfinished()
            if status >= _SERVERS_FAULT and status != _NOT_SUPPORTED:
                return Outcome.FAILED
            return Outcome.REFUSED if status >= _CLIENTS_FAULT else Outcome.ANSWERED
        if isinstance(error, (asyncio.CancelledError, ConnectionError)):
            return self._unfinished()
        if self._let_in_at is not None or not isinstance(error, MagiError):
            return Outcome.FAILED
        return Outcome.QUEUE_FULL if error.status == _TOO_MANY else Outcome.NOT_READY

    def _unfinished(self) -> Outcome:
        return Outcome.CUT_OFF if self._is_cut_off() else Outcome.ABANDONED

    def _end(self, outcome: Outcome) -> None:
        now, account = time.monotonic(), self._account
        waited = (now if self._let_in_at is None else self._let_in_at) - self._asked_at
        account.open -= 1
        account.outcomes[outcome] += 1
        account.waits.note(waited)
        account.durations.note(now - self._came_at)
        if self._let_in_at is not None:
            account.asking -= 1
            if self._first_at is not None and self._is_stream:
                account.first_pieces.note(self._first_at - self._came_at)
                account.servers_first_pieces.note(self._first_at - self._let_in_at)
        tail = b"".join(self._last)[-TAIL:]
        figures = AnswerFigures()
        if outcome is Outcome.ANSWERED:
            figures = answer_figures(self._head, tail, is_stream=self._is_stream)
            self._count(figures, now)
        level = logging.INFO if outcome in _IS_TROUBLE else logging.DEBUG
        if _LOG.isEnabledFor(level):
            self._log(level, outcome, figures, now - self._came_at, waited, answer_id(self._head, tail))

    def _count(self, figures: AnswerFigures, now: float) -> None:
        account, tokens = self._account, figures.completion_tokens or 0
        account.prompt_tokens += figures.prompt_tokens or 0
        account.completion_tokens += tokens
        # Of one token alone there is no speed; the first is there when the prompt is read.
        if tokens > 1 and figures.tokens_per_second:
            account.speeds.note(figures.tokens_per_second)
        elif tokens > 1 and self._is_stream and self._first_at is not None and now - self._first_at > _LEAST_SECONDS:
            account.speeds.note((tokens - 1) / (now - self._first_at))

    def _log(
        self, level: int, outcome: Outcome, figures: AnswerFigures, took: float, waited: float, name: str | None
    ) -> None:
        told = [f"{took:.3f} s, {waited:.3f} of them for its turn"]
        if figures.prompt_tokens is not None:
            told.append(f"{figures.prompt_tokens} tokens of prompt")
        if figures.completion_tokens is not None:
            told.append(f"{figures.completion_tokens} tokens of answer")
        # As the server writes them in its own log, which knows neither the request's id nor its answer's.
        if figures.prompt_ms is not None and figures.prompt_read is not None:
            told.append(f"prompt eval time {figures.prompt_ms:.2f} ms / {figures.prompt_read} tokens")
        if figures.completion_ms is not None and figures.completion_tokens is not None:
            told.append(f"eval time {figures.completion_ms:.2f} ms / {figures.completion_tokens} tokens")
        extra = {
            "magi_request_id": self._request_id,
            "magi_model": self._model_id,
            "magi_outcome": outcome.value,
            "magi_status": self._status,
            "magi_seconds": f"{took:.3f}",
            "magi_wait_seconds": f"{waited:.3f}",
            "magi_prompt_tokens": figures.prompt_tokens,
            "magi_completion_tokens": figures.completion_tokens,
            "magi_answer_id": name,
        }
        _LOG.log(level, "request to %s %s: %s", self._model_id, outcome.value, ", ".join(told), extra=extra)


class Tallies:
    """The tallies of all models."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._accounts: dict[str, _Account] = {}
        self._are_cut_off = False

    def cut_off(self) -> None:
        """Take what does not come to its end from now on for cut off by the agent, which stops."""
        self._are_cut_off = True

    def of(self, model_id: str, came_at: float, *, counts: bool = True) -> Tally:
        """One for a request that came at ``came_at`` (``time.monotonic``).

        What does not ask a model for anything, such as looks at its health, does not ``count``.
        """
        if not counts:
            return Tally(model_id, _Account(), came_at, self._is_cut_off)
        account = self._accounts.get(model_id)
        if account is None:
            self._forget_gone()
            account = self._accounts[model_id] = _Account()
        return Tally(model_id, account, came_at, self._is_cut_off)

    def refused(self, model_id: str, came_at: float, error: MagiError) -> None:
        """Count a request that was not even let wait."""
        tally = self.of(model_id, came_at)
        tally.begin()
        tally.end(error)

    def taken(self) -> dict[str, ModelTallies]:
        """Those of every model that was asked for and is still listed, by id."""
        self._forget_gone()
        return {model_id: account.taken() for model_id, account in sorted(self._accounts.items())}

    def _is_cut_off(self) -> bool:
        return self._are_cut_off

    def _forget_gone(self) -> None:
        for model_id in [each for each, account in self._accounts.items() if not account.open]:
            if model_id not in self._registry.models:
                del self._accounts[model_id]
