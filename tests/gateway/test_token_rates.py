"""How many requests to models a token may make in a minute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.configuration import Configuration
from magi_agent.gateway.token_rates import RateLimitExceeded, TokenRates
from magi_agent.settings.loading import load_settings
from magi_agent.tokens import MAX_TOKENS, Token, Tokens, digest_of, line_of, new_secret
from magi_agent.vocabulary import TokenScope
from tests.api.client import Reply
from tests.api.conftest import Serve
from tests.gateway.test_gateway import ONE, openai_failure, started

SECRET, OTHER = new_secret(), new_secret()
LAPTOP = Token("laptop", TokenScope.INFER, digest_of(SECRET), rate=6)
FREE = Token("free", TokenScope.INFER, digest_of(OTHER))


class Clock:
    """A clock that is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def configuration() -> Configuration:
    configuration = Configuration(load_settings({}, {}))
    configuration.tokens = Tokens((LAPTOP, FREE))
    return configuration


@pytest.fixture
def rates(configuration: Configuration, clock: Clock) -> TokenRates:
    return TokenRates(configuration, clock)


def left(rates: TokenRates) -> str:
    headers: dict[str, str] = {}
    rates.count("laptop", headers)
    return headers["X-RateLimit-Remaining-Requests"]


def refused(rates: TokenRates) -> int | None:
    with pytest.raises(RateLimitExceeded) as error:
        rates.count("laptop", {})
    return error.value.retry_after


def test_as_many_as_the_rate_may_come_at_once_and_then_one_each_time_one_has_come_back(
    rates: TokenRates, clock: Clock
) -> None:
    assert [left(rates) for _ in range(6)] == ["5", "4", "3", "2", "1", "0"]
    assert refused(rates) == 10
    clock.now += 0.5
    assert refused(rates) == 10
    clock.now += 9.4
    assert refused(rates) == 1
    clock.now += 0.1
    assert left(rates) == "0"
    clock.now += 3600
    assert left(rates) == "5"


def test_after_the_seconds_that_are_told_it_is_let_through(rates: TokenRates, clock: Clock) -> None:
    for _ in range(6):
        left(rates)
    for _ in range(500):
        clock.now += refused(rates) or 0
        left(rates)


def test_a_reload_gives_a_token_that_stays_no_new_minute(rates: TokenRates, configuration: Configuration) -> None:
    for _ in range(6):
        left(rates)
    configuration.tokens = Tokens((replace(LAPTOP, rate=60), FREE))
    assert refused(rates) == 1

    configuration.tokens = Tokens((FREE,))
    rates.count("laptop", {})
    configuration.tokens = Tokens((LAPTOP,))
    assert left(rates) == "5"


def test_what_is_kept_is_bounded(rates: TokenRates, configuration: Configuration) -> None:
    for turn in range(5):
        names = [f"token-{turn}-{number}" for number in range(MAX_TOKENS)]
        configuration.tokens = Tokens(tuple(replace(LAPTOP, name=name) for name in names))
        for name in names:
            rates.count(name, {})

    assert len(rates._buckets) == MAX_TOKENS


async def test_too_many_requests_are_answered_as_openai_answers_them(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("".join(f"{line_of(each)}\n" for each in (LAPTOP, FREE)))
    (tmp_path / "tokens").chmod(0o640)
    api = await serve(ONE)
    await started(api)

    async def asked(secret: str, path: str = "/tokenize") -> Reply:
        body = {"model": ONE, "content": "a"}
        return await api.ask("POST", path, body, headers={"Authorization": f"Bearer {secret}"})

    paths = ["/tokenize", f"/api/proxy/{ONE}/tokenize", "/tokenize", "/tokenize", "/tokenize"]
    answers = [await asked(SECRET, path) for path in paths]
    wrong = await api.ask("POST", "/v1/completions", {"model": "no"}, headers={"Authorization": f"Bearer {SECRET}"})
    over = await asked(SECRET)
    free = await asked(OTHER)

    assert [answer.status for answer in answers] == [200] * 5
    assert answers[0].headers["x-ratelimit-limit-requests"] == "6"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "5"
    assert (wrong.status, wrong.headers["x-ratelimit-remaining-requests"]) == (404, "0")
    error = openai_failure(over, 429, "rate_limit_exceeded")
    assert error["type"] == "requests"
    assert 1 <= int(over.headers["Retry-After"]) <= 10
    assert over.headers["x-ratelimit-remaining-requests"] == "0"
    assert over.headers["x-ratelimit-reset-requests"].endswith("s")
    assert free.status == 200
    assert "x-ratelimit-limit-requests" not in free.headers
