"""Writes as many GGUF files as are asked for, named and described as published models are.

With a vocabulary each has the header of a real model and, as ever, next to no weights.
"""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path

import gguf
import numpy

_TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
_ARCHITECTURES = {
    "Llama-3.1": "llama",
    "Llama-3.2": "llama",
    "Qwen2.5": "qwen2",
    "Qwen2.5-Coder": "qwen2",
    "Qwen3": "qwen3",
    "gemma-2": "gemma2",
    "gemma-3": "gemma3",
    "Mistral-Small-3.2": "llama",
    "Phi-4": "phi3",
    "DeepSeek-R1-Distill-Qwen": "qwen2",
    "granite-3.3": "granite",
    "SmolLM2": "llama",
}
_SIZES = ("0.5B", "1B", "3B", "4B", "7B", "8B", "14B", "32B", "70B")
_TUNES = ("Base", "Instruct")
_FILE_TYPES = ("MOSTLY_Q3_K_M", "MOSTLY_Q4_0", "MOSTLY_Q4_K_M", "MOSTLY_Q5_K_M", "MOSTLY_Q6_K", "MOSTLY_Q8_0")
_RELEASES = ("", "-v0.1", "-v0.2", "-v0.3", "-v0.4", "-v0.5", "-v0.6", "-v0.7")
MAX_MODELS = len(_RELEASES) * len(_ARCHITECTURES) * len(_SIZES) * len(_TUNES) * len(_FILE_TYPES)

# Where the number of metadata entries stands, and how a string and an array are laid out (ggml's docs/gguf.md).
_ENTRIES_AT = 16
_ENTRIES = struct.Struct("<Q")
_STRING_LENGTH = struct.Struct("<Q")
_ARRAY = struct.Struct("<IIQ")


def write_models(folder: Path, count: int, vocabulary_size: int = 0) -> None:
    """Write `count` models, at most MAX_MODELS, each below `folder` in a folder of its family and size.

    With a `vocabulary_size` each gets as many tokens, with scores and types. Raises OSError.
    """
    entries = _vocabulary(vocabulary_size) if vocabulary_size else []
    described = itertools.product(_RELEASES, _ARCHITECTURES.items(), _SIZES, _TUNES, _FILE_TYPES)
    for release, (family, architecture), size, tune, file_type in itertools.islice(described, count):
        quantization = file_type.removeprefix("MOSTLY_")
        below = folder / family / size
        below.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(below / f"{family}-{size}-{tune}{release}-{quantization}.gguf", architecture)
        writer.add_type("model")
        writer.add_name(f"{family} {size} {tune}{release}")
        writer.add_size_label(size)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_context_length(32768)
        writer.add_block_count(32)
        if tune == "Instruct":
            writer.add_chat_template(_TEMPLATE)
        writer.add_tensor("token_embd.weight", numpy.ones((4, 32), dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        _append(writer, entries)
        writer.write_tensors_to_file()
        writer.close()


def _vocabulary(size: int) -> list[bytes]:
    """Return the metadata of a vocabulary, entry by entry, as it stands in a file."""
    tokens = [f"\N{LOWER ONE EIGHTH BLOCK}{number:x}".encode() for number in range(size)]
    return [
        _array("tokenizer.ggml.tokens", gguf.GGUFValueType.STRING, [_string(token) for token in tokens]),
        _array(
            "tokenizer.ggml.scores", gguf.GGUFValueType.FLOAT32, [struct.pack("<f", -score) for score in range(size)]
        ),
        _array("tokenizer.ggml.token_type", gguf.GGUFValueType.INT32, [struct.pack("<i", 1)] * size),
    ]


def _array(key: str, element_type: gguf.GGUFValueType, elements: list[bytes]) -> bytes:
    return (
        _string(key.encode()) + _ARRAY.pack(gguf.GGUFValueType.ARRAY, element_type, len(elements)) + b"".join(elements)
    )


def _string(text: bytes) -> bytes:
    return _STRING_LENGTH.pack(len(text)) + text


def _append(writer: gguf.GGUFWriter, entries: list[bytes]) -> None:
    """Add metadata behind the writer's own: written once for all, where the writer takes 0.1 s a vocabulary."""
    assert writer.fout is not None
    (file,) = writer.fout
    file.writelines(entries)
    file.seek(_ENTRIES_AT)
    file.write(_ENTRIES.pack(len(writer.kv_data[0]) + len(entries)))
    file.seek(0, os.SEEK_END)
