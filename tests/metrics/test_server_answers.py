"""What servers answer on /metrics: hostile until it was looked at."""

from __future__ import annotations

import math
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from magi_agent.metrics.exposition import rendered
from magi_agent.metrics.forms import Form
from magi_agent.metrics.server_answers import (
    MOST_NAMES,
    MOST_SAMPLES,
    families_of,
    samples_of,
)
from magi_agent.metrics.server_samples import ServerSample, UnreadableAnswer
from tests.metrics.pictures import ANSWER


def one(name: str, kind: str, value: str = "1", labels: str = "") -> bytes:
    return f"# HELP {name} words\n# TYPE {name} {kind}\n{name}{labels} {value}\n".encode()


def text_of(**answers: bytes) -> str:
    return rendered(
        families_of({model: samples_of(said) for model, said in answers.items()}), Form.OPEN_METRICS
    ).decode()


def test_a_real_answer() -> None:
    found = {sample.name: (sample.kind, sample.value) for sample in samples_of(ANSWER)}

    assert found["llamacpp:tokens_predicted_total"] == ("counter", 8)
    assert found["llamacpp:predicted_tokens_seconds"] == ("gauge", 3127.79)
    assert found["llamacpp:n_tokens_max"] == ("unknown", 14), "it says that it is a counter, and is none"
    assert len(found) == 6


def test_each_server_has_its_model() -> None:
    assert text_of(b=one("llamacpp:x_total", "counter", "2"), a=one("llamacpp:x_total", "counter", "1")) == (
        "# HELP llamacpp:x words\n# TYPE llamacpp:x counter\n"
        'llamacpp:x_total{model="a"} 1.0\nllamacpp:x_total{model="b"} 2.0\n# EOF\n'
    )


@pytest.mark.parametrize(
    "answer",
    [
        one("magi_agent_ready", "gauge"),
        one("up", "gauge"),
        one("llamacpp", "gauge"),
        one("llamacpp:", "gauge"),
        one("llamacpp:a:b", "gauge"),
        one("llamacpp:" + "x" * 200, "gauge"),
        one("llamacpp:x", "gauge", "NaN"),
        one("llamacpp:x", "gauge", "+Inf"),
        one("llamacpp:x", "gauge", "9" * 400),
        one("llamacpp:x", "gauge", "1e999"),
        one("llamacpp:x_total", "counter", "-1"),
        one("llamacpp:x", "gauge", labels='{le="1"}'),
        one("llamacpp:x", "gauge", labels='{quantile="0.5"}'),
        one("llamacpp:x", "gauge", labels='{a="' + "y" * 200 + '"}'),
        one("llamacpp:x", "gauge", labels="{" + ",".join(f'l{number}="1"' for number in range(9)) + "}"),
        b'# TYPE llamacpp:x histogram\nllamacpp:x_bucket{le="1"} 1\nllamacpp:x_count 1\nllamacpp:x_sum 1\n',
        b"",
        b"\n\n# just words\n",
    ],
)
def test_what_is_left_out(answer: bytes) -> None:
    assert samples_of(answer) == ()
    assert [sample.name for sample in samples_of(answer + one("llamacpp:good", "gauge"))] == ["llamacpp:good"]


@pytest.mark.parametrize(
    "answer",
    [
        one("llamacpp:x", "gauge", "words"),
        one("llamacpp:x", "gauge", "1_000"),
        one("llamacpp:x", "gauge", "0x10"),
        one("llamacpp:x", "gauge", labels='{a="1",a="2"}'),
        one("llamacpp:x", "gauge", labels='{a="1'),
        one("llamacpp:x", "gauge", labels='{__name="1"}'),
        one("llamacpp:x", "whatever"),
        b"<html><body>Not here</body></html>",
        b'{"error": "no such path"}',
        b"\xff\xfe\x00",
        b"llamacpp:x",
    ],
)
def test_what_is_no_answer(answer: bytes) -> None:
    with pytest.raises(UnreadableAnswer, match="not in Prometheus's text form"):
        samples_of(answer)


def test_its_own_model_gives_way() -> None:
    text = text_of(toy=one("llamacpp:x", "gauge", labels='{model="other",slot="3"}'))

    assert 'llamacpp:x{model="toy",slot="3"} 1.0' in text
    assert "other" not in text


def test_a_figure_that_comes_twice_counts_once() -> None:
    twice = one("llamacpp:x", "gauge", "1", '{model="a"}') + one("llamacpp:x", "gauge", "2", '{model="b"}')

    assert text_of(toy=twice).count("llamacpp:x{") == 1


def test_words_cannot_become_lines() -> None:
    answer = (
        b"# HELP llamacpp:x one\\nmagi_agent_ready 1\r\x1b[31m\n# TYPE llamacpp:x gauge\n"
        b'llamacpp:x{a="1\\nmagi_agent_ready 1",b="\\"} 5"} 2\n'
    )
    text = text_of(toy=answer)

    assert [line.partition("{")[0].split()[0] for line in text.splitlines()] == ["#", "#", "llamacpp:x", "#"]
    assert "\x1b" not in text
    (family,) = read_openmetrics(text)
    assert family.samples[0].labels == {"a": "1?magi_agent_ready 1", "b": '"} 5', "model": "toy"}


def test_builds_that_do_not_agree() -> None:
    text = text_of(
        a=one("llamacpp:x_total", "counter"), b=one("llamacpp:x", "gauge"), c=one("llamacpp:y_total", "counter"),
        d=one("llamacpp:y_total", "gauge"),
    )  # fmt: skip

    assert re_types(text) == {"llamacpp:x": "gauge", "llamacpp:x_total": "unknown", "llamacpp:y_total": "unknown"}
    assert len(list(read_openmetrics(text))) == 3


def re_types(text: str) -> dict[str, str]:
    lines = (line.split() for line in text.splitlines() if line.startswith("# TYPE"))
    return {words[2]: words[3] for words in lines}


def test_no_more_than_so_many() -> None:
    many = "".join(f'llamacpp:x{{n="{number}"}} 1\n' for number in range(MOST_SAMPLES + 50)).encode()
    assert len(samples_of(many)) == MOST_SAMPLES

    names = {
        f"model{each}": [ServerSample(f"llamacpp:x{each}_{n}", "gauge", "", (), 1.0) for n in range(100)]
        for each in range(5)
    }
    assert len(families_of(names)) == MOST_NAMES


@pytest.mark.parametrize(
    "answer",
    [
        b"llamacpp:x 1\n" * 80_000,
        b"llamacpp:x{" + b",".join(b'a%d=""' % number for number in range(95_000)) + b"} 1",
        b'llamacpp:x{a="' + b'\\"' * 500_000,
        b"#" * (1 << 20),
        b"\n" * 10 + b"# HELP llamacpp:x " + b"\\" * 5000,
    ],
)
def test_reading_takes_no_longer_than_it_may(answer: bytes) -> None:
    began = time.thread_time()
    try:
        found = samples_of(answer)
    except UnreadableAnswer:
        found = ()
    assert time.thread_time() - began < 2
    assert len(found) <= MOST_SAMPLES


@given(st.lists(st.text(alphabet=string.printable, max_size=60), max_size=10).map("\n".join), st.booleans())
def test_whatever_it_says_what_comes_out_can_be_read(said: str, known: bool) -> None:
    answer = ("llamacpp:" if known else "").encode() + said.encode()
    try:
        samples = samples_of(answer)
    except UnreadableAnswer:
        return
    assert all(math.isfinite(sample.value) for sample in samples)
    for form in Form:
        rendered(families_of({"toy": samples}), form)
