"""Facts of files by their paths: read once, read again when the file is another, and never waited for too long."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from magi_agent.memory.need import NeedUnknown
from magi_agent.servers import file_facts
from magi_agent.servers.file_facts import FileFacts
from tests.conftest import MakeToyModel
from tests.fuse_mount import fuse_mount


async def test_a_header_is_read_once_for_each_state_of_its_file(
    tmp_path: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_model(tmp_path / "toy.gguf", context_length=512)
    facts = FileFacts()
    first = await facts.of(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(file_facts, "read_facts", lambda _: pytest.fail("it was read before"))
        assert await facts.of(str(path)) is first
    toy_model(tmp_path / "new", context_length=1024).replace(path)
    assert (await facts.of(str(path))).context_length == 1024


async def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    facts = FileFacts()
    with pytest.raises(NeedUnknown, match=r"text\.gguf cannot be used: .*does not begin as a GGUF"):
        await facts.of(str(tmp_path / "text.gguf"))
    with pytest.raises(NeedUnknown, match=r"gone\.gguf cannot be read: No such file"):
        await facts.of(str(tmp_path / "gone.gguf"))
    assert not facts._reading


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_file_system_that_does_not_answer_is_said(
    tmp_path: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_facts, "_PATIENCE", 0.3)
    source, point = tmp_path / "source", tmp_path / "point"

    facts = FileFacts()
    path = str(point / "toy.gguf")
    with fuse_mount(source, point) as mount:
        toy_model(source / "toy.gguf")
        with mount.silent():
            refusals = await asyncio.gather(facts.of(path), facts.of(path), return_exceptions=True)
            assert [str(refusal) for refusal in refusals] == [f"the file system of {path} does not answer"] * 2
            assert len(facts._reading) == 1
        async with asyncio.timeout(30):
            await asyncio.wait(facts._reading.values())
        assert (await facts.of(path)).architecture == "llama"


async def test_reading_is_bounded_and_ends_when_nobody_needs_it(
    tmp_path: Path, toy_model: MakeToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_facts, "_MOST_READING", 0)
    facts = FileFacts()
    with pytest.raises(NeedUnknown, match="ask again"):
        await facts.of(str(toy_model(tmp_path / "toy.gguf")))
    monkeypatch.setattr(file_facts, "_MOST_READING", 1)
    waiting = asyncio.create_task(facts.of(str(tmp_path / "toy.gguf")))
    await asyncio.sleep(0)
    await facts.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not facts._reading
