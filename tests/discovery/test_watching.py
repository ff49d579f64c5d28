"""Whatever ends, blinds or floods the watch, the registry lists what is there: each failure made for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.discovery.model_files import model_bytes, write_file
from tests.discovery.watching_process import watching
from tests.registry.kept_inventory import eventually, keeping, seconds_until_seen

LARGE = model_bytes("llama", elements=5_000_000)  # 20 MB
UNPRIVILEGED = 61_061
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes away rights from another process, as root")


def write_model(path: Path) -> Path:
    """A model unlike all others: one that is like another that went is the same under a new name."""
    return write_file(path, model_bytes("llama", texts={"general.name": path.name}))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def events_kept() -> int:
    """How many events the kernel keeps for a reader."""
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@pytest.fixture
def in_namespace() -> tuple[str, ...]:
    """The beginning of a command that runs in a user namespace of its own."""
    command = ("unshare", "--user", "--map-root-user")
    if subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("user namespaces are not allowed here")
    return command


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everybody can reach, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="magi-watching-"))
    try:
        folder.chmod(0o777)
        (folder / "models").mkdir()
        yield folder
    finally:
        shutil.rmtree(folder)


async def test_copies_and_renames_are_seen_within_half_a_second(tmp_path: Path, models: Path) -> None:
    source = write_file(tmp_path / "source.gguf", LARGE)
    async with keeping([models], tmp_path) as kept:

        async def measured(number: int) -> list[float]:
            copy, part, renamed = (models / f"{name}{number}.gguf" for name in ("copy", "part", "renamed"))
            part = part.with_suffix(".gguf.part")
            taken = [
                await seconds_until_seen(partial(shutil.copyfile, source, copy), kept.is_whole(copy.stem)),
            ]
            shutil.copyfile(source, part)
            taken.append(await seconds_until_seen(partial(part.rename, renamed), kept.is_whole(renamed.stem)))
            return taken

        def is_idle() -> bool:
            return time.monotonic() > kept.inventory._watch._listener._busy_until + 0.1

        at_work = [seconds for number in range(6) for seconds in await measured(number)]
        idle = []
        for number in range(6, 9):
            # When nothing has happened for a while, it is the kernel that wakes the watch.
            await eventually(is_idle, "nothing is going on")
            idle.append((await measured(number))[0])
        # Some are late on a machine that is busy with other things.
        assert statistics.median(at_work) < 0.5
        assert statistics.median(idle) < 0.5


async def test_events_lost_in_a_flood_of_files_are_made_up_for_at_once(
    models: Path, tmp_path: Path, events_kept: int
) -> None:
    gone = write_model(models / "gone.gguf")
    async with watching(models, tmp_path) as kept:
        assert kept.ids == ["gone"]
        kept.process.send_signal(signal.SIGSTOP)
        # Three events each.
        for number in range(events_kept // 3 + 1000):
            (models / f"{number:06d}").touch()
        write_model(models / "unheard.gguf")
        gone.unlink()
        kept.process.send_signal(signal.SIGCONT)
        await kept.until(lambda: kept.ids == ["unheard"], "what came and went without an event is found")


async def test_events_lost_in_a_flood_of_writes_are_made_up_for_by_the_next_scan(
    models: Path, tmp_path: Path, events_kept: int
) -> None:
    async with watching(models, tmp_path, interval=2.0) as kept:
        kept.process.send_signal(signal.SIGSTOP)
        with (models / "one").open("wb", 0) as one, (models / "other").open("wb", 0) as other:
            # Two files in turns: of equal events in a row the kernel keeps one.
            for _ in range(events_kept // 2 + 100):
                one.write(b"x")
                other.write(b"x")
        (models / "new").mkdir()
        write_model(models / "new" / "unheard.gguf")
        kept.process.send_signal(signal.SIGCONT)
        await kept.until(lambda: kept.ids == ["unheard"], "a scan finds it")
        write_model(models / "new" / "next.gguf")
        await kept.until(lambda: kept.ids == ["next", "unheard"], "and what comes later")


async def test_a_tree_that_is_moved_in_is_listed_and_watched(tmp_path: Path, models: Path) -> None:
    write_model(tmp_path / "elsewhere" / "a" / "b" / "inside.gguf")
    async with keeping([models], tmp_path) as kept:
        (tmp_path / "elsewhere").rename(models / "moved")
        await eventually(lambda: kept.ids == ["inside"], "what is in the tree is listed")
        write_model(models / "moved" / "a" / "b" / "later.gguf")
        await eventually(lambda: kept.ids == ["inside", "later"], "and what comes into it")
        (models / "moved" / "a").rename(models / "a")
        write_model(models / "a" / "b" / "last.gguf")
        await eventually(lambda: kept.ids == ["inside", "last", "later"], "also under its next name")
        assert {Path(model.facts.file_path).parent for model in kept.registry.models.values()} == {models / "a" / "b"}


async def test_files_written_while_the_watch_of_their_folders_begins_are_found(tmp_path: Path, models: Path) -> None:
    async with keeping([models], tmp_path) as kept:
        folders = [models / f"p{number}" / "q" for number in range(30)]
        for folder in folders:
            folder.mkdir(parents=True)
        expected = []
        for number in range(150):
            expected.append(write_model(folders[number % 30] / f"m{number}.gguf").stem)
            await asyncio.sleep(0.003)
        await eventually(kept.lists(*expected), "all are listed")


async def test_a_folder_with_the_inode_of_the_one_that_it_replaces_is_watched(tmp_path: Path, models: Path) -> None:
    folder = models / "sub"
    folder.mkdir()
    async with keeping([models], tmp_path) as kept:
        for number in range(5):
            before = folder.stat().st_ino
            folder.rmdir()
            for other in range(200):
                folder.mkdir()
                if folder.stat().st_ino == before:
                    break
                # Others are free, too; and the kernel lets go of the watch, and with it of the inode, a moment later.
                folder.rename(tmp_path / f"other{number}-{other}")
                await asyncio.sleep(0.0005)
            else:
                pytest.skip("inodes are not used again at once on this file system")
            write_model(models / f"beside{number}.gguf")
            await eventually(kept.has(f"beside{number}"), "what happened so far was heard")
            await eventually(lambda: str(folder) in kept.inventory._watch._listener._watched, "it is watched")
            write_model(folder / f"in{number}.gguf")
            await eventually(kept.has(f"in{number}"), "events in it are heard")
            (folder / f"in{number}.gguf").unlink()
            await eventually(kept.lists(*(f"beside{seen}" for seen in range(number + 1))), "also the last one")


async def test_folders_removed_and_made_anew_are_watched_each_time(tmp_path: Path, models: Path) -> None:
    (tmp_path / "always").mkdir()
    async with keeping([models, tmp_path / "always"], tmp_path) as kept:
        for number in range(4):
            # At once, so that even the inode may be the same as before.
            shutil.rmtree(models)
            write_model(models / "sub" / f"first{number}.gguf")
            await eventually(kept.lists(f"first{number}"), "the new folder's model is listed")
            write_model(models / "sub" / f"second{number}.gguf")
            await eventually(kept.lists(f"first{number}", f"second{number}"), "the new folder is watched")


async def test_a_name_that_is_not_utf8_and_is_written_all_the_time_harms_nothing(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def write_for_ever() -> None:
        path = os.fsencode(models / "odd") + b"/odd-\xff.bin"
        while not ended.wait(0.02):
            Path(os.fsdecode(path)).write_bytes(b"x")

    write_model(models / "odd" / "one.gguf")
    write_model(models / "even" / "two.gguf")
    async with keeping([models], tmp_path) as kept:
        scans, looks = kept.scanner.scans, kept.scanner.refreshes
        listener, beginnings = kept.inventory._watch._listener, 0
        begin = listener._begin

        def counted(folders: Sequence[str]) -> set[str]:
            nonlocal beginnings
            beginnings += 1
            return begin(folders)

        monkeypatch.setattr(listener, "_begin", counted)
        writing = asyncio.create_task(asyncio.to_thread(write_for_ever))
        try:
            for number in range(12):
                name = f"even{number}"
                write_model(models / "even" / f"{name}.gguf")
                await eventually(kept.has(name), "events in other folders are heard", 5)
            write_model(models / "odd" / "three.gguf")
            await eventually(lambda: "three" in kept.ids, "the folder itself is looked at")
        finally:
            ended.set()
            await writing
        assert kept.scanner.scans - scans <= 2
        assert kept.scanner.refreshes - looks <= 40
        # The folder is heard of again after a second, then two, and so on.
        assert beginnings <= 9


async def test_a_folder_whose_name_is_not_utf8_is_looked_at_again_and_again(tmp_path: Path, models: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(models) + b"/odd-\xff"))
    async with keeping([models], tmp_path) as kept:
        write_model(odd / "one.gguf")
        await eventually(lambda: kept.ids == ["one"], "its model is listed")
        write_model(odd / "two.gguf")
        await eventually(lambda: kept.ids == ["one", "two"], "the next one, too")
        write_model(models / "three.gguf")
        await eventually(lambda: kept.ids == ["one", "three", "two"], "events beside it are heard")
        kept.inventory._watch.begin_anew()
        await eventually(lambda: kept.inventory._watch.unheard == {str(odd)}, "that is all that is not heard")


async def test_links_in_circles_and_to_everywhere_are_not_followed_by_the_watch(tmp_path: Path, models: Path) -> None:
    for name in "abcdefgh":
        (models / name).mkdir()
        for other in "abcdefgh":
            (models / name / f"to-{other}").symlink_to(models / other)
    (models / "round").symlink_to(models)
    (models / "everything").symlink_to("/")
    async with keeping([models], tmp_path) as kept:
        write_model(models / "h" / "heard.gguf")
        await eventually(lambda: kept.ids == ["heard"], "events are heard")
        assert len(kept.inventory._watch._listener._watched) == 9


@as_root
async def test_a_folder_that_may_not_be_read_hides_no_event_of_others(open_to_all: Path) -> None:
    models = open_to_all / "models"
    for number in range(8):
        folder = models / f"{number}"
        write_model(folder / f"m{number}.gguf")
        (models / f"lost+found{number}").mkdir(0o700)
    async with watching(models, open_to_all, "--user", str(UNPRIVILEGED)) as kept:
        for number in range(8):
            write_model(models / f"{number}" / f"n{number}.gguf")
        await kept.until(lambda: len(kept.ids) == 16, "events in all the others are heard")
        assert kept.now["unheard"] == []
        write_model(models / "lost+found3" / "found.gguf")
        (models / "lost+found3").chmod(0o755)
        await kept.until(lambda: "found" in kept.ids, "it is listed once it may be read")
        write_model(models / "lost+found3" / "next.gguf")
        await kept.until(lambda: "next" in kept.ids, "and watched")


@as_root
async def test_without_a_watch_left_folders_are_looked_at_instead(
    models: Path, tmp_path: Path, in_namespace: tuple[str, ...]
) -> None:
    for number in range(6):
        write_model(models / f"{number}" / f"m{number}.gguf")
    async with watching(models, tmp_path, "--watches", "3", prefix=in_namespace) as kept:
        assert len(kept.ids) == 6
        await kept.until(lambda: len(kept.now["unheard"]) == 7, "it is known that nothing is heard")
        write_model(models / "5" / "later.gguf")
        await kept.until(lambda: "later" in kept.ids, "a look finds it")
        (models / "0" / "m0.gguf").unlink()
        await kept.until(lambda: "m0" not in kept.ids, "and what goes")
        await kept.until(lambda: kept.log.count(b"is heard of for now") == 1, "it was said, once")


async def test_folders_in_hundreds_come_and_go_without_instances_piling_up(tmp_path: Path, models: Path) -> None:
    async with keeping([models], tmp_path) as kept:
        listener = kept.inventory._watch._listener
        for number in range(120):
            write_model(models / f"f{number}" / f"m{number}.gguf")
            if number % 12 == 0:
                await eventually(kept.has(f"m{number}"), "all so far are listed")
        await eventually(
            lambda: len(listener._watched) == 121 and len(listener._instances) <= 4, "all are watched, by few instances"
        )
        for number in range(120):
            shutil.rmtree(models / f"f{number}")
        await eventually(lambda: kept.ids == [] and len(listener._watched) == 1, "all are gone")
        write_model(models / "last.gguf")
        await eventually(lambda: kept.ids == ["last"], "the rest is heard of")


async def test_doubts_without_end_cost_no_scan_each(tmp_path: Path, models: Path) -> None:
    for number in range(300):
        write_model(models / f"m{number}.gguf")
    async with keeping([models], tmp_path) as kept:
        scans = kept.scanner.scans
        for _ in range(100):
            kept.inventory._doubt()
            await asyncio.sleep(0.005)
        assert kept.scanner.scans - scans <= 5
        with contextlib.suppress(FileNotFoundError):
            (models / "m0.gguf").unlink()
        await eventually(lambda: len(kept.ids) == 299, "events are heard as ever")
