"""Writes a LoRA adapter of a few kilobytes that a real llama-server applies to a toy model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
from toy_model import WIDTH

_RANK = 2


def write_toy_adapter(path: Path) -> Path:
    """Write an adapter for the attention of the toy model's one block, and return its path."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(_RANK))
    random = numpy.random.default_rng(1)
    for part, shape in (("lora_a", (_RANK, WIDTH)), ("lora_b", (WIDTH, _RANK))):
        weights = random.normal(0.0, 0.05, shape).astype(numpy.float32)
        writer.add_tensor(f"blk.0.attn_q.weight.{part}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
