"""A file that is being written costs little, however many writes that takes, and is listed once its last byte is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import model_bytes, write_file
from tests.gguf.builder import gguf, tensor, text_entry
from tests.registry.kept_inventory import eventually, keeping

ELEMENTS = 25_000_000
WRITER = """
import os, sys, time

path, header, size, writes, seconds, preallocate = sys.argv[1], bytes.fromhex(sys.argv[2]), *map(int, sys.argv[3:])
fd = os.open(path, os.O_WRONLY | os.O_CREAT)
if preallocate:
    os.posix_fallocate(fd, 0, size)
os.write(fd, header)
begin, at, chunk = time.monotonic(), len(header), bytes(-(-size // writes))
for number in range(writes):
    at += os.write(fd, chunk[: size - at])
    if number % 50 == 49:
        time.sleep(max(0, begin + seconds * number / writes - time.monotonic()))
os.write(fd, bytes(size - at))
"""


def header_of(name: str, elements: int = ELEMENTS) -> bytes:
    """The header of a model with that many float32, and its padding."""
    entries = [text_entry("general.architecture", "llama"), text_entry("general.name", name)]
    header = gguf(entries, [tensor("token_embd.weight", (elements,))])
    return header + bytes(-len(header) % 32)


@asynccontextmanager
async def writer(
    path: Path, header: bytes, size: int, writes: int, seconds: int, *, preallocate: bool = False
) -> AsyncIterator[Callable[[], bool]]:
    """Have another process write a file, in that many writes over some seconds; gives whether it has ended."""
    numbers = map(str, (size, writes, seconds, int(preallocate)))
    command = [sys.executable, "-c", WRITER, str(path), header.hex(), *numbers]
    process = await asyncio.to_thread(subprocess.Popen, command)
    try:
        yield lambda: process.poll() is not None
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


async def test_a_long_copy_costs_a_few_looks_and_next_to_nothing_a_write(tmp_path: Path, models: Path) -> None:
    header = header_of("long")
    async with keeping([models], tmp_path) as kept:
        headers, looks, scans = kept.scanner.headers, kept.scanner.refreshes, kept.scanner.scans
        begin, used = time.monotonic(), time.process_time()
        async with writer(models / "long.gguf", header, len(header) + 4 * ELEMENTS, 20_000, 6) as ended:
            await eventually(ended, "it is written", 60)
            used, took = time.process_time() - used, time.monotonic() - begin
            await eventually(kept.is_whole("long"), "it is whole")
        assert kept.scanner.headers - headers <= 8
        assert kept.scanner.refreshes - looks <= 12
        assert kept.scanner.scans == scans
        # Of which nine tenths go by without inotify's telling of each write.
        assert used / took < 0.1, f"{used / took:.1%} of a processor"


async def test_a_long_download_is_out_of_earshot_until_it_is_renamed(tmp_path: Path, models: Path) -> None:
    header, part = header_of("download"), models / "download.gguf.part"
    async with keeping([models], tmp_path) as kept:
        looks = kept.scanner.refreshes
        listener = kept.inventory._watch._listener
        async with writer(part, header, len(header) + 4 * ELEMENTS, 5_000, 4) as ended:
            await eventually(lambda: str(models) in listener._sampled, "the folder is out of earshot")
            await eventually(ended, "it is written", 60)
            part.rename(models / "download.gguf")
            await eventually(kept.is_whole("download"), "it is listed", 5)
        assert kept.scanner.refreshes - looks <= 5


async def test_a_file_of_forty_gigabytes_is_looked_at_no_more_often(tmp_path: Path, models: Path) -> None:
    header = header_of("huge", 10_000_000_000)
    async with keeping([models], tmp_path) as kept:
        headers = kept.scanner.headers
        with (models / "huge.gguf").open("wb", 0) as file:
            file.write(header)
            for number in range(1, 401):
                # Nearly all of it is holes, so that it takes no room.
                os.pwrite(file.fileno(), b"x", len(header) + number * 99_000_000)
                await asyncio.sleep(0.01)
            await eventually(lambda: kept.status("huge") is ModelStatus.INCOMPLETE, "it is listed as incomplete")
        assert kept.scanner.headers - headers <= 8


async def test_what_else_happens_in_the_folder_of_a_long_copy_is_seen(tmp_path: Path, models: Path) -> None:
    header, other_header = header_of("long"), header_of("other", 1_000_000)
    stays = write_file(models / "stays.gguf", model_bytes("llama", texts={"general.name": "stays"}))
    async with keeping([models], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        async with writer(models / "long.gguf", header, len(header) + 4 * ELEMENTS, 5_000, 8) as ended:
            await eventually(lambda: str(models) in listener._sampled, "the folder is out of earshot")
            write_file(models / "short.gguf", model_bytes("llama", texts={"general.name": "short"}))
            await eventually(kept.is_whole("short"), "a file that is copied in the meantime is listed")
            stays.rename(models / "renamed.gguf")
            await eventually(
                lambda: any(model.facts.filename == "renamed.gguf" for model in kept.registry.models.values()),
                "one that is renamed, too",
            )
            size = len(other_header) + 4_000_000
            async with writer(models / "other.gguf", other_header, size, 100, 1) as other_ended:
                await eventually(other_ended, "it is written")
                await eventually(kept.is_whole("other"), "a second one that grows is listed", 5)
            assert not ended()
            await eventually(ended, "it is written", 60)
        await eventually(kept.is_whole("long"), "it is whole")
        await eventually(lambda: str(models) in listener._watched, "the folder is heard again")


async def test_a_preallocated_download_is_whole_a_few_seconds_after_its_end(tmp_path: Path, models: Path) -> None:
    header = header_of("download")
    async with keeping([models], tmp_path) as kept:
        headers = kept.scanner.headers
        size = len(header) + 4 * ELEMENTS
        async with writer(models / "download.gguf", header, size, 2000, 4, preallocate=True) as ended:
            await eventually(lambda: kept.status("download") is ModelStatus.INCOMPLETE, "it is listed as incomplete")
            await eventually(ended, "it is written", 60)
            await eventually(kept.is_whole("download"), "it is whole", 5)
        assert kept.scanner.headers - headers <= 20


async def test_a_copy_that_is_broken_off_and_begun_again_as_another_model(tmp_path: Path, models: Path) -> None:
    path, header = models / "changing.gguf", header_of("first")
    other = model_bytes("qwen3", texts={"general.name": "second"})
    async with keeping([models], tmp_path) as kept:
        path.write_bytes(header + bytes(1_000_000))
        await eventually(lambda: kept.status("changing") is ModelStatus.INCOMPLETE, "it is listed as incomplete")
        path.write_bytes(other)
        await eventually(kept.is_whole("changing"), "the other is listed")
        path.write_bytes(header + bytes(1_000_000))
        await eventually(lambda: kept.status("changing") is ModelStatus.INCOMPLETE, "and the first one again")
        path.unlink()
        await eventually(lambda: kept.ids == [], "it is gone")


async def test_a_copy_that_changes_into_another_model_without_ever_being_shorter(tmp_path: Path, models: Path) -> None:
    path, header = models / "changing.gguf", header_of("first")
    other = model_bytes("qwen3", texts={"general.name": "second"})
    async with keeping([models], tmp_path) as kept:
        path.write_bytes(header + bytes(1_000_000))
        await eventually(lambda: kept.status("changing") is ModelStatus.INCOMPLETE, "it is listed as incomplete")
        with path.open("r+b") as file:
            file.write(other)
        await eventually(kept.is_whole("changing"), "the other is listed once it is at rest")
