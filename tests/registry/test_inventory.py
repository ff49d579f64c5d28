"""Keeping the registry in step with real folders, by real inotify."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from magi_agent.errors import RescanFailed
from magi_agent.vocabulary import ModelStatus
from tests.conftest import MakeToyModel
from tests.registry.kept_inventory import LONG, Kept, eventually, keeping


async def test_a_copied_file_comes_and_a_removed_one_goes(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    first = toy_model(models / "one.gguf")
    other = toy_model(tmp_path / "other.gguf", name="Other")
    async with keeping([models], tmp_path) as kept:
        assert kept.ids == ["one"]
        scans = kept.scanner.scans
        shutil.copyfile(other, models / "two.gguf")
        await eventually(lambda: kept.status("two") is ModelStatus.OK, "the copy is listed and whole")
        first.unlink()
        await eventually(lambda: kept.ids == ["two"], "the removed one is gone")

        assert kept.scanner.scans == scans


async def test_a_file_written_slowly_costs_a_few_looks(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    content = toy_model(tmp_path / "whole.gguf").read_bytes()
    models.mkdir()
    async with keeping([models], tmp_path) as kept:
        step = len(content) // 40
        with (models / "slow.gguf").open("wb") as file:
            for begin in range(0, len(content), step):
                file.write(content[begin : begin + step])
                file.flush()
                await asyncio.sleep(0.05)
        await eventually(lambda: kept.status("slow") is ModelStatus.OK, "it is whole")

        # 41 writes over two seconds and more.
        assert kept.scanner.refreshes <= 12


async def test_a_folder_that_is_moved_in_brings_its_models(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    models.mkdir()
    toy_model(tmp_path / "elsewhere" / "deep" / "inside.gguf")
    async with keeping([models], tmp_path) as kept:
        (tmp_path / "elsewhere").rename(models / "moved")
        await eventually(lambda: kept.ids == ["inside"], "what is in the folder is listed")


async def test_a_folder_removed_and_made_anew_is_watched_again(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    toy_model(models / "before.gguf")
    always = tmp_path / "always"
    always.mkdir()
    async with keeping([models, always], tmp_path) as kept:
        shutil.rmtree(models)
        await eventually(lambda: kept.ids == [], "the folder's model is gone")
        toy_model(models / "after.gguf", name="after")
        await eventually(lambda: kept.ids == ["after"], "the new folder's model is listed")
        toy_model(models / "later.gguf", name="later")
        await eventually(lambda: kept.ids == ["after", "later"], "the new folder is watched")


async def test_a_folder_that_appears_late_is_found(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    async with keeping([models], tmp_path) as kept:
        assert kept.ids == []
        toy_model(models / "late.gguf")
        await eventually(lambda: kept.ids == ["late"], "the late folder's model is listed")


async def test_a_name_that_is_not_utf8_does_not_end_the_watch(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    plain = toy_model(models / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        shutil.copyfile(plain, os.fsencode(models) + b"/odd-\xff.gguf")
        await eventually(lambda: len(kept.ids) == 2, "the odd one is listed")
        shutil.copyfile(plain, models / "three.gguf")
        await eventually(lambda: "three" in kept.ids, "the next one is listed too", 30)


async def test_the_periodic_scan_finds_what_no_event_told(
    tmp_path: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    toy_model(models / "one.gguf")
    monkeypatch.setattr("magi_agent.discovery.watching._may_matter", lambda *_: False)
    async with keeping([models], tmp_path, interval=0.5) as kept:
        toy_model(models / "silent.gguf")
        await eventually(lambda: kept.ids == ["one", "silent"], "a scan finds it")


async def test_a_preallocated_download_becomes_whole_in_place(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    models.mkdir()
    content = toy_model(tmp_path / "whole.gguf").read_bytes()
    async with keeping([models], tmp_path) as kept:
        with (models / "download.gguf").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, len(content))
            await eventually(lambda: kept.status("download") is ModelStatus.INCOMPLETE, "it is listed as incomplete")
            file.write(content)
        await eventually(lambda: kept.status("download") is ModelStatus.OK, "it is whole")


async def test_a_rescan_counts_what_came_and_went(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    gone = toy_model(models / "gone.gguf")
    toy_model(models / "stays.gguf", name="another", seed=2)
    kept = Kept([models], tmp_path, LONG)
    await kept.registry.load()
    first = await kept.inventory.rescan()
    gone.unlink()
    toy_model(models / "comes.gguf", name="third", seed=3)
    second = await kept.inventory.rescan()

    assert (first.models_found, first.models_added, first.models_removed) == (2, 2, 0)
    assert (second.models_found, second.models_added, second.models_removed) == (2, 1, 1)
    assert not kept.inventory.scanning


async def test_a_rescan_of_nothing_but_missing_folders_fails_and_changes_nothing(
    tmp_path: Path, toy_model: MakeToyModel
) -> None:
    models = tmp_path / "models"
    toy_model(models / "one.gguf")
    kept = Kept([models], tmp_path, LONG)
    await kept.registry.load()
    await kept.inventory.rescan()
    models.rename(tmp_path / "unmounted")

    with pytest.raises(RescanFailed) as failed:
        await kept.inventory.rescan()

    assert str(models) in failed.value.message
    assert list(failed.value.details["folders"]) == [str(models)]  # type: ignore[call-overload]
    assert kept.ids == ["one"]


async def test_the_only_folder_that_goes_while_it_is_watched_takes_nothing_with_it(
    tmp_path: Path, toy_model: MakeToyModel
) -> None:
    models = tmp_path / "models"
    toy_model(models / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        refreshes = kept.scanner.refreshes
        models.rename(tmp_path / "unmounted")
        await eventually(lambda: kept.inventory.problems != () or kept.scanner.refreshes > refreshes, "it is seen")
        await eventually(lambda: kept.inventory.problems != (), "it is told")
        assert kept.ids == ["one"]
        (tmp_path / "unmounted").rename(models)
        toy_model(models / "two.gguf")
        await eventually(kept.lists("one", "two"), "the folder is back")


async def test_a_model_without_file_stays_listed_as_missing_while_its_server_runs(
    tmp_path: Path, toy_model: MakeToyModel
) -> None:
    models = tmp_path / "models"
    file = toy_model(models / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        kept.running = {"one"}
        file.unlink()
        await eventually(lambda: kept.status("one") is ModelStatus.MISSING, "it is missing")
        kept.running = set()
        kept.inventory.look_again()
        await eventually(lambda: kept.ids == [], "it goes with its server")


async def test_the_watch_ends_with_the_inventory(tmp_path: Path) -> None:
    def watches() -> bool:
        return any(thread.name.startswith("folder-watch") for thread in threading.enumerate())

    models = tmp_path / "models"
    models.mkdir()
    async with keeping([models], tmp_path):
        assert watches()
    await eventually(lambda: not watches(), "the thread ends")


async def test_what_was_known_before_a_restart_is_no_news(tmp_path: Path, toy_model: MakeToyModel) -> None:
    models = tmp_path / "models"
    toy_model(models / "one.gguf")
    before = Kept([models], tmp_path, LONG)
    await before.registry.load()
    await before.inventory.rescan()
    after = Kept([models], tmp_path, LONG)
    await after.registry.load()
    merged = await after.registry.merge(after.scanner.scan().models, ())

    assert not merged.is_news
    assert after.registry.model("one").facts.header is not None


async def test_looks_that_fail_again_and_again_are_paced_and_said_once(
    tmp_path: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "models"
    toy_model(models / "one.gguf")
    async with keeping([models], tmp_path) as kept:
        monkeypatch.setattr(type(kept.inventory._watch), "unheard", frozenset([str(models)]))
        models.rename(tmp_path / "unmounted")
        loop = asyncio.get_running_loop()
        before, began = kept.scanner.refreshes + kept.scanner.scans, loop.time()
        kept.inventory.look_again()
        await eventually(lambda: kept.scanner.refreshes + kept.scanner.scans >= before + 3, "it is looked at", 60)

        assert loop.time() - began > 2
        failures = [line for line in caplog.records if line.levelno == logging.ERROR]
        assert len(failures) == 1
        assert kept.ids == ["one"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
async def test_a_folder_that_cannot_be_read_for_now_keeps_what_is_known_of_it(
    tmp_path: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    models = tmp_path / "models"
    disk = toy_model(models / "disk" / "one.gguf").parent
    toy_model(disk / "deep" / "two.gguf", name="two")
    kept = Kept([models], tmp_path, LONG)
    await kept.registry.load()
    await kept.inventory.rescan()
    scandir = os.scandir

    def failing(path: str) -> object:
        if path == str(disk):
            raise OSError(number, os.strerror(number))
        return scandir(path)

    # No disk can be made to fail here.
    monkeypatch.setattr("magi_agent.discovery.folders.os.scandir", failing)
    await kept.inventory.rescan()
    assert kept.ids == ["one", "two"]
    assert [problem.path for problem in kept.inventory.problems] == [str(disk)]
    assert len(kept.scanner.refresh([str(disk)]).models) == 2
    monkeypatch.undo()
    (disk / "one.gguf").unlink()
    await kept.inventory.rescan()
    assert (kept.ids, kept.inventory.problems) == (["two"], ())


async def test_many_problems_are_told_in_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for number in range(500):
        (models / f"mmproj-{number}.gguf").write_bytes(b"GGUF" + bytes(60))
    kept = Kept([models], tmp_path, LONG)
    await kept.registry.load()
    await kept.inventory.rescan()

    assert len(kept.inventory.problems) == 101
    assert kept.inventory.problems[-1].message == "400 more problems"
    lines = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    assert (len(lines), lines[-1]) == (21, "and 480 more problems in the model folders")
