"""Whether a request shows its model images, which only a server with a projector for them can see.

In the form of each API: ``image_url`` of OpenAI's chat, ``input_image`` of its responses, ``image`` of Anthropic's
messages; also in what a tool gave back.
"""

from collections.abc import Mapping
from typing import Final

from magi_agent.gateway.model_field import taken_apart

_WORD: Final = b"image"
"""What is in a body that has one; most have not, and are not taken apart for this."""
_TYPES: Final = frozenset({"image_url", "input_image", "image"})
_MESSAGES: Final = ("messages", "input")
_PARTS: Final = ("content", "output")


def has_images(body: bytes) -> bool:
    """Whether a message of a JSON body holds an image. Takes a time that grows with the body.

    Raises ``UnreadableBody``.
    """
    if _WORD not in body:
        return False
    document = taken_apart(body)
    parts = [document.get(name) for name in _MESSAGES]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            kind = part.get("type")
            if isinstance(kind, str) and kind in _TYPES:
                return True
            parts += (part.get(name) for name in _PARTS)
    return False
