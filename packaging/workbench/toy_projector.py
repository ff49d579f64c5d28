"""Writes a projector of about 100 KB by which a real llama-server shows images to a toy model (toy_model.py).

LLaVA's kind: two blocks, 32 wide, with random weights, for pictures of 28 pixels a side. What the model makes of an
image means as little as all else that it says, and it takes 4 tokens.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
from toy_model import WIDTH as MODEL_WIDTH

_WIDTH = 32
_FEED_FORWARD = 64
_BLOCKS = 2
_SIDE = 28
_PATCH = 14


def write_toy_projector(path: Path) -> Path:
    """Write the projector to `path` and return it; always the same bytes. Raises OSError."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_uint32("general.file_type", int(gguf.LlamaFileType.ALL_F32))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "embedding_length": _WIDTH,
        "feed_forward_length": _FEED_FORWARD,
        "projection_dim": MODEL_WIDTH,
        "block_count": _BLOCKS,
        "attention.head_count": 2,
    }
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    random = numpy.random.default_rng(1)
    for tensor, shape in _shapes().items():
        writer.add_tensor(tensor, random.normal(0.0, 0.05, shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "v.class_embd": (_WIDTH,),
        "v.position_embd.weight": ((_SIDE // _PATCH) ** 2 + 1, _WIDTH),
        **_layer("v.pre_ln", _WIDTH),
        **_layer("mm.0", MODEL_WIDTH, _WIDTH),
        **_layer("mm.2", MODEL_WIDTH, MODEL_WIDTH),
    }
    for block in (f"v.blk.{number}" for number in range(_BLOCKS)):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= _layer(f"{block}.{part}", _WIDTH, _WIDTH)
        for part in ("ln1", "ln2"):
            shapes |= _layer(f"{block}.{part}", _WIDTH)
        shapes |= _layer(f"{block}.ffn_up", _FEED_FORWARD, _WIDTH)
        shapes |= _layer(f"{block}.ffn_down", _WIDTH, _FEED_FORWARD)
    return shapes


def _layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
