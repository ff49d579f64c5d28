"""Damaged headers by the thousand: an answer or a ``GgufError``, in bounded time and memory."""

import gc
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from magi_agent.gguf.errors import GgufError
from magi_agent.gguf.header import MAX_STRINGS, MAX_TENSORS, read_header
from magi_agent.gguf.reading import facts_of
from tests.gguf.builder import (
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


@pytest.fixture
def memory_file() -> Iterator[int]:
    fd = os.memfd_create("header")
    try:
        yield fd
    finally:
        os.close(fd)


def mutated(random_: random.Random) -> bytes:
    content = bytearray(MODEL)
    for _ in range(random_.choice([1, 1, 1, 2, 5, 20])):
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
        if len(content) < 100:
            break
    if random_.random() < 0.1:
        del content[random_.randrange(len(content)) :]
    return bytes(content)


def outcome(fd: int, content: bytes) -> str:
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)
    error = refusal(fd)
    if error is None:
        return "read"
    assert str(error).isprintable()
    assert len(str(error)) < 300
    assert 0 <= error.offset <= len(content)
    return type(error).__name__


def refusal(fd: int) -> GgufError | None:
    """What the reader refuses the header with; any other exception goes on."""
    try:
        facts_of(read_header(fd))
    except GgufError as error:
        return error
    return None


def test_mutated_headers_end_in_an_answer_or_an_error_and_leave_nothing_behind(memory_file):
    random_ = random.Random(20)
    assert outcome(memory_file, MODEL) == "read"
    outcomes: dict[str, int] = {}
    slowest = 0.0
    for _ in range(300):  # what Python allocates once and keeps
        outcome(memory_file, mutated(random_))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(6000):
            content = mutated(random_)
            began = time.perf_counter()
            kind = outcome(memory_file, content)
            slowest = max(slowest, time.perf_counter() - began)
            outcomes[kind] = outcomes.get(kind, 0) + 1
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Every way out was taken, so the mutations reach every part of the reader.
    assert set(outcomes) >= {"read", "MalformedHeader", "TruncatedHeader", "UnwrittenHeader", "NotGguf"}, outcomes
    assert slowest < 1.0
    assert peak - before < 4 * 1024 * 1024
    assert after - before < 64 * 1024


@pytest.mark.parametrize("value", TELLING)
def test_a_telling_number_at_any_place_does_no_harm(memory_file, value):
    packed = struct.pack("<Q", value)
    for at in range(0, HEADER_END, 3):
        outcome(memory_file, MODEL[:at] + packed + MODEL[at + 8 :])


def test_noise_does_no_harm(memory_file):
    random_ = random.Random(4)
    for _ in range(500):
        outcome(memory_file, b"GGUF\3\0\0\0" + struct.pack("<QQ", 3, 20) + random_.randbytes(random_.randrange(3000)))


def test_the_largest_headers_that_are_read_take_bounded_time_and_memory(memory_file):
    largest = {
        "strings": gguf([array_entry("a", STRING, MAX_STRINGS, bytes(8 * MAX_STRINGS))]),
        "tensors": gguf([], [tensor("t", (0,))] * MAX_TENSORS, data=64),
        "entries": gguf([number_entry(f"key.{n}", n) for n in range(65_536)]),
        "texts": gguf([text_entry(f"key.{n}", "🦙" + "x" * 4000) for n in range(2000)]),
        "arrays": gguf([array_entry(f"key.{n}", UINT32, 1024, b"\xff" * 4096) for n in range(5000)]),
    }
    for name, content in largest.items():
        os.ftruncate(memory_file, 0)
        os.pwrite(memory_file, content, 0)
        began = time.process_time()
        read_header(memory_file)
        assert time.process_time() - began < 5.0, name
        tracemalloc.start()
        try:
            if name not in {"strings", "tensors"}:  # those keep nothing, and are slow to trace
                read_header(memory_file)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 32 * 1024 * 1024, name
