"""What a model has to sense for a request: images to be seen, sound to be heard, by a server with a projector for it.

In the form of each API: ``image_url`` and ``input_audio`` of OpenAI's chat, ``input_image`` of its responses, ``image``
of Anthropic's messages; also in what a tool gave back. llama-server's own is ``multimodal_data`` beside the text of a
prompt, which is sound or an image. What is to be written down is heard, whatever its form says.
"""

import binascii
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from magi_agent.gateway.model_field import taken_apart


class Sense(StrEnum):
    """What a projector gives a model, by its word among ``capabilities``."""

    VISION = "vision"
    AUDIO = "audio"


NOTHING: Final = frozenset[Sense]()
"""What most requests need."""
_DATA: Final = "multimodal_data"
_WORDS: Final = (b"image", b"input_audio", _DATA.encode())
"""One of these is in a body that needs a sense; most have none, and are not taken apart for this."""
_TYPES: Final = {
    "image_url": Sense.VISION,
    "input_image": Sense.VISION,
    "image": Sense.VISION,
    "input_audio": Sense.AUDIO,
}
_MESSAGES: Final = ("messages", "input", "prompt", "content")
_PARTS: Final = ("content", "output")
_BEGINNING: Final = 16
"""Letters of what is encoded, which are twelve bytes: they say what it is."""
_HEARING_PATH: Final = "/v1/audio/transcriptions"
_WITH: Final = {Sense.VISION: "sees the images", Sense.AUDIO: "hears the audio"}


def needed(path: str, body: bytes) -> frozenset[Sense]:
    """What a request to a path needs. Takes a time that grows with the body. Raises ``UnreadableBody``."""
    if path == _HEARING_PATH:
        return frozenset({Sense.AUDIO})
    return _of_messages(taken_apart(body)) if any(word in body for word in _WORDS) else NOTHING


def said(senses: frozenset[Sense]) -> str:
    """The words for a model that has to have these, such as ``sees the images and hears the audio``."""
    return " and ".join(words for sense, words in _WITH.items() if sense in senses)


def _of_messages(document: Mapping[str, object]) -> frozenset[Sense]:
    found: set[Sense] = set()
    parts: list[object] = [document.get(name) for name in _MESSAGES]
    while parts and len(found) < len(Sense):
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, Mapping):
            kind = part.get("type")
            if isinstance(kind, str) and kind in _TYPES:
                found.add(_TYPES[kind])
                continue
            if isinstance(data := part.get(_DATA), list):
                found.update(_sense_of(one) for one in data if isinstance(one, str))
            parts += (part.get(name) for name in _PARTS)
    return frozenset(found)


def _sense_of(encoded: str) -> Sense:
    """What a piece of data is for: llama-server takes for an image what it does not know as sound."""
    try:
        begins = binascii.a2b_base64(encoded[:_BEGINNING])
    except ValueError:
        # It says itself what it makes of that.
        return Sense.VISION
    is_wave = begins[:4] == b"RIFF" and begins[8:12] == b"WAVE"
    is_mp3 = begins[:3] == b"ID3" or (begins[:1] == b"\xff" and begins[1:2] > b"\xdf")
    return Sense.AUDIO if is_wave or is_mp3 or begins[:4] == b"fLaC" else Sense.VISION
