"""How many requests to models the bearers of a token may make in a minute, where the token says so.

A token bucket (https://en.wikipedia.org/wiki/Token_bucket) for each such token: as many requests as the rate names may
come at once, and what was used comes back steadily. What is left is known by the token's name, so a reload gives
nobody a new minute. There are as many buckets as tokens at the most.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from magi_agent.configuration import Configuration
from magi_agent.errors import MagiError
from magi_agent.tokens import Tokens

_MINUTE: Final = 60.0
_ALMOST: Final = 1e-6
"""Of a request: what sums of seconds are wrong by."""


class RateLimitExceeded(MagiError):
    """The token's bearers made as many requests as they may."""

    error = "RateLimitExceeded"
    status = 429

    def __init__(self, name: str, rate: int, seconds: float) -> None:
        super().__init__(
            f"the token {name} may make {rate} requests in a minute, and has: ask again in {_duration(seconds)}",
            {"token": name, "requestsPerMinute": rate},
        )
        self.retry_after = max(1, math.ceil(seconds))


@dataclass(slots=True)
class _Bucket:
    left: float
    """Requests that may be made now."""
    at: float
    """When that was so, on the clock."""


class TokenRates:
    """Counts the requests of all tokens that are held to a rate."""

    def __init__(self, configuration: Configuration, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` counts seconds."""
        self._configuration = configuration
        self._clock = clock
        self._seen: Tokens | None = None
        self._rates: dict[str, int] = {}
        self._buckets: dict[str, _Bucket] = {}

    def count(self, name: str, headers: dict[str, str]) -> None:
        """Count one request by the token ``name``, and put into ``headers`` what its answer says of that.

        Raises ``RateLimitExceeded``; the headers are there then, too.
        """
        self._keep_up_with_tokens()
        rate = self._rates.get(name)
        if rate is None:
            return
        now = self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(rate, now))
        bucket.left = min(rate, bucket.left + (now - bucket.at) * rate / _MINUTE)
        bucket.at = now
        missing = 1 - bucket.left - _ALMOST
        if missing <= 0:
            bucket.left = max(0.0, bucket.left - 1)
        headers.update(_headers(rate, bucket.left))
        if missing > 0:
            raise RateLimitExceeded(name, rate, missing * _MINUTE / rate)

    def _keep_up_with_tokens(self) -> None:
        tokens = self._configuration.tokens
        if tokens is not self._seen:
            self._seen = tokens
            self._rates = {token.name: token.rate for token in tokens if token.rate is not None}
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in self._rates}


def _headers(rate: int, left: float) -> Mapping[str, str]:
    """What OpenAI says of a rate: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers."""
    return {
        "X-RateLimit-Limit-Requests": str(rate),
        "X-RateLimit-Remaining-Requests": str(int(left + _ALMOST)),
        "X-RateLimit-Reset-Requests": _duration((rate - left) * _MINUTE / rate),
    }


def _duration(seconds: float) -> str:
    """A time as OpenAI writes it: ``80ms``, ``12s``, ``1m0s``; rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
