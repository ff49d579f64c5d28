"""A draft by one tier, refined by another: a profile's ``twoStage``. Which requests that helps, and what each is asked.

::

    the client's messages ──▶ first stage, within its budget ──▶ draft
    the client's messages + draft + INSTRUCTION ──▶ second stage ──▶ the answer

Pure functions over bodies and events. The client's own text passes as it came: two messages are put behind its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json, to_json

from magi_agent.gateway.model_field import place_of
from magi_agent.gateway.tiers import BY_SIZE
from magi_agent.profiles.profile import TwoStage
from magi_agent.registry.model import Model
from magi_agent.vocabulary import Tier

INSTRUCTION: Final = (
    "Your last message was a draft. Answer my question again, and better: keep what is right in the draft, correct "
    "what is wrong, add what is missing. Answer in the language of my question, with the answer alone: do not mention "
    "the draft or this message."
)
"""What the second stage is told behind the draft."""
_SPOILED: Final = (
    "tools", "functions", "json_schema", "grammar", "logprobs", "top_logprobs", "n_probs", "continue_final_message",
)  # fmt: skip
"""What an answer in two stages could not keep to, or would be asked of both."""
_HOW_MANY: Final = ("n", "n_cmpl", "n_choices")
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "n_predict")
"""llama-server heeds the last of these that is there."""
_LONGEST_LINE: Final = 1 << 20
"""Bytes of one event of a draft's stream; llama-server's have some hundred."""
_DATA: Final = b"data:"


@dataclass(frozen=True, slots=True)
class Drafter:
    """Who makes the draft."""

    model: Model
    max_tokens: int


def takes_two_stages(two_stage: TwoStage, wanted: Tier) -> bool:
    """Whether what is worth the tier ``wanted`` goes through both: the first is smaller than it and the second."""
    first = BY_SIZE.index(two_stage.stage1_tier)
    return two_stage.enabled and first < min(BY_SIZE.index(wanted), BY_SIZE.index(two_stage.stage2_tier))


def takes_draft(body: Mapping[str, Any]) -> bool:
    """Whether a chat's body asks for nothing that a draft would spoil: one answer in plain text to what a user said."""
    messages, form = body.get("messages"), body.get("response_format")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return (
        isinstance(last, Mapping)
        and last.get("role") == "user"
        and (not form or (isinstance(form, Mapping) and form.get("type") == "text"))
        and not any(body.get(name) for name in _SPOILED)
        and all(body.get(name) in (None, 1) for name in _HOW_MANY)
    )


def draft_body(body: bytes, model_id: str, max_tokens: int) -> bytes:
    """What the first stage is asked: the same, in short, streamed, and without thinking where that can be had."""
    asked: dict[str, Any] = from_json(body, cache_strings=False)
    limits = [asked[name] for name in _LIMITS if _is_limit(asked.get(name))]
    most = min([max_tokens, *limits])
    of_template = asked.get("chat_template_kwargs")
    changed: dict[str, Any] = {
        "model": model_id,
        "stream": True,
        "max_tokens": most,
        **{name: most for name in _LIMITS if name in asked},
        "chat_template_kwargs": {**(of_template if isinstance(of_template, dict) else {}), "enable_thinking": False},
    }
    return to_json(asked | changed)


def refined_body(body: bytes, draft: str) -> bytes:
    """What the second stage is asked: ``body``, with two messages behind those that it has, of which there are some."""
    end = body.rindex(b"]", *place_of(body, "messages"))
    added = to_json([{"role": "assistant", "content": draft}, {"role": "user", "content": INSTRUCTION}])
    return b"".join((body[:end], b",", added[1:-1], body[end:]))


def draft_event(text: str, answer_id: str, created: int, model_id: str) -> bytes:
    """A piece of the draft as the client gets it, where llama-server tells what a model thinks.

    No role: clients put together what several events say of it, and the answer's own says it.
    """
    choice = {"finish_reason": None, "index": 0, "delta": {"reasoning_content": text}}
    about = {"created": created, "id": answer_id, "model": model_id, "object": "chat.completion.chunk"}
    return b"data: %b\n\n" % to_json({"choices": [choice], **about})


class DraftReader:
    """Takes the text out of a draft's stream. What makes no sense is passed over."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, piece: bytes) -> str:
        """The text of the events that end in the next piece."""
        *lines, rest = (self._rest + piece).split(b"\n")
        self._rest = rest if len(rest) <= _LONGEST_LINE else b""
        return "".join(_text(line) for line in lines)


def _text(line: bytes) -> str:
    if not line.startswith(_DATA):
        return ""
    try:
        event = from_json(line[len(_DATA) :])
    except ValueError:
        return ""
    match event:
        case {"choices": [{"delta": {"content": str(text)}}, *_]}:
            return text
        case _:
            return ""


def _is_limit(value: object) -> bool:
    """Whether a number of tokens limits anything: -1 is for no limit."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
