"""Damaged headers by the thousand: an answer or a ``GgufError``, in bounded time and memory."""

import gc
import os
import random
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from magi_agent.gguf.errors import GgufError
from magi_agent.gguf.header import MAX_STRINGS, MAX_TENSORS, read_header
from magi_agent.gguf.reading import facts_of
from tests.gguf.builder import STRING, UINT32, array_entry, gguf, number_entry, tensor, text_entry
from tests.gguf.damaged import HEADER_END, MODEL, TELLING, damaged_header, fuzz_cases, fuzz_seed


@pytest.fixture
def memory_file() -> Iterator[int]:
    fd = os.memfd_create("header")
    try:
        yield fd
    finally:
        os.close(fd)


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


def test_damaged_headers_end_in_an_answer_or_an_error_and_leave_nothing_behind(memory_file):
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(300):  # what Python allocates once and keeps
        outcome(memory_file, damaged_header("warm", number))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(2000):
            content = damaged_header("20", number)
            began = time.process_time()
            kind = outcome(memory_file, content)
            slowest = max(slowest, time.process_time() - began)
            outcomes[kind] += 1
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Every way out was taken, so the damage reaches every part of the reader.
    assert set(outcomes) >= {"read", *(f"{word}Header" for word in ("Malformed", "Truncated", "Unwritten")), "NotGguf"}
    assert slowest < 1.0
    assert peak - before < 16 * 1024 * 1024  # the header itself is in it
    assert after - before < 64 * 1024


def test_many_damaged_headers_do_no_harm(memory_file):
    seed, cases = fuzz_seed(), fuzz_cases(4000)
    print(f"FUZZ_SEED={seed} FUZZ_CASES={cases}")
    assert outcome(memory_file, MODEL) == "read"
    outcomes: Counter[str] = Counter()
    process = psutil.Process()
    resident = 0
    for number in range(cases):
        began = time.process_time()
        try:
            outcomes[outcome(memory_file, damaged_header(seed, number))] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of FUZZ_SEED={seed}: {error!r}") from error
        assert time.process_time() - began < 2, f"case {number} of FUZZ_SEED={seed}"
        if number == cases // 4:
            resident = process.memory_info().rss
    print(dict(outcomes))
    assert process.memory_info().rss - resident < 16 * 1024 * 1024
    assert min(outcomes[kind] for kind in ("read", "MalformedHeader", "TruncatedHeader")) > cases // 40


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
