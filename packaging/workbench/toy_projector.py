"""Writes projectors by which a real llama-server shows images, or plays sounds, to a toy model (toy_model.py).

With random weights: what the model makes of an image or a sound means as little as all else that it says. An image
(LLaVA's kind, two blocks, 28 pixels a side, 100 KB) takes 4 tokens; a sound (Ultravox's kind, one block, 430 KB) takes
150 for each half minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy
from toy_model import WIDTH as MODEL_WIDTH

_WIDTH = 32
_FEED_FORWARD = 64
_HEADS = 2
_EPSILON = 1e-5
_IMAGE_BLOCKS = 2
_SIDE = 28
_PATCH = 14
_BINS = 80
_MOMENTS = 1500
"""That the encoder makes of half a minute."""
_STACKED = 10
"""Moments in one token."""
_MIDDLE = 64

Shape = tuple[int, ...]


def write_toy_eye(path: Path) -> Path:
    """Write a projector for images to `path` and return it; always the same bytes. Raises OSError."""
    writer = _writer(path, "vision", "mlp", _IMAGE_BLOCKS, {"image_size": _SIDE, "patch_size": _PATCH})
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    shapes: dict[str, Shape] = {
        "v.patch_embd.weight": (_WIDTH, 3, _PATCH, _PATCH),
        "v.class_embd": (_WIDTH,),
        "v.position_embd.weight": ((_SIDE // _PATCH) ** 2 + 1, _WIDTH),
        **_layer("v.pre_ln", _WIDTH),
        **_layer("mm.0", MODEL_WIDTH, _WIDTH),
        **_layer("mm.2", MODEL_WIDTH, MODEL_WIDTH),
    }
    for number in range(_IMAGE_BLOCKS):
        shapes |= _block(f"v.blk.{number}")
    return _written(writer, path, shapes)


def write_toy_ear(path: Path) -> Path:
    """Write a projector for sounds to `path` and return it; always the same bytes. Raises OSError."""
    writer = _writer(path, "audio", "ultravox", 1, {"num_mel_bins": _BINS, "projector.stack_factor": _STACKED})
    shapes: dict[str, Shape] = {
        "a.conv1d.1.weight": (_WIDTH, _BINS, 3),
        "a.conv1d.1.bias": (_WIDTH, 1),
        "a.conv1d.2.weight": (_WIDTH, _WIDTH, 3),
        "a.conv1d.2.bias": (_WIDTH, 1),
        "a.position_embd.weight": (_MOMENTS, _WIDTH),
        **_block("a.blk.0"),
        **_layer("a.post_ln", _WIDTH),
        "mm.a.norm_pre.weight": (_WIDTH * _STACKED,),
        "mm.a.mlp.1.weight": (2 * _MIDDLE, _WIDTH * _STACKED),
        "mm.a.norm_mid.weight": (_MIDDLE,),
        "mm.a.mlp.2.weight": (MODEL_WIDTH, _MIDDLE),
    }
    # Whisper's encoder has none.
    del shapes["a.blk.0.attn_k.bias"]
    return _written(writer, path, shapes)


def _writer(path: Path, sense: str, kind: str, blocks: int, numbers: Mapping[str, int]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_uint32("general.file_type", int(gguf.LlamaFileType.ALL_F32))
    writer.add_bool(f"clip.has_{sense}_encoder", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.use_gelu", True)
    sizes = {
        "embedding_length": _WIDTH,
        "feed_forward_length": _FEED_FORWARD,
        "projection_dim": MODEL_WIDTH,
        "block_count": blocks,
        "attention.head_count": _HEADS,
    }
    for key, number in (sizes | dict(numbers)).items():
        writer.add_uint32(f"clip.{sense}.{key}", number)
    writer.add_float32(f"clip.{sense}.attention.layer_norm_epsilon", _EPSILON)
    return writer


def _block(name: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
        shapes |= _layer(f"{name}.{part}", _WIDTH, _WIDTH)
    for part in ("ln1", "ln2"):
        shapes |= _layer(f"{name}.{part}", _WIDTH)
    return shapes | _layer(f"{name}.ffn_up", _FEED_FORWARD, _WIDTH) | _layer(f"{name}.ffn_down", _WIDTH, _FEED_FORWARD)


def _layer(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _written(writer: gguf.GGUFWriter, path: Path, shapes: Mapping[str, Shape]) -> Path:
    random = numpy.random.default_rng(1)
    for tensor, shape in shapes.items():
        # llama.cpp convolves with half precision alone.
        kind = numpy.float16 if tensor.startswith("a.conv1d") and tensor.endswith("weight") else numpy.float32
        writer.add_tensor(tensor, random.normal(0.0, 0.05, shape).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
