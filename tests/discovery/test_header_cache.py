"""The header cache: a start reads no header twice, and a cache that is damaged is only a loss of time."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from magi_agent.discovery import header_cache
from magi_agent.discovery.header_cache import VERSION, HeaderCache
from magi_agent.discovery.scanner import Scanner
from magi_agent.gguf.reading import read_facts
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import THINKS, identity, model_bytes, rest, write_file, write_split
from tests.faulty_disk import filled, small_disk

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


def test_a_word_of_many_headers_is_remembered_once(models, cache):
    headers_read(models, cache)
    headers = [model.header for model in Scanner([models], cache_path=cache).scan().models]
    words = [header.architecture for header in headers if header is not None]
    assert words == ["llama"] * 5
    assert len({id(word) for word in words}) == 1


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
        lambda data: data.removesuffix(b"\n"),
        lambda data: b"\xff\xfe" + data,
        lambda _: b"[" * 100_000,
        lambda _: b"null\nnull\n",
        lambda _: b'{"magi_header_cache": 1}\n[]\n',
        lambda data: data.partition(b"\n")[2],
        lambda data: data.replace(f'"magi_header_cache": {VERSION}'.encode(), b'"magi_header_cache": 1'),
        lambda data: data.replace(b'"architecture"', b'"architektur"', 1),
        lambda _: b"\0" * 100,
    ],
)
def test_a_damaged_cache_is_dropped_and_written_anew(models, cache, damage, caplog):
    headers_read(models, cache)
    cache.write_bytes(damage(cache.read_bytes()))
    assert headers_read(models, cache) == 5
    assert "only 0 headers of the header cache" in caplog.text
    assert headers_read(models, cache) == 0


def changed_one_by_one(models: Path, cache: Path, count: int) -> Scanner:
    """Have a scanner write the cache whole, and then once for each of some files."""
    scanner = Scanner([models], cache_path=cache)
    scanner.scan()
    for number in range(count):
        rest(models / f"x{number}.gguf", age=100 + number)
        scanner.refresh([str(models / f"x{number}.gguf")])
    return scanner


def test_what_is_new_is_appended(models, cache):
    scanner = changed_one_by_one(models, cache, 0)
    before = cache.read_bytes()
    for number in (1, 2):
        rest(models / f"x{number}.gguf", age=100)
        scanner.refresh([str(models / f"x{number}.gguf")])
        assert _entries_by_line(cache) == [5] + [1] * number
    assert cache.read_bytes().startswith(before)
    assert headers_read(models, cache) == 0
    rest(models / "x3.gguf", age=100)
    assert headers_read(models, cache) == 1
    assert _entries_by_line(cache) == [5, 1, 1, 1]
    assert headers_read(models, cache) == 0


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[:-1], 3),
        (lambda data: data[:-10], 3),
        (lambda data: data + b"\0" * 100, 4),
        (lambda data: data + b"half a line", 4),
        (lambda data: data.replace(data.splitlines(keepends=True)[3], b"\n", 1), 1),
    ],
)
def test_what_stands_before_the_damage_is_used(models, cache, damage, left, caplog):
    changed_one_by_one(models, cache, 4)
    cache.write_bytes(damage(cache.read_bytes()))
    assert headers_read(models, cache) == 4 - left
    assert f"only {5 + left} headers of the header cache" in caplog.text
    assert headers_read(models, cache) == 0
    rest(models / "x4.gguf", age=100)
    assert headers_read(models, cache) == 1
    assert headers_read(models, cache) == 0


def as_an_earlier_agent_wrote_it(cache: Path) -> None:
    """Take out of the cache what agents did not know that took no samples."""
    head, *lines = cache.read_bytes().splitlines()
    fields = json.loads(head)
    assert fields["fields"].pop() == "sample"
    bodies = [json.dumps([row[:-1] for row in json.loads(line.partition(b" ")[2])]).encode() + b"\n" for line in lines]
    cache.write_bytes(
        json.dumps(fields).encode() + b"\n" + b"".join(header_cache._digest(body) + b" " + body for body in bodies)
    )


def test_a_cache_of_an_earlier_agent_is_read_and_gets_the_samples(models, cache, caplog):
    first = Scanner([models], cache_path=cache).scan()
    written = cache.read_bytes()
    as_an_earlier_agent_wrote_it(cache)
    old = {path: HeaderCache(cache).get(identity(path)) for path in models.iterdir()}
    assert all(facts is not None and facts.sample is None for facts in old.values())
    second = Scanner([models], cache_path=cache).scan()
    assert (second.headers_read, caplog.text) == (0, "")
    assert second.models == first.models
    assert [model.sample for model in second.models] == [model.sample for model in first.models]
    assert sorted(cache.read_bytes()) == sorted(written), "it is written anew, with the samples"
    assert headers_read(models, cache) == 0


def test_a_cache_of_an_earlier_agent_gets_what_is_new_too(models, cache):
    headers_read(models, cache)
    as_an_earlier_agent_wrote_it(cache)
    rest(models / "x1.gguf", age=60)
    assert headers_read(models, cache) == 1
    assert headers_read(models, cache) == 0


def test_data_that_cannot_be_read_costs_a_model_its_sample_and_nothing_else(models, cache, monkeypatch):
    def broken(_fd: int, _size: int) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr("magi_agent.discovery.files.read_sample", broken)
        first = Scanner([models], cache_path=cache).scan()
    assert {(model.status, model.sample) for model in first.models} == {(ModelStatus.OK, None)}
    second = Scanner([models], cache_path=cache).scan()
    assert second.headers_read == 0
    assert None not in {model.sample for model in second.models}


def test_a_sample_follows_the_data_of_all_parts(tmp_path):
    parts = write_split(tmp_path, "x", 2)
    scanner = Scanner([tmp_path])
    (before,) = scanner.scan().models
    content = parts[1].read_bytes()
    write_file(parts[1], content[:-1] + b"\1", age=1000)
    (after,) = scanner.scan().models
    assert (after.fingerprint, after.size_bytes) == (before.fingerprint, before.size_bytes)
    assert after.sample != before.sample
    parts[1].unlink()
    (cut,) = scanner.scan().models
    assert cut.sample is None


def test_a_cache_that_was_removed_meanwhile_is_written_whole(models, cache):
    scanner = changed_one_by_one(models, cache, 2)
    cache.unlink()
    rest(models / "x4.gguf", age=100)
    scanner.refresh([str(models / "x4.gguf")])
    assert headers_read(models, cache) == 0


def test_what_is_overtaken_does_not_grow_for_ever(models, cache, monkeypatch):
    monkeypatch.setattr(header_cache, "MAX_STALE", 3)
    monkeypatch.setattr(header_cache, "MAX_ENTRIES", 5)
    scanner = changed_one_by_one(models, cache, 0)
    written = []
    for number in range(10):
        rest(models / "x1.gguf", age=1000 + number)
        scanner.refresh([str(models / "x1.gguf")])
        written.append(_entries(cache))
    assert written == [6, 7, 8, 9, 10, 11, 12, 13, 14, 5]


def test_many_entries_take_several_lines(models, cache, monkeypatch):
    monkeypatch.setattr(header_cache, "_AT_ONCE", 2)
    first = Scanner([models], cache_path=cache).scan()
    assert _entries_by_line(cache) == [2, 2, 1]
    assert Scanner([models], cache_path=cache).scan().models == first.models
    assert headers_read(models, cache) == 0


def test_half_a_line_on_a_full_disk_is_made_good(models, cache, caplog):
    with small_disk(cache.parent):
        scanner = changed_one_by_one(models, cache, 0)
        with filled(cache.parent):
            for number in range(100):
                rest(models / "x1.gguf", age=1000 + number)
                scanner.refresh([str(models / "x1.gguf")])
                if "cannot write the header cache" in caplog.text:
                    break
            assert not cache.read_bytes().endswith(b"\n")
        rest(models / "x2.gguf", age=100)
        scanner.refresh([str(models / "x2.gguf")])
        assert cache.read_bytes().endswith(b"\n")
        caplog.clear()
        assert headers_read(models, cache) == 0
        assert not caplog.text


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
    return sum(_entries_by_line(cache))


def _entries_by_line(cache: Path) -> list[int]:
    return [len(json.loads(line.partition(b" ")[2])) for line in cache.read_bytes().splitlines()[1:]]


def test_the_cache_is_read_by_the_first_scan_not_before(models, cache):
    scanner = Scanner([models], cache_path=cache)
    headers_read(models, cache)
    assert scanner.scan().headers_read == 0
