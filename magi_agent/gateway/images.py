"""Whether a request shows its model images, which only a server with a projector for them can see.

In the form of each API: ``image_url`` of OpenAI's chat, ``input_image`` of its responses, ``image`` of Anthropic's
messages; also in what a tool gave back. llama-server's own is ``multimodal_data`` beside the text of a prompt, in which
sound may be as well.
"""

import binascii
from collections.abc import Mapping
from typing import Any, Final

from magi_agent.gateway.model_field import taken_apart

_DATA: Final = "multimodal_data"
_WORDS: Final = (b"image", _DATA.encode())
"""What is in a body that has one; most have not, and are not taken apart for this."""
_TYPES: Final = frozenset({"image_url", "input_image", "image"})
_MESSAGES: Final = ("messages", "input", "prompt", "content")
_PARTS: Final = ("content", "output")
_BEGINNING: Final = 16
"""Letters of what is encoded, which are twelve bytes: they say what it is."""


def has_images(body: bytes) -> bool:
    """Whether a message of a JSON body holds an image. Takes a time that grows with the body.

    Raises ``UnreadableBody``.
    """
    if not any(word in body for word in _WORDS):
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
            if isinstance(data := part.get(_DATA), list) and any(_is_image(one) for one in data):
                return True
            parts += (part.get(name) for name in _PARTS)
    return False


def _is_image(encoded: Any) -> bool:
    """Whether a piece of data is to be seen: llama-server takes for an image what it does not know as sound."""
    if not isinstance(encoded, str):
        return False
    try:
        begins = binascii.a2b_base64(encoded[:_BEGINNING])
    except ValueError:
        # It says itself what it makes of that.
        return True
    is_wave = begins[:4] == b"RIFF" and begins[8:12] == b"WAVE"
    is_mp3 = begins[:3] == b"ID3" or (begins[:1] == b"\xff" and begins[1:2] > b"\xdf")
    return not (is_wave or is_mp3 or begins[:4] == b"fLaC")
