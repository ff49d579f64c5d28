"""Which tier a request is for, by how hard it is."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.gateway.complexity import HIGHEST, complexity, question_of
from magi_agent.profiles.profile import DEFAULT_TIERS

PARAGRAPH = "The river rose for three days, and on the fourth the bridge at the mill was gone. Nobody was hurt. " * 4
LOOP = "```python\nfor i in range(10):\n    print(i)\n```\n"
LARGE = "```python\n" + "def act(x: int) -> int:\n    return x + 1\n\n" * 100 + "```\n"


def said(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **more}


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("fast", said(text))
        for text in (
            "hi",
            "What is the capital of France?",
            "Thanks!",
            "Translate 'good morning' to German.",
            "What is 17 * 23?",
            "Who wrote Hamlet?",
            "Say yes or no: is water wet?",
            "Wie heißt die Hauptstadt von Frankreich?",
            "Quelle heure est-il à Tokyo ?",
            "法国的首都是哪里？",  # noqa: RUF001
            "フランスの首都はどこですか？",  # noqa: RUF001
            "Tell me a joke about cats.",
        )
    ),
    ("fast", said("hi", tools=[{"type": "function"}])),
    ("fast", said("What is in this picture?", max_tokens=200)),
    ("fast", {"prompt": "Once upon a time", "max_tokens": 4}),
    ("fast", {"input": "Who wrote Faust?"}),
    ("fast", {"system": "Be brief.", "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}),
    ("balanced", said(f"Summarise this paragraph:\n\n{PARAGRAPH}")),
    ("balanced", said(f"Fasse zusammen:\n\n{PARAGRAPH}")),
    ("balanced", {"prompt": PARAGRAPH}),
    ("balanced", {"prompt": {"prompt_string": PARAGRAPH, "multimodal_data": ["A" * 1000]}}),
    ("balanced", {"prompt": [{"prompt_string": PARAGRAPH}, {"prompt_string": PARAGRAPH}]}),
    ("balanced", {"prompt": ["once", {"prompt_string": PARAGRAPH}]}),
    ("balanced", said(f"What does this print?\n{LOOP}")),
    ("balanced", said("Write a Python function that reverses a list.")),
    ("balanced", said("Écris une fonction Python qui inverse une liste, avec un exemple de son usage.")),
    ("balanced", said("Write a regex for ISO dates, and say how it works.")),
    ("balanced", said("Compare tea and coffee for somebody who sleeps badly.")),
    (
        "balanced",
        said("Extract name and age: Ann is 5.", tools=[{}], response_format={"type": "json_schema"}, max_tokens=4000),
    ),
    ("balanced", said("Plan my day:\n- shopping\n- gym\n- call mum\n- cook\n- read the paper before it is old")),
    ("balanced", said("What is the capital of France?", reasoning_effort="medium", max_tokens=4000)),
    ("powerful", said("Prove step by step that √2 is irrational.")),
    ("powerful", said("Beweise Schritt für Schritt, dass √2 irrational ist.")),
    ("powerful", said("Démontre étape par étape que √2 est irrationnel.")),
    ("powerful", said("请逐步证明 √2 是无理数。")),
    (
        "powerful",
        said(
            "Design the architecture of a chat service for a million users. Compare the trade-offs of three stores:\n"
            "1. how they scale\n2. what they cost\n3. how they fail\n4. who runs them"
        ),
    ),
    ("powerful", said(f"Refactor this and explain each change:\n{LARGE}")),
    ("powerful", said(f"Debug this program, step by step:\n{LARGE}")),
    ("powerful", said("Derive the closed form of \\sum_{k=1}^n k^2 step by step.")),
    (
        "powerful",
        said(
            "Implement a B-tree in Rust with insertion and deletion, analyse its complexity, and write tests for both: "
            "an empty tree, a tree of one key, and one of a million keys. Say why each step is right."
        ),
    ),
    ("powerful", said("Write a Python function for this, and prove it right.", reasoning_effort="high")),
]


@pytest.mark.parametrize(("tier", "body"), REQUESTS, ids=range(len(REQUESTS)))
def test_a_request_is_for_the_tier_that_a_person_would_choose(tier: str, body: dict[str, Any]) -> None:
    found = complexity(question_of(body))

    assert next(each.name for each in DEFAULT_TIERS if found.score <= each.max_score) == tier, found


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type", "messages", "effort", "format"]), inner)
    ),
)
names = st.sampled_from(
    [
        "messages",
        "input",
        "prompt",
        "system",
        "tools",
        "response_format",
        "max_tokens",
        "reasoning",
        "text",
    ]
)


@given(st.dictionaries(names, json_values))
def test_any_body_has_a_score(body: dict[str, Any]) -> None:
    found = complexity(question_of(body))

    assert 0 <= found.score <= HIGHEST
    assert found == complexity(question_of(body))


@pytest.mark.parametrize("piece", ["```", "- ", "?", "\n", " ", "\\frac", "a", "1. ", "step", "数", "\t-", "def "])
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()

    complexity(question_of(said(piece * (5_000_000 // len(piece)))))

    assert time.process_time() - began < 1


def test_what_is_many_and_deep_takes_no_long_either() -> None:
    deep: list[Any] = ["a"]
    for _ in range(500):
        deep = [deep]
    began = time.process_time()

    complexity(question_of({"messages": [{"role": "user", "content": [{"text": deep}] * 100_000}] * 1000}))

    assert time.process_time() - began < 10
