"""The header cache: a start reads no header twice, and a cache that is damaged is only a loss of time."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.discovery import header_cache
from magi_agent.discovery.header_cache import HeaderCache
from magi_agent.discovery.scanner import Scanner
from magi_agent.gguf.reading import read_facts
from tests.discovery.model_files import THINKS, identity, model_bytes, rest, write_file

CONTENT = model_bytes("llama", template=THINKS, texts={"general.name": "Some \N{LLAMA} Name"})


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for number in range(5):
        write_file(tmp_path / "models" / f"x{number}.gguf", CONTENT)
    return tmp_path / "models"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "state" / "headers.json"


def headers_read(models: Path, cache: Path) -> int:
    return Scanner([models], cache_path=cache).scan().headers_read


def test_a_new_scanner_with_the_same_cache_reads_no_header(models, cache):
    first = Scanner([models], cache_path=cache).scan()
    second = Scanner([models], cache_path=cache).scan()
    assert (first.headers_read, second.headers_read) == (5, 0)
    assert second.models == first.models


def test_without_a_cache_nothing_is_written(models, tmp_path):
    Scanner([models]).scan()
    assert os.listdir(tmp_path) == ["models"]  # noqa: PTH208


@pytest.mark.parametrize("change", ["mtime", "size", "inode", "name"])
def test_a_header_is_remembered_by_device_inode_size_and_mtime(models, cache, change):
    headers_read(models, cache)
    path = models / "x1.gguf"
    if change == "mtime":
        rest(path, age=60)
    elif change == "size":
        status = path.stat()
        path.write_bytes(CONTENT + b"\0")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "inode":
        status = path.stat()
        path.rename(models / "old")
        path.write_bytes(CONTENT)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path.rename(models / "renamed.gguf")
    assert headers_read(models, cache) == (0 if change == "name" else 1)


def test_what_is_remembered_is_what_was_read(models, cache):
    path = models / "x1.gguf"
    facts = read_facts(path)
    remembering = HeaderCache(cache)
    remembering.put(identity(path), facts)
    remembering.save()
    assert HeaderCache(cache).get(identity(path)) == facts


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + b"x",
        lambda data: data.replace(b"llama", b"llamb", 1),
        lambda data: b"\xff\xfe" + data,
        lambda _: b"[" * 100_000,
        lambda _: b"null\nnull\n",
        lambda _: b'{"magi_header_cache": 1}\n[]\n',
        lambda data: data.partition(b"\n")[2],
        lambda data: data.replace(b'"magi_header_cache": 1', b'"magi_header_cache": 2'),
        lambda data: data.replace(b'"architecture"', b'"architektur"', 1),
        lambda _: b"\0" * 100,
    ],
)
def test_a_damaged_cache_is_dropped_and_written_anew(models, cache, damage, caplog):
    headers_read(models, cache)
    cache.write_bytes(damage(cache.read_bytes()))
    assert headers_read(models, cache) == 5
    assert "is not used" in caplog.text
    assert headers_read(models, cache) == 0


def test_a_cache_that_cannot_be_written_costs_only_time(models, tmp_path, caplog):
    blocked = write_file(tmp_path / "file", b"")
    result = Scanner([models], cache_path=blocked / "headers.json").scan()
    assert len(result.models) == 5
    assert "cannot write the header cache" in caplog.text


def test_what_a_killed_writer_left_is_removed(models, cache):
    headers_read(models, cache)
    leftover = write_file(cache.with_name(f".{cache.name}.abc123.tmp"), b"half")
    assert headers_read(models, cache) == 0
    assert not leftover.exists()


def test_files_that_are_gone_are_forgotten_only_when_they_are_many(models, cache, monkeypatch):
    monkeypatch.setattr("magi_agent.discovery.scanner._CACHE_SLACK", 3)
    scanner = Scanner([models], cache_path=cache)
    scanner.scan()
    (models / "x0.gguf").unlink()
    scanner.scan()
    assert _entries(cache) == 5
    for number in range(1, 5):
        (models / f"x{number}.gguf").unlink()
    scanner.scan()
    assert _entries(cache) == 0


def test_the_number_of_entries_is_bounded(models, monkeypatch):
    monkeypatch.setattr(header_cache, "MAX_ENTRIES", 3)
    facts = read_facts(models / "x1.gguf")
    remembering = HeaderCache(None)
    first = identity(models / "x1.gguf")
    for number in range(10):
        remembering.put(replace(first, inode=number), facts)
    assert len(remembering) == 3
    assert remembering.get(replace(first, inode=9)) == facts
    assert remembering.get(replace(first, inode=6)) is None


def test_files_that_are_not_whole_are_not_remembered(models, cache):
    write_file(models / "cut.gguf", CONTENT[:-1])
    write_file(models / "damaged.gguf", CONTENT[:24] + b"\xff" * 200)
    headers_read(models, cache)
    assert _entries(cache) == 5


def _entries(cache: Path) -> int:
    return len(json.loads(cache.read_text().splitlines()[1]))
