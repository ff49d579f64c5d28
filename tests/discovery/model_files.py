"""Small GGUF files for tests of discovery: real headers, a few bytes of data, any name."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from magi_agent.discovery.facts import FileIdentity
from magi_agent.discovery.files import identity_of
from tests.gguf.builder import gguf, number_entry, tensor, text_entry

# Chat templates with what matters in those of publishers.
SWITCHED = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}{{ messages }}"
THINKS = "{{ messages }}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
ANALYSES = "<|start|>assistant<|channel|>analysis<|message|>{{ messages }}"
CHATS = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"

_AT_REST = 600.0


def model_bytes(
    architecture: str | None = "llama",
    *,
    template: str | None = None,
    texts: dict[str, str] | None = None,
    numbers: dict[str, int] | None = None,
    elements: int = 64,
    tensors: int = 1,
    name: str = "token_embd.weight",
    kind: int = 0,
) -> bytes:
    """A whole GGUF file with ``tensors`` tensors of ``elements`` elements of four bytes each (float32 by ``kind``)."""
    entries = [text_entry("general.architecture", architecture)] if architecture else []
    entries += [text_entry(key, value) for key, value in (texts or {}).items()]
    entries += [number_entry(key, value) for key, value in (numbers or {}).items()]
    if template is not None:
        entries.append(text_entry("tokenizer.chat_template", template))
    size = 4 * elements
    shapes = [tensor(f"{name}.{n}" if n else name, (elements,), kind, size * n) for n in range(tensors)]
    return gguf(entries, shapes, data=size * tensors)


def write_file(path: Path, content: bytes, *, age: float = _AT_REST) -> Path:
    """Write a file that nobody has touched for ``age`` seconds, so that one look at it is enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    rest(path, age=age)
    return path


def rest(path: Path, *, age: float = _AT_REST) -> None:
    moment = time.time() - age
    os.utime(path, (moment, moment))


def write_split(folder: Path, prefix: str, count: int, *, only: Sequence[int] | None = None) -> list[Path]:
    """The parts of one model as gguf-split makes them, or some of them."""
    paths = []
    for number in only or range(1, count + 1):
        content = model_bytes(
            "llama" if number == 1 else None,
            numbers={"split.no": number - 1, "split.count": count, "split.tensors.count": 2 * count},
            tensors=2,
            name=f"part{number}",
        )
        paths.append(write_file(folder / f"{prefix}-{number:05d}-of-{count:05d}.gguf", content))
    return paths


def identity(path: Path) -> FileIdentity:
    return identity_of(path.stat())
