"""Writes a GGUF model of about 320 KB that a real llama-server loads and completes text with.

Its weights are random, so what it says means nothing; it says it in lower-case letters and never stops by itself, so
an answer has just as many tokens as were asked for. One block, 64 wide, a byte vocabulary, float32. Written with
llama.cpp's own `gguf` package, so that its header is what the reference writer makes of it.

    .venv/bin/python packaging/workbench/toy_model.py /tmp/toy.gguf --name "Toy 1B"
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy

WIDTH = 64
HEADS = 4
FEED_FORWARD = 128
CONTEXT_LENGTH = 512

_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = ["\u2581", "\u2581the", "\u2581a"]  # SentencePiece writes a space as U+2581
_SURE = 5.0

MetadataValue = str | bool | int | float


def write_toy_model(
    path: Path,
    *,
    name: str = "toy",
    architecture: str = "llama",
    chat_template: str | None = None,
    metadata: Mapping[str, MetadataValue] | None = None,
    context_length: int = CONTEXT_LENGTH,
    seed: int = 1,
) -> Path:
    """Write the model to `path` and return it; the same arguments give the same bytes.

    `metadata` adds or overrides keys of the header by their full names (`general.size_label`). A real llama-server
    loads it only with the architecture `llama`; other architectures are for reading the header. Raises OSError.
    """
    writer = gguf.GGUFWriter(path, architecture)
    keys: dict[str, MetadataValue] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType.ALL_F32),
        f"{architecture}.context_length": context_length,
        f"{architecture}.embedding_length": WIDTH,
        f"{architecture}.block_count": 1,
        f"{architecture}.feed_forward_length": FEED_FORWARD,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.dimension_count": WIDTH // HEADS,
    }
    if chat_template is not None:
        keys["tokenizer.chat_template"] = chat_template
    for key, value in (keys | dict(metadata or {})).items():
        _add(writer, key, value)
    add_vocabulary(writer)
    _add_tensors(writer, seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: MetadataValue) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def add_vocabulary(writer: gguf.GGUFWriter) -> int:
    """Add the toys' vocabulary to a header, and return how many tokens it has."""
    kinds = gguf.TokenType
    special = zip(_SPECIAL, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True)
    tokens = [*special, *((text, kinds.BYTE) for text in _BYTES), *((text, kinds.NORMAL) for text in _WORDS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0 if kind is not kinds.NORMAL else -1.0 for _, kind in tokens])
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)


def _add_tensors(writer: gguf.GGUFWriter, seed: int) -> None:
    random = numpy.random.default_rng(seed)
    vocabulary = len(_SPECIAL) + len(_BYTES) + len(_WORDS)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, WIDTH),
        "blk.0.ffn_up.weight": (FEED_FORWARD, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, FEED_FORWARD),
        **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
    }
    weights = {tensor: random.normal(0.0, 0.05, shape) for tensor, shape in shapes.items()}
    for tensor, shape in shapes.items():
        if len(shape) == 1:
            weights[tensor] = numpy.ones(shape)
    # The first feature is the same for every token and large; by it every token but the letters is ruled out. Random
    # bytes would be no valid UTF-8, which the server refuses to give out.
    weights["token_embd.weight"][:, 0] = _SURE
    weights["output.weight"][:, 0] = -_SURE
    first_letter = len(_SPECIAL) + ord("a")
    weights["output.weight"][first_letter : first_letter + 26, 0] = 0.0
    for tensor, values in weights.items():
        writer.add_tensor(tensor, values.astype(numpy.float32))


def main() -> None:
    """Write one model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--name", default="toy")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(write_toy_model(given.path, name=given.name, seed=given.seed))


if __name__ == "__main__":
    main()
