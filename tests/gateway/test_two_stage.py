"""Which requests are drafted first, and what each stage is asked."""

from __future__ import annotations

import json
from typing import Any

import locations
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.gateway.two_stage import (
    INSTRUCTION,
    DraftReader,
    draft_body,
    draft_event,
    refined_body,
    takes_draft,
    takes_two_stages,
)
from magi_agent.profiles.profile import TwoStage
from magi_agent.vocabulary import Tier

ASKED: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
FAST, BALANCED, POWERFUL = Tier.FAST, Tier.BALANCED, Tier.POWERFUL


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (FAST, BALANCED, (BALANCED, POWERFUL)),
        (FAST, POWERFUL, (BALANCED, POWERFUL)),
        (BALANCED, POWERFUL, (POWERFUL,)),
        *((tier, tier, ()) for tier in Tier),
        (BALANCED, FAST, ()),
        (POWERFUL, FAST, ()),
        (POWERFUL, BALANCED, ()),
    ],
)
def test_what_the_first_tier_is_good_enough_for_goes_there_alone(
    first: Tier, second: Tier, wanted: tuple[Tier, ...]
) -> None:
    assert tuple(tier for tier in Tier if takes_two_stages(TwoStage(True, first, second), tier)) == wanted
    assert not any(takes_two_stages(TwoStage(False, first, second), tier) for tier in Tier)


@pytest.mark.parametrize(
    ("more", "takes"),
    [
        ({}, True),
        (
            {"stream": True, "temperature": 0.2, "max_tokens": 5, "stop": ["x"], "seed": 1, "reasoning_effort": "high"},
            True,
        ),
        ({"tools": [], "functions": None, "logprobs": False, "n_probs": 0, "grammar": ""}, True),
        ({"n": 1, "n_cmpl": 1, "n_choices": None}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"response_format": None}, True),
        ({"tools": [{"type": "function"}]}, False),
        ({"functions": [{"name": "x"}]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, False),
        ({"response_format": "text"}, False),
        ({"json_schema": {"type": "object"}}, False),
        ({"grammar": "root ::= [a-z]"}, False),
        ({"n": 2}, False),
        ({"n_cmpl": 2}, False),
        ({"n_choices": 2}, False),
        ({"n": "2"}, False),
        ({"n": [1]}, False),
        ({"logprobs": True}, False),
        ({"top_logprobs": 3}, False),
        ({"n_probs": 3}, False),
        ({"continue_final_message": True}, False),
        ({"messages": []}, False),
        ({"messages": None}, False),
        ({"messages": "hi"}, False),
        ({"messages": {"role": "user"}}, False),
        ({"messages": ["hi"]}, False),
        ({"messages": [*ASKED["messages"], {"role": "assistant", "content": "He"}]}, False),
        ({"messages": [*ASKED["messages"], {"role": "tool", "content": "12"}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, True),
    ],
)
def test_a_request_that_a_draft_would_spoil_has_none(more: dict[str, Any], takes: bool) -> None:
    assert takes_draft({**ASKED, **more}) is takes


def test_the_instruction_is_documented() -> None:
    said = " ".join((locations.CHECKOUT / "docs" / "api.md").read_text(encoding="utf-8").replace("*", "").split())

    assert f'"{INSTRUCTION}"' in said


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, {"max_tokens": 500}),
        ({"max_tokens": 20}, {"max_tokens": 20}),
        ({"max_tokens": 2000}, {"max_tokens": 500}),
        ({"max_tokens": None}, {"max_tokens": 500}),
        ({"n_predict": -1}, {"max_tokens": 500, "n_predict": 500}),
        ({"max_tokens": 20, "n_predict": 3000}, {"max_tokens": 20, "n_predict": 20}),
        ({"max_completion_tokens": 30}, {"max_tokens": 30, "max_completion_tokens": 30}),
        ({"max_completion_tokens": "many"}, {"max_tokens": 500, "max_completion_tokens": 500}),
        ({"max_tokens": True}, {"max_tokens": 500}),
        ({"max_tokens": 1e400}, {"max_tokens": 500}),
    ],
)
def test_a_draft_keeps_to_its_budget_however_the_client_says_its_own(
    asked: dict[str, Any], sent: dict[str, Any]
) -> None:
    made = json.loads(draft_body(json.dumps({**ASKED, **asked}).encode(), "small", 500))

    assert {name: made[name] for name in made if name in ("max_tokens", "max_completion_tokens", "n_predict")} == sent


def test_a_draft_is_asked_for_as_the_client_asked_but_streamed_and_without_thinking() -> None:
    asked = {
        **ASKED, "temperature": 0.3, "seed": 2**63 + 5, "logit_bias": [[1, False]], "stream": False,
        "chat_template_kwargs": {"enable_thinking": True, "tone": "kind"},
    }  # fmt: skip

    made = json.loads(draft_body(json.dumps(asked).encode(), "small", 9))

    assert made == {
        **asked,
        "model": "small",
        "stream": True,
        "max_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": False, "tone": "kind"},
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"x","messages":[{"role":"user","content":"]"}]}',
        b' {"messages" : [ {"role":"user","content":"a\\"]"} ] \n , "n" : 1 , "stop":["]"] } ',
        b'{"messages":1,"metadata":{"messages":[]},"messages":[{"role":"user","content":["]"]}]}',
        '{"a":"ü","messages":[{"role":"user","content":"\\ud83d\\ude00ü"}],"seed":1.0e0}'.encode(),
    ],
)
def test_the_second_stages_body_is_the_clients_with_two_messages_more(body: bytes) -> None:
    draft = 'It "is"\n\u2028 so ] 😀'
    made = refined_body(body, draft)

    asked, sent = json.loads(body), json.loads(made)
    added = [{"role": "assistant", "content": draft}, {"role": "user", "content": INSTRUCTION}]
    assert sent == {**asked, "messages": [*asked["messages"], *added]}
    at = next(place for place in range(len(body)) if body[place] != made[place])
    assert made.endswith(body[at:])


def test_the_text_is_taken_out_of_a_stream_however_it_is_cut() -> None:
    said = b"".join([
        b": a comment\n\n",
        b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\n\n',
        b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n',
        'data: {"choices":[{"delta":{"content":"O\u00fc"}}]}\r\n\r\n'.encode(),
        b'data:{"choices":[{"delta":{"content":"ne\\n"}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":7}}]}\n\n',
        b'data: {"choices":[]}\n\ndata: {"choices":{}}\n\ndata: []\n\ndata: {"error":{"message":"x"}}\n\ndata: {\n\n',
        b"data: \xff\n\nnonsense\n\n",
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    ])  # fmt: skip

    for length in (1, 2, 7, 50, len(said)):
        reader = DraftReader()
        pieces = [reader.read(said[at : at + length]) for at in range(0, len(said), length)]
        assert "".join(pieces) == "O\u00fcne\n"


def test_a_line_without_an_end_is_held_to_a_bound() -> None:
    reader = DraftReader()
    for _ in range(100):
        assert reader.read(b"x" * 100_000) == ""
    assert len(reader._rest) <= 1 << 20
    assert reader.read(b'\ndata: {"choices":[{"delta":{"content":"a"}}]}\n') == "a"


@given(st.binary())
def test_whatever_a_server_says_is_read(said: bytes) -> None:
    assert isinstance(DraftReader().read(b"data: " + said + b"\n"), str)


@given(st.text())
def test_a_piece_of_the_draft_is_one_event(text: str) -> None:
    event = draft_event(text, "chatcmpl-1", 5, "large")

    assert event.count(b"\n") == 2
    assert event.endswith(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "choices": [{"finish_reason": None, "index": 0, "delta": {"reasoning_content": text}}],
        "created": 5,
        "id": "chatcmpl-1",
        "model": "large",
        "object": "chat.completion.chunk",
    }
