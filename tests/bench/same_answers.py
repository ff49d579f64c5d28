"""Whether several ways to one model lead to the same answers, byte for byte.

Two answers to one question are never the same altogether: each has an id, and says when it was made and how long that
took. These values are set aside, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tests.bench.asking import Asker, Said, question

_OWN = re.compile(rb'"(id|created|\w+_ms|\w+_per_second)":(?:"[^"]*"|[-+.\de]+)')
_TALK = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 24, "temperature": 0}


def questions(model_id: str) -> dict[str, bytes]:
    """What is asked, by what it is for. Each is asked alone, and of no cache, so that a model says the same again."""
    talk = {"model": model_id, "cache_prompt": False, **_TALK}
    return {
        "tokens": question("/tokenize", {"model": model_id, "content": "some text" * 200, "with_pieces": True}),
        "talk": question("/v1/chat/completions", talk),
        "streamed": question("/v1/chat/completions", {**talk, "stream": True}),
        "refused": question("/v1/chat/completions", {"model": model_id, "messages": 1}),
    }


async def differing(ports: Mapping[str, int], model_id: str) -> list[str]:
    """Ask at each port, and name what was not answered alike: ``question: side``. The first port is what counts."""
    answers: dict[str, dict[str, Said]] = {}
    for side, port in ports.items():
        asker = Asker(port)
        answers[side] = {what: await asker.ask(request) for what, request in questions(model_id).items()}
        asker.close()
    first, *others = answers
    return [
        f"{what}: {side}"
        for side in others
        for what, said in answers[side].items()
        if told(said) != told(answers[first][what])
    ]


def told(said: Said) -> tuple[int, bytes, bytes]:
    """What two answers to one question have to have in common."""
    return said.status, said.content_type, _OWN.sub(rb'"\1":0', said.body)
