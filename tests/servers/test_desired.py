"""What is desired: kept for one boot, and never half changed."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from magi_agent.errors import RegistrySaveFailed, ServiceUnavailable
from magi_agent.servers.desired import Desired
from tests.conftest import SystemdUser


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "desired.json"


@pytest.fixture
def full_disk(tmp_path: Path, systemd_user: SystemdUser) -> Iterator[Path]:
    """A folder on a file system of 64 KiB, with no room left."""
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return filler
    raise AssertionError("the disk is never full")


def _document(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)


async def test_a_new_boot_begins_with_no_wishes(path: Path) -> None:
    desired = Desired(path)

    assert not await desired.load("boot-1")
    assert desired.wishes == {}
    assert desired["a"] is None
    assert not desired.wants("a")


async def test_wishes_outlive_the_agent_with_who_said_so_and_when(path: Path) -> None:
    before = datetime.now(UTC)
    desired = Desired(path)
    await desired.load("boot-1")
    await desired.wish(["a", "b"], run=True, by="somebody")
    await desired.wish_each({"b": False, "c": True}, by="profile x")

    again = Desired(path)
    assert await again.load("boot-1")
    assert again.wishes == desired.wishes
    assert {model_id: (wish.run, wish.by) for model_id, wish in again.wishes.items()} == {
        "a": (True, "somebody"),
        "b": (False, "profile x"),
        "c": (True, "profile x"),
    }
    assert all(before <= wish.at <= datetime.now(UTC) for wish in again.wishes.values())
    assert again.wants("a")
    assert not again.wants("b")


async def test_wishes_of_another_boot_are_void_and_overwritten_by_the_first_new_one(path: Path) -> None:
    desired = Desired(path)
    await desired.load("boot-1")
    await desired.wish(["a"], run=True, by="somebody")

    later = Desired(path)
    assert not await later.load("boot-2")
    assert later.wishes == {}
    await later.wish(["b"], run=True, by="somebody")
    document = _document(path)
    assert (document["boot"], list(document["models"])) == ("boot-2", ["b"])


async def test_nothing_can_be_wished_before_it_is_known_which_boot_this_is(path: Path) -> None:
    desired = Desired(path)

    with pytest.raises(ServiceUnavailable):
        await desired.wish(["a"], run=True, by="somebody")
    assert _names(path.parent) == set()


async def test_a_save_that_fails_leaves_everything_as_it_was(full_disk: Path) -> None:
    path = full_disk / "desired.json"
    desired = Desired(path)
    await desired.load("boot-1")
    await desired.wish(["a"], run=True, by="somebody")
    on_disk, wishes = path.read_bytes(), dict(desired.wishes)
    told: list[None] = []
    desired.on_change = lambda: told.append(None)
    filler = _fill(full_disk)

    with pytest.raises(RegistrySaveFailed, match="No space left on device; nothing was changed") as failed:
        await desired.wish([f"model-{number}" for number in range(200)], run=True, by="somebody")

    assert failed.value.details == {"path": str(path), "reason": "No space left on device"}
    assert desired.wishes == wishes
    assert path.read_bytes() == on_disk
    assert _names(full_disk) == {path.name, filler.name}
    assert told == []
    filler.unlink()
    await desired.wish(["b"], run=True, by="somebody")
    assert desired.wants("b")
    assert told == [None]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"boot": "boot-1"}', b'{"boot": "boot-1", "models": {"a": {"run": "perhaps"}}}'],
)
async def test_a_damaged_file_is_no_wish_and_is_said_so(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    _write(path, content)
    desired = Desired(path)

    assert not await desired.load("boot-1")
    assert desired.wishes == {}
    assert f"{path} cannot be read and is made anew" in caplog.text
    await desired.wish(["a"], run=True, by="somebody")
    assert await Desired(path).load("boot-1")


async def test_what_a_later_agent_adds_to_the_file_is_no_harm(path: Path) -> None:
    wish = {"run": True, "by": "x", "at": "2026-01-01T00:00:00Z", "why": "new"}
    _write(path, json.dumps({"boot": "boot-1", "models": {"a": wish}, "version": 9}).encode())
    desired = Desired(path)

    assert await desired.load("boot-1")
    assert desired.wants("a")


async def test_temporary_files_of_a_killed_agent_are_removed(path: Path) -> None:
    _write(path.with_name(f".{path.name}.abc.tmp"), b"half of")
    await Desired(path).load("boot-1")

    assert _names(path.parent) == set()


async def test_changes_at_once_are_made_one_after_another(path: Path) -> None:
    desired = Desired(path)
    await desired.load("boot-1")
    told: list[int] = []
    desired.on_change = lambda: told.append(len(desired.wishes))
    await asyncio.gather(*(desired.wish([f"model-{number}"], run=True, by="x") for number in range(50)))

    assert told == list(range(1, 51))
    again = Desired(path)
    await again.load("boot-1")
    assert again.wishes == desired.wishes
    assert len(again.wishes) == 50


async def test_a_caller_that_goes_away_leaves_file_and_memory_agreeing(path: Path) -> None:
    desired = Desired(path)
    await desired.load("boot-1")
    for number in range(20):
        callers = [
            asyncio.create_task(desired.wish([f"model-{number}"], run=run, by="x")) for run in (True, False, True)
        ]
        for _ in range(number % 5):
            await asyncio.sleep(0)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    await desired.wish(["last"], run=True, by="x")

    again = Desired(path)
    await again.load("boot-1")
    assert again.wishes == desired.wishes
