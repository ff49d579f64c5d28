"""Samples of a file's data: equal for equal files, and read in a few small pieces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.gguf.sample import PLACE_BYTES, PLACES, read_sample

SIZE = 1_000_000


def sample_of(path: Path, size: int) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_sample(fd, size)
    finally:
        os.close(fd)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(n % 251 for n in range(SIZE)))
    return path


def changed(path: Path, position: int) -> str:
    other = path.with_name("other")
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    other.write_bytes(content)
    return sample_of(other, SIZE)


def test_it_follows_the_data_up_to_its_end_and_no_further(data: Path) -> None:
    whole = sample_of(data, SIZE)
    assert changed(data, SIZE - 1) != whole
    assert changed(data, SIZE // PLACES) != whole
    with data.open("ab") as file:
        file.write(b"more")
    assert sample_of(data, SIZE) == whole
    assert sample_of(data, SIZE + 4) != whole


def test_what_runs_through_the_data_is_seen_wherever_it_begins(data: Path) -> None:
    whole = sample_of(data, SIZE)
    for begin in range(0, SIZE - SIZE // PLACES, 10_000):
        other = data.with_name("other")
        content = data.read_bytes()
        length = SIZE // PLACES + PLACE_BYTES
        other.write_bytes(content[:begin] + bytes(length) + content[begin + length :])
        assert sample_of(other, SIZE) != whole


@given(size=st.integers(0, 3 * PLACE_BYTES))
def test_a_small_file_has_one_too(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = tmp_path_factory.mktemp("small") / "data"
    path.write_bytes(b"x" * size)
    same = path.with_name("same")
    same.write_bytes(path.read_bytes())
    assert sample_of(path, size) == sample_of(same, size)


def test_a_few_kibibytes_are_read_however_large_the_file_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(data, 1 << 40)
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, position: int) -> bytes:
        got = pread(fd, length, position)
        read.append(len(got))
        return got

    monkeypatch.setattr(os, "pread", counted)
    sample_of(data, 1 << 40)
    assert read == [PLACE_BYTES] * PLACES


def test_a_file_system_that_answers_with_less_changes_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample_of(data, SIZE)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, position: pread(fd, min(length, 300), position))
    assert sample_of(data, SIZE) == whole


def test_a_file_that_ended_meanwhile_is_read_to_its_end(data: Path) -> None:
    assert sample_of(data, 2 * SIZE)
