"""Writes as many small GGUF files as are asked for, named and described as published models are."""

from __future__ import annotations

import itertools
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
MAX_MODELS = len(_ARCHITECTURES) * len(_SIZES) * len(_TUNES) * len(_FILE_TYPES)


def write_models(folder: Path, count: int) -> None:
    """Write `count` models, at most MAX_MODELS, each below `folder` in a folder of its family. Raises OSError."""
    described = itertools.product(_ARCHITECTURES.items(), _SIZES, _TUNES, _FILE_TYPES)
    for (family, architecture), size, tune, file_type in itertools.islice(described, count):
        quantization = file_type.removeprefix("MOSTLY_")
        below = folder / family
        below.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(below / f"{family}-{size}-{tune}-{quantization}.gguf", architecture)
        writer.add_type("model")
        writer.add_name(f"{family} {size} {tune}")
        writer.add_size_label(size)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_context_length(32768)
        writer.add_block_count(32)
        if tune == "Instruct":
            writer.add_chat_template(_TEMPLATE)
        writer.add_tensor("token_embd.weight", numpy.ones((4, 32), dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
