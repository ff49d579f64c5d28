"""Which run of a server is meant by the first digits of its id."""

from __future__ import annotations

from typing import Any

import pytest

from magi_agent.cli.exits import CommandError
from magi_agent.cli.runs import run_named

ONE, TWO, THREE = "abcd1111" + "0" * 24, "abcd1111e" + "0" * 23, "beef" * 8


class History:
    """In the client's place: what the agent would answer."""

    def __init__(self, *runs: str | None) -> None:
        self._events = [
            {"at": f"2026-01-02T03:04:{second:02}Z", "invocationId": run} for second, run in enumerate(runs)
        ]
        self.asked = 0

    def get(self, path: str, *_: str) -> dict[str, Any]:
        assert path == "/api/models/toy/history?limit=1000"
        self.asked += 1
        return {"events": self._events}


def named(word: str, *runs: str | None) -> str:
    return run_named(History(*runs), "toy", word)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "run"), [("beef", THREE), ("BEEFbe", THREE), (TWO[:9], TWO), (ONE[:9], ONE), (THREE[:31], THREE)]
)
def test_a_few_digits_are_enough_where_they_are_one_runs(word: str, run: str) -> None:
    assert named(word, ONE, ONE, None, TWO, THREE, THREE) == run


@pytest.mark.parametrize("word", ["current", "previous", "all", "last", "", "abcx", "a b", "0" * 32, "0" * 40])
def test_what_is_a_whole_id_or_none_is_left_to_the_agent(word: str) -> None:
    history = History(ONE)
    assert run_named(history, "toy", word) == word  # type: ignore[arg-type]
    assert history.asked == 0
    assert named("A" * 32) == "a" * 32


def test_of_several_the_newest_come_first_with_as_many_digits_as_tell_them_apart() -> None:
    with pytest.raises(CommandError, match="2 runs of toy have an id that begins with abcd") as refused:
        named("abcd", ONE, THREE, TWO, TWO)
    assert refused.value.kind == "RunAmbiguous"
    assert refused.value.details == {"run": "abcd", "candidates": [TWO, ONE]}
    assert f": {TWO[:9]} (2026-01-0" in refused.value.message
    assert f", {ONE[:9]} (2026-01-0" in refused.value.message
    assert "beef" not in refused.value.message


def test_of_an_unknown_one_the_last_runs_are_named_and_not_all() -> None:
    runs = [f"{number:032x}" for number in range(12)]
    with pytest.raises(CommandError, match="no run of toy has an id that begins with beef; ") as refused:
        named("beef", *runs)
    assert refused.value.kind == "RunNotFound"
    assert refused.value.details["candidates"] == runs[:1:-1]
    assert refused.value.message.endswith(", and 2 more: magictl history")
    with pytest.raises(CommandError, match="; the journal knows of none"):
        named("beef", None)


@pytest.mark.parametrize("word", ["a", "abc", "bee"])
def test_less_than_four_digits_are_no_name(word: str) -> None:
    with pytest.raises(CommandError, match="at least 4 digits are needed; these there are: ") as refused:
        named(word, ONE, THREE)
    assert refused.value.details["candidates"] == ([THREE] if word == "bee" else [ONE])
