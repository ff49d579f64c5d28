"""Headers as no converter writes them: damaged byte by byte, and made up with lies in every length, type and count.

How many are tried, and from which seed, is for the environment to say (``make fuzz`` does): ``FUZZ_CASES`` headers,
from ``FUZZ_SEED``. One case is made from the seed and its number alone, so that it can be had again.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

from tests.gguf.builder import (
    ARRAY,
    BOOL,
    STRING,
    UINT8,
    UINT32,
    array_entry,
    entry,
    gguf,
    number_entry,
    string,
    tensor,
    text_entry,
)

TELLING = [0, 1, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]

MODEL = gguf(
    [
        text_entry("general.architecture", "qwen3moe"),
        text_entry("general.name", "Some Name"),
        number_entry("general.file_type", 15),
        number_entry("general.alignment", 64),
        array_entry("general.tags", STRING, 3, string("a") + string("bc") + string("")),
        number_entry("qwen3moe.context_length", 32768),
        number_entry("qwen3moe.expert_count", 8),
        number_entry("qwen3moe.expert_used_count", 2),
        array_entry("qwen3moe.attention.head_count_kv", UINT32, 4, struct.pack("<4I", 8, 8, 0, 4)),
        array_entry("qwen3moe.attention.sliding_window_pattern", BOOL, 4, b"\1\0\1\0"),
        array_entry("tokenizer.ggml.tokens", STRING, 70, b"".join(string(f"token{n}") for n in range(70))),
        array_entry("tokenizer.ggml.token_type", UINT8, 1100, bytes(1100)),
        text_entry("tokenizer.chat_template", "{% if enable_thinking is defined %}<think>{% endif %}{{ tools }}"),
        entry("clip.has_vision_encoder", BOOL, b"\1"),
    ],
    [
        tensor("token_embd.weight", (256, 70), kind=12, offset=0),
        tensor("blk.0.ffn_gate_exps.weight", (256, 2, 8), kind=14, offset=10112),
        tensor("output.weight", (64,), kind=0, offset=13504),
    ],
    data=20_000,
    alignment=64,
)
HEADER_END = MODEL.index(b"output.weight") + len("output.weight") + 24

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
_ARCHITECTURES = [b"llama", b"qwen3", b"bert", b"gpt-oss", b"clip", b"flux", b"", b"x" * 300, b"a.b\0", b"\xff\xfe"]
_TEXTS = [
    b"Qwen3 30B A3B Instruct 2507",
    b"DeepSeek-R1-Distill-Qwen-7B",
    b"bge-reranker-v2-m3",
    b"8x7B",
    b"256x99999T",
    b"9999.999T",
    b"0B",
    b"v3.99",
    b"-" * 4000 + b"7b",
    b"a1" * 20_000,
    b"\0\x1b[31m\x7f\r\n",
    "日本語 7B \N{RIGHT-TO-LEFT OVERRIDE}".encode(),
    b"\xff\xfe\xed\xa0\x80",
    b"../../etc/passwd",
    b"",
]
_TEMPLATES = [
    b"{% if enable_thinking %}<think>{% endif %}",
    b"{% if a %}" * 500 + b"<think>",
    b"{{" * 3000,
    b"{%" * 3000 + b"%}",
    b"'" * 5000 + b"{{ '" + b"\\" * 4999,
    b"<think>" * 2000 + b"</think>" * 2000,
    b"{# " * 1000,
    b"[THINK]a" * 3000,
    b"\xff" * 1000,
]
_TEXT_KEYS = [b"general." + key for key in (b"name", b"basename", b"finetune", b"version", b"size_label", b"type")]
_NUMBER_KEYS = [b"general.file_type", b"general.alignment", b"split.no", b"split.count", b"split.tensors.count"]
_ARCHITECTURE_KEYS = [
    b"context_length", b"embedding_length", b"block_count", b"pooling_type", b"expert_count", b"expert_used_count",
    b"attention.head_count", b"attention.head_count_kv", b"attention.sliding_window_pattern", b"vocab_size",
    b"classifier.output_labels",
]  # fmt: skip
_ARRAY_KEYS = [b"general.tags", b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores"]
_TENSOR_NAMES = [b"token_embd.weight", b"blk.0.ffn_gate_exps.weight", b"cls.output.weight", b"", b"\xff", b"n" * 200]


def fuzz_seed() -> str:
    """The seed of this run: always the same one, unless the environment gives another."""
    return os.environ.get("FUZZ_SEED") or "20"


def fuzz_cases(usual: int) -> int:
    """How many headers to try: ``usual``, unless the environment says otherwise."""
    return int(os.environ.get("FUZZ_CASES") or usual)


def damaged_header(seed: str, number: int) -> bytes:
    """One case: a header damaged or made up, now and then both, and now and then cut."""
    random_ = random.Random(f"{seed}:{number}")
    content = bytearray(MODEL) if random_.random() < 0.4 else bytearray(Liar(random_).header())
    if random_.random() < 0.5:
        _damage(content, random_)
    if random_.random() < 0.1:
        del content[random_.randrange(len(content) + 1) :]
    return bytes(content)


def _damage(content: bytearray, random_: random.Random) -> None:
    for _ in range(random_.choice([1, 1, 1, 2, 5, 20])):
        if len(content) < 100:
            return
        at = random_.randrange(min(HEADER_END, len(content) - 8))
        match random_.randrange(7):
            case 0:
                content[at] ^= 1 << random_.randrange(8)
            case 1:
                content[at : at + 8] = struct.pack("<Q", random_.choice(TELLING))
            case 2:
                content[at : at + 4] = struct.pack("<I", random_.choice(TELLING) & 0xFFFFFFFF)
            case 3:
                del content[at : at + random_.randrange(1, 64)]
            case 4:
                content[at:at] = random_.randbytes(random_.randrange(1, 64))
            case 5:
                length = random_.randrange(1, 200)
                content[at : at + length] = bytes(length)
            case _:
                other = random_.randrange(HEADER_END)
                content[at : at + 32] = MODEL[other : other + 32]


class Liar:
    """Writes one header that has the format's form, with lies here and there: none, a few, or many."""

    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self._chance = random_.choice([0.0, 0.0, 0.002, 0.01, 0.1])

    def header(self) -> bytes:
        random_ = self._random
        architecture = random_.choice(_ARCHITECTURES[: 5 if self._chance < 0.05 else None])
        entries = [] if self._lies() else [self._entry(b"general.architecture", STRING, architecture)]
        entries += list(self._entries(architecture))
        if self._lies():
            entries.append(random_.choice(entries or [b""]))  # a key twice
        tensors = list(self._tensors())
        counts = (self._number(3) & 0xFFFFFFFF, self._number(len(tensors)), self._number(len(entries)))
        magic = b"GGUF" if not self._lies() else random_.choice([b"GGML", b"FUGG", b"\0\0\0\0"])
        header = magic + struct.pack("<IQQ", *counts) + b"".join(entries) + b"".join(tensors)
        return header + bytes(random_.choice([0, 31, 4096, 20_000]))

    def _entries(self, architecture: bytes) -> Iterator[bytes]:
        random_ = self._random
        keys = [
            *_TEXT_KEYS,
            *_NUMBER_KEYS,
            *_ARRAY_KEYS,
            b"tokenizer.chat_template",
            b"clip.has_vision_encoder",
            b"k" * 99,
        ]
        keys += [architecture + b"." + key for key in _ARCHITECTURE_KEYS]
        for key in random_.sample(keys, random_.randrange(len(keys))):
            if self._lies():
                yield self._entry(key, random_.choice([*_SIZES, STRING, ARRAY, 13, 255, 2**32 - 1]))
            elif key in _TEXT_KEYS:
                yield self._entry(key, STRING, random_.choice(_TEXTS))
            elif key.endswith(b"chat_template"):
                yield self._entry(key, STRING, random_.choice(_TEMPLATES))
            elif key in _ARRAY_KEYS or key.endswith(b"labels"):
                yield self._entry(key, ARRAY)
            elif key.endswith(b"encoder"):
                yield self._entry(key, BOOL, b"\1")
            elif key == b"general.alignment":
                yield self._entry(key, UINT32, struct.pack("<I", random_.choice([8, 32, 32, 64, 4096])))
            else:
                number = random_.choice([0, 1, 2, 3, 8, 4096, 2**31, 2**32 - 1])
                yield self._entry(key, UINT32, struct.pack("<I", number))

    def _entry(self, key: bytes, kind: int, value: bytes | None = None) -> bytes:
        return self._string(key) + struct.pack("<I", self._type(kind)) + self._value(kind, value, depth=0)

    def _value(self, kind: int, value: bytes | None, depth: int) -> bytes:
        if kind == STRING:
            return self._string(self._random.choice(_TEXTS) if value is None else value)
        if kind == ARRAY:
            return self._array(depth)
        return self._random.randbytes(_SIZES.get(kind, 8)) if value is None else value

    def _array(self, depth: int) -> bytes:
        random_ = self._random
        nests = depth < 40 and random_.random() < (0.9 if depth else self._chance)
        kind = ARRAY if nests else random_.choice([STRING, STRING, *_SIZES])
        length = 1 if nests else random_.choice([0, 1, 3, 64, 65, 200, 1024, 1025])
        content = b"".join(
            self._value(kind, None, depth + 1) for _ in range(min(length, 65 if kind == STRING else 1025))
        )
        return struct.pack("<IQ", self._type(kind), self._number(length)) + content

    def _tensors(self) -> Iterator[bytes]:
        random_ = self._random
        offset = 0
        for number in range(random_.choice([0, 1, 1, 2, 5])):
            shape = [self._number(random_.choice([1, 32, 64])) for _ in range(random_.randrange(1, 5))]
            kind = random_.choice([0, 1, 30, 36, self._type(0)])
            name = random_.choice(_TENSOR_NAMES) if number == 0 or self._lies() else b"blk.%d.attn_q.weight" % number
            dimensions = len(shape) if not self._lies() else random_.choice([0, 5, 2**31, 2**32 - 1])
            packed = struct.pack(f"<{len(shape)}QIQ", *shape, kind, self._number(offset))
            yield self._string(name) + struct.pack("<I", dimensions) + packed
            offset += 64**4 * 4

    def _string(self, data: bytes) -> bytes:
        return struct.pack("<Q", self._number(len(data))) + data

    def _number(self, truth: int) -> int:
        return self._random.choice([*TELLING, truth + 1, max(truth - 1, 0)]) if self._lies() else truth

    def _type(self, truth: int) -> int:
        return self._random.choice([*range(14), 255, 2**31, 2**32 - 1]) if self._lies() else truth

    def _lies(self) -> bool:
        return self._random.random() < self._chance
