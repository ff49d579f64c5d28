"""Chat templates: what they tell of a model, and that a hostile one costs no more than its length."""

import time

import pytest

from magi_agent.gguf.chat_template import thinking_mode
from magi_agent.vocabulary import ThinkingMode

NONE, OPTIONAL, ALWAYS = ThinkingMode.NONE, ThinkingMode.OPTIONAL, ThinkingMode.ALWAYS
TOLD = "<think>reason first</think>"
ASKED = "{% if add_generation_prompt %}"


@pytest.mark.parametrize(
    ("template", "mode"),
    [
        (TOLD, ALWAYS),
        ("{% if system %}" + TOLD + "{% endif %}", ALWAYS),
        ("{% if tools %}" + TOLD + "{% endif %}", NONE),
        ("{% if tools %}{% if system %}" + TOLD + "{% endif %}{% endif %}", NONE),
        ("{% if tools %}{% endif %}" + TOLD, ALWAYS),
        ("{% if tools %}{% elif system %}" + TOLD + "{% endif %}", ALWAYS),
        ("{% if system %}{% elif documents %}" + TOLD + "{% endif %}", NONE),
        ("{% macro ask() %}" + TOLD + "{% endmacro %}", NONE),
        (ASKED + "<think>{% endif %}", ALWAYS),
        (ASKED + "{% if system %}<think>{% endif %}{% endif %}", OPTIONAL),
        ("{% if system %}" + ASKED + "<think>{% endif %}{% endif %}", ALWAYS),
        ("{% if system %}{% elif add_generation_prompt %}<think>{% endif %}", ALWAYS),
        (ASKED + "{% else %}<think>{% endif %}", NONE),
    ],
)
def test_what_stands_under_a_condition_counts_by_the_condition(template, mode):
    assert thinking_mode(template) is mode


@pytest.mark.parametrize(
    ("condition", "written", "after"),
    [
        ("x" * 40_000, "<think>1</think>" * 2000, ""),
        ("p" * 200_000, "<think>{{ x }}" * 2000, ASKED + "{% endif %}"),
    ],
)
def test_a_condition_is_judged_once_however_much_stands_under_it(condition, written, after):
    def template(outside: str, inside: str) -> str:
        return f"{{# {outside} #}}{{% if {inside} %}}{written}{{% endif %}}{after}"

    assert seconds(template("", condition)) < 10 * seconds(template(condition, "x"))


def seconds(template: str) -> float:
    """The processor time of judging a template, the least of three."""
    times = []
    for _ in range(3):
        begin = time.thread_time()
        thinking_mode(template)
        times.append(time.thread_time() - begin)
    return min(times)
