"""The watch sleeps until the kernel tells of an event, misses none, and does not wake for each where there are many."""

from __future__ import annotations

import asyncio
import math
import os
import select
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from watchfiles._rust_notify import RustNotify

from magi_agent.discovery import queued_events, watching
from magi_agent.discovery.facts import TierThresholds
from magi_agent.discovery.queued_events import QueuedEvents, inotify_descriptors
from tests.discovery.model_files import model_bytes, write_file
from tests.registry.kept_inventory import Kept, eventually, keeping, seconds_until_seen

FAR = 3600.0


def write_model(path: Path) -> Path:
    return write_file(path, model_bytes("llama", texts={"general.name": path.name}))


def instance(folder: Path) -> RustNotify:
    return RustNotify([str(folder)], False, False, 0, False, False)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """One, whose signals are its own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the looks which would find what the kernel did not tell of; and be idle soon."""
    monkeypatch.setattr(watching, "_LOOK_AT_ROOTS", FAR)
    monkeypatch.setattr(watching, "_LONGEST_LOOK", FAR)
    monkeypatch.setattr(watching, "_BUSY_SECONDS", 0.05)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the watch's thread has woken."""
    count = 0
    listen_once = watching._Listener._listen_once

    def counted(self: watching._Listener, now: float) -> None:
        nonlocal count
        count += 1
        listen_once(self, now)

    monkeypatch.setattr(watching._Listener, "_listen_once", counted)
    return lambda: count


async def idle(kept: Kept) -> None:
    listener = kept.inventory._watch._listener
    await eventually(lambda: math.isinf(listener._ask_at), "the watch waits for the kernel alone")


def test_what_is_queued_is_told_of_also_when_it_was_read_long_ago(thread: ThreadPoolExecutor, models: Path) -> None:
    def told() -> None:
        queued = QueuedEvents()
        poll = select.poll()
        poll.register(queued, select.POLLIN)
        others = inotify_descriptors()
        watched = instance(models)
        assert queued.announce_new(others)
        assert not queued.take()
        assert poll.poll(0) == []
        for number in range(50):
            (models / f"{number}").mkdir()
            time.sleep(0.005)
            assert poll.poll(0) == [(queued.fileno(), select.POLLIN)]
            assert queued.take()
            assert not queued.take()
        watched.close()
        queued.close()

    thread.submit(told).result()


def test_none_or_several_new_instances_cannot_be_told_apart(thread: ThreadPoolExecutor, models: Path) -> None:
    def told() -> None:
        queued = QueuedEvents()
        assert not queued.announce_new(inotify_descriptors())
        others = inotify_descriptors()
        watched = [instance(models), instance(models)]
        assert len(inotify_descriptors() - others) == 2
        assert not queued.announce_new(others)
        (models / "x").touch()
        time.sleep(0.05)
        assert not queued.take()
        for each in watched:
            each.close()
        queued.close()

    thread.submit(told).result()


def test_an_instance_that_outlives_the_thread_signals_nobody(models: Path) -> None:
    watched: list[RustNotify] = []

    def announce() -> None:
        queued = QueuedEvents()
        others = inotify_descriptors()
        watched.append(instance(models))
        assert queued.announce_new(others)
        (models / "taken-by-nobody").touch()
        queued.close()

    ended = threading.Thread(target=announce)
    ended.start()
    ended.join()
    # Unhandled, the signal would end this process.
    (models / "later").touch()
    time.sleep(0.05)
    watched[0].close()


async def test_no_event_is_missed_by_a_watch_that_sleeps(no_net: None, tmp_path: Path, models: Path) -> None:
    async with keeping([models], tmp_path) as kept:
        taken = []
        for number in range(15):
            arriving = write_model(tmp_path / f"m{number}.gguf")
            await idle(kept)
            arrived = models / arriving.name
            taken.append(await seconds_until_seen(partial(arriving.rename, arrived), kept.has(arriving.stem)))
        # At the pace of asking, it would be twice as much.
        assert statistics.median(taken) < watching._PACE / 4
        for number in range(15):
            await idle(kept)
            (models / f"m{number}.gguf").unlink()
            await eventually(kept.lists(*(f"m{left}" for left in range(number + 1, 15))), "it is gone")
        assert all(each.is_announced for each in kept.inventory._watch._listener._instances)


async def test_a_watch_that_hears_nothing_wakes_ever_more_rarely(
    tmp_path: Path, models: Path, turns: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LONGEST_LOOK", 4.0)
    write_model(models / "sub" / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        await idle(kept)
        before, looks = turns(), kept.scanner.refreshes
        await asyncio.sleep(8)
        # After 1, 2 and 4 seconds; with one more for what the first scan was still heard doing.
        assert 2 <= turns() - before <= 4
        assert kept.scanner.refreshes == looks
        await eventually(lambda: listener._look_pause == watching._LONGEST_LOOK, "it is all but asleep")


async def test_a_configured_folder_that_is_missing_is_looked_for_more_often(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LOOK_AT_ROOTS", 0.1)
    monkeypatch.setattr(watching, "_LOOK_FOR_MISSING", 0.4)
    write_model(models / "one.gguf")
    async with keeping([models, tmp_path / "later"], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        await asyncio.sleep(3)
        assert listener._look_pause == 0.4
        write_model(tmp_path / "later" / "two.gguf")
        await eventually(kept.has("two"), "the folder is there", 3)
        await eventually(lambda: listener._look_pause > 0.4, "nothing is missing", 5)


async def test_a_folder_that_is_configured_later_and_missing_is_looked_for_at_once(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LOOK_AT_ROOTS", 0.1)
    write_model(models / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        await eventually(lambda: listener._look_pause > 6, "all is quiet")
        kept.inventory.reconfigure([models, tmp_path / "later"], TierThresholds(), FAR)
        kept.inventory.look_again()
        await eventually(lambda: str(tmp_path / "later") in listener._seen_roots, "it is looked for", 2)
        write_model(tmp_path / "later" / "two.gguf")
        await eventually(kept.has("two"), "the folder is there", 5)


def test_a_folder_that_is_missing_as_watches_are_set_up_is_looked_for_soon(models: Path) -> None:
    listener = watching._Listener([str(models)], lambda _: None, lambda: None)
    listener._kernel_tells = True
    listener._read_mounts()
    status = models.stat()
    listener.follow({str(models): (status.st_dev, status.st_ino)}, {})
    now = time.monotonic()
    listener._listen_once(now)
    listener._look_at_roots_at, listener._look_pause = now + 30, 30.0
    del listener._watched[str(models)]
    models.rmdir()
    listener._set_up(now)

    assert listener._look_at_roots_at <= now + watching._LOOK_AT_ROOTS
    models.mkdir()
    listener._listen_once(now + watching._LOOK_AT_ROOTS)
    assert str(models) in listener._watched
    listener._end()


async def test_a_link_to_the_models_that_leads_elsewhere_is_seen_though_nobody_tells(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_LOOK_FOR_MISSING", 1.5)
    write_model(models / "one.gguf")
    write_model(tmp_path / "others" / "two.gguf")
    link = tmp_path / "link"
    link.symlink_to(models)
    async with keeping([link], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        await eventually(lambda: listener._look_pause == 1.5, "all is quiet")
        await asyncio.sleep(2)
        link.unlink()
        link.symlink_to(tmp_path / "others")
        await eventually(kept.lists("two"), "the other folder's models are listed", 5)


async def test_where_an_event_was_not_told_of_the_watch_asks(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_BUSY_SECONDS", 0.05)
    monkeypatch.setattr(QueuedEvents, "announce_new", lambda *_: True)
    async with keeping([models], tmp_path) as kept:
        await idle(kept)
        # Longer than the first looks take: they do not become rarer while the kernel has told of nothing.
        await asyncio.sleep(4)
        write_model(models / "first.gguf")
        await eventually(kept.has("first"), "it is heard of with the look at the configured folders", 2)
        monkeypatch.setattr(watching, "_LOOK_AT_ROOTS", FAR)
        await asyncio.sleep(1.5)
        write_model(models / "second.gguf")
        await eventually(kept.has("second"), "it is asked for")


def no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued_events, "_DESCRIPTORS", "/nowhere")


def no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError("no such system call")

    monkeypatch.setattr(queued_events, "_signal_descriptor", refuse)


def no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued_events, "_F_SETOWN_EX", 9999)


@pytest.mark.parametrize("hindrance", [no_descriptors, no_signals, no_owner])
async def test_where_the_kernel_does_not_tell_the_watch_asks(
    hindrance: Callable[[pytest.MonkeyPatch], None],
    no_net: None,
    tmp_path: Path,
    models: Path,
    turns: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hindrance(monkeypatch)
    async with keeping([models], tmp_path) as kept:
        for number in range(2):
            await asyncio.sleep(0.5)
            write_model(models / f"m{number}.gguf")
            await eventually(kept.has(f"m{number}"), "it is heard of")
        await asyncio.sleep(0.5)
        before = turns()
        await asyncio.sleep(2)
        assert 4 <= turns() - before <= 8


async def test_of_two_instances_made_at_once_both_are_asked(
    no_net: None, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers: list[RustNotify] = []
    announce_new = QueuedEvents.announce_new

    def beside_another(queued: QueuedEvents, others: set[int]) -> bool:
        strangers.append(instance(tmp_path))
        return announce_new(queued, others)

    monkeypatch.setattr(QueuedEvents, "announce_new", beside_another)
    async with keeping([models], tmp_path) as kept:
        assert [each.is_announced for each in kept.inventory._watch._listener._instances] == [False]
        await asyncio.sleep(0.5)
        write_model(models / "one.gguf")
        await eventually(kept.has("one"), "it is heard of")
    for stranger in strangers:
        stranger.close()


@contextmanager
def listening(listener: watching._Listener) -> Iterator[None]:
    thread = threading.Thread(target=listener.listen)
    thread.start()
    try:
        yield
    finally:
        listener.stop()
        thread.join()


async def test_what_happens_just_before_an_instance_is_announced_is_heard(
    no_net: None, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce_new = QueuedEvents.announce_new
    later, between = models / "later", models / "later" / "between.gguf"
    later.mkdir()

    def late(queued: QueuedEvents, others: set[int]) -> bool:
        between.touch()
        time.sleep(0.05)
        return announce_new(queued, others)

    told: set[str] = set()
    listener = watching._Listener([str(models)], told.update, lambda: None)
    identities = {}
    for folder in (str(models), str(later)):
        identity = watching._identity(folder)
        assert identity is not None
        identities[folder] = identity
    with listening(listener):
        listener.follow({str(models): identities[str(models)]}, {})
        await eventually(lambda: str(models) in listener._watched, "the first is watched")
        await eventually(lambda: math.isinf(listener._ask_at), "it waits for the kernel alone")
        monkeypatch.setattr(QueuedEvents, "announce_new", late)
        listener.follow(identities, {})
        await eventually(lambda: str(between) in told, "it is told")


async def test_an_instance_that_ends_by_itself_is_missed_at_once(no_net: None, tmp_path: Path, models: Path) -> None:
    write_model(models / "odd" / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        await idle(kept)
        write_file(Path(os.fsdecode(os.fsencode(models / "odd") + b"/odd-\xff")), b"x")
        await eventually(lambda: str(models / "odd") in kept.inventory._watch.unheard, "its end is noticed", 3)
        write_model(models / "two.gguf")
        await eventually(kept.has("two"), "the others are heard of again", 3)


async def test_a_folder_that_vanishes_wakes_the_watch(no_net: None, tmp_path: Path, models: Path) -> None:
    write_model(models / "kept.gguf")
    (models / "empty").mkdir()
    async with keeping([models], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        await idle(kept)
        assert str(models / "empty") in listener._watched
        (models / "empty").rmdir()
        await eventually(lambda: str(models / "empty") not in listener._watched, "it is noticed", 3)


async def test_many_writes_wake_the_watch_no_more_often_than_it_asks(
    tmp_path: Path, models: Path, turns: Callable[[], int]
) -> None:
    def write_for(seconds: float) -> int:
        writes, end = 0, time.monotonic() + seconds
        with (models / "one.bin").open("wb", 0) as one, (models / "other.bin").open("wb", 0) as other:
            while time.monotonic() < end:
                one.write(b"x")
                other.write(b"x")
                writes += 2
                if writes % 100 == 0:
                    time.sleep(0.001)
        return writes

    async with keeping([models], tmp_path) as kept:
        await idle(kept)
        before = turns()
        writes = await asyncio.to_thread(write_for, 3)
        assert turns() - before <= 3 / watching._BUSY_PACE * 1.5
        assert writes > 10_000


async def test_files_that_are_merely_opened_wake_the_watch_a_few_times_a_second(
    tmp_path: Path, models: Path, turns: Callable[[], int]
) -> None:
    one = write_model(models / "one.gguf")

    def open_for(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with one.open("rb") as file:
                file.read(1)
            time.sleep(0.002)

    async with keeping([models], tmp_path) as kept:
        await idle(kept)
        before, looks = turns(), kept.scanner.refreshes
        await asyncio.to_thread(open_for, 3)
        assert turns() - before <= 3 * (1 / watching._PACE + 2)
        assert kept.scanner.refreshes == looks
