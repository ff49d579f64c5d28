"""How many requests were answered, how, and how long that took. Bounded: by routes and statuses, not by paths."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

NO_ROUTE: Final = "none"
"""Stands for every path that is no route's."""
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER_METHOD: Final = "other"
ABORTED: Final = "aborted"
"""The status of a request that nobody waited for the answer to."""


class RequestKey(NamedTuple):
    """What is counted together."""

    method: str
    route: str
    status: str


@dataclass(slots=True)
class RequestCounts:
    """Counts from the agent's start on."""

    under_way: int = 0
    """Requests that are being answered."""
    _answered: dict[RequestKey, tuple[int, float]] = field(default_factory=dict)

    def ended(self, method: str, route: str, status: int | None, seconds: float) -> None:
        """Count a request that was under way, with the seconds it took.

        ``status`` is ``None`` for one that was broken off.
        """
        self.under_way -= 1
        key = RequestKey(
            method if method in _METHODS else _OTHER_METHOD, route, ABORTED if status is None else str(status)
        )
        count, total = self._answered.get(key, (0, 0.0))
        self._answered[key] = (count + 1, total + seconds)

    def taken(self) -> Mapping[RequestKey, tuple[int, float]]:
        """The number of requests and the seconds they took together, as of now."""
        return dict(self._answered)
