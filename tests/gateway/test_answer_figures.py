"""What is read from the ends of an answer, and what is not: a server may say anything."""

from __future__ import annotations

import json
import time

import pytest

from magi_agent.gateway.answer_figures import HEAD, TAIL, AnswerFigures, answer_figures, answer_id

NOTHING = AnswerFigures()
TIMINGS = {
    "cache_n": 30,
    "prompt_n": 1,
    "prompt_ms": 7.5,
    "predicted_n": 5,
    "predicted_ms": 40.25,
    "predicted_per_second": 99.5,
}


def read(answer: bytes, *, is_stream: bool = False) -> AnswerFigures:
    return answer_figures(answer[:HEAD], answer[-TAIL:], is_stream=is_stream)


def as_json(**members: object) -> bytes:
    return json.dumps(members, separators=(",", ":")).encode()


def test_timings_stand_for_usage_where_there_is_none() -> None:
    assert read(as_json(content="x", timings=TIMINGS)) == AnswerFigures(31, 5, 1, 7.5, 40.25, 99.5)
    usage = {"completion_tokens": 6, "prompt_tokens": 40}
    assert read(as_json(usage=usage, timings=TIMINGS)) == AnswerFigures(40, 6, 1, 7.5, 40.25, 99.5)


@pytest.mark.parametrize(
    "text",
    ['"usage":{"completion_tokens":9}', '"timings":{"predicted_n":9}', '\\"usage":{"prompt_tokens":9}', "usage"],
)
def test_what_a_text_says_is_none_of_the_servers_numbers(text: str) -> None:
    for cut in range(40):
        assert answer_figures(as_json(content=text)[cut:], as_json(content=text)[cut:], is_stream=True) == NOTHING


@pytest.mark.parametrize(
    "number", ["-5", "1e9", "12345678901", "null", '"5"', "5.5.5", "[5]", "NaN", "9" * 5000, "5x", "0x5"]
)
def test_what_is_no_sane_number_is_not_read(number: str) -> None:
    assert read(b'{"usage":{"completion_tokens":' + number.encode() + b"}}") == NOTHING
    assert read(b'{"timings":{"predicted_ms":' + number.encode() + b"}}") == NOTHING


@pytest.mark.parametrize("answer", [b"", b"\xff" * 9000, b'"usage":' * 2000, b'"usage":{"prompt_tokens":', b"[]"])
def test_any_bytes_are_read_in_no_time(answer: bytes) -> None:
    began = time.perf_counter()
    assert read(answer) == NOTHING
    assert answer_id(answer[:HEAD], answer[-TAIL:]) is None
    assert time.perf_counter() - began < 0.05


def test_the_id_of_an_answer_is_a_word_of_sane_length() -> None:
    assert answer_id(b"", as_json(id="chatcmpl-YGLzbHcIbI1a6X")) == "chatcmpl-YGLzbHcIbI1a6X"
    assert answer_id(b'{"id":"chatcmpl-' + b"a" * 65 + b'"}', b'{"id":"resp_a\\nb12345678"}') is None
