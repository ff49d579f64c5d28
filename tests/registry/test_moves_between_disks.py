"""Files that move between two real disks (tmpfs mounts) while the inventory watches, or while it does not run."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from magi_agent.registry.model import Choices
from magi_agent.vocabulary import ModelStatus, Tier
from tests.discovery.model_files import model_bytes, write_file, write_split
from tests.faulty_disk import small_disk
from tests.registry.kept_inventory import LONG, Kept, eventually, keeping

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, as root")

SET = "big-00001-of-00003.gguf"


@dataclass(frozen=True, slots=True)
class Disks:
    """Two disks with a model folder each, and a place for the registry."""

    one: Path
    two: Path
    state: Path

    @property
    def folders(self) -> list[Path]:
        return [self.one / "models", self.two / "models"]


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with ExitStack() as stack:
        one, two = (stack.enter_context(small_disk(tmp_path / name, 512)) for name in ("one", "two"))
        for folder in (one / "models", two / "models", tmp_path / "aside"):
            folder.mkdir()
        assert one.stat().st_dev != two.stat().st_dev
        yield Disks(one, two, tmp_path)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


async def choose(kept: Kept, model_id: str, choices: Choices) -> None:
    await kept.registry.choose(model_id, lambda _: choices)


def path_of(kept: Kept, model_id: str) -> str | None:
    model = kept.registry.models.get(model_id)
    return model.facts.file_path if model else None


def is_whole_at(kept: Kept, model_id: str, path: Path) -> bool:
    return path_of(kept, model_id) == str(path) and kept.status(model_id) is ModelStatus.OK


async def copied(kept: Kept, sources: list[Path], to: Path, model_id: str) -> list[Path]:
    """Copy the parts of one model, and see that the copy is listed."""
    copies = [Path(await asyncio.to_thread(shutil.copy2, source, to)) for source in sources]
    await eventually(lambda: kept.status(model_id) is ModelStatus.OK, f"{model_id} is whole")
    return copies


@pytest.mark.parametrize("split", [False, True], ids=["one file", "split set"])
@pytest.mark.parametrize("restarted", [False, True], ids=["watched", "restarted between"])
async def test_a_copy_is_listed_and_then_the_original_goes(disks: Disks, split: bool, restarted: bool) -> None:
    here, there = disks.folders
    sources = write_split(here, "big", 3) if split else [write_file(here / "big.gguf", model_bytes())]
    model_id = "big"
    async with keeping(disks.folders, disks.state) as kept:
        assert kept.ids == [model_id]
        await choose(kept, model_id, Choices(port=8081))
        copies = await copied(kept, sources, there, "big-models")
        assert path_of(kept, model_id) == str(sources[0])
        if not restarted:
            for part in sources:
                await asyncio.to_thread(part.unlink)
                await asyncio.sleep(0.3)
            await eventually(lambda: is_whole_at(kept, model_id, copies[0]), "the model goes on at the copy")
    if restarted:
        async with keeping(disks.folders, disks.state) as kept:
            assert kept.ids == [model_id, "big-models"]
            for part in sources:
                await asyncio.to_thread(part.unlink)
                await asyncio.sleep(0.3)
            await eventually(lambda: is_whole_at(kept, model_id, copies[0]), "the model goes on at the copy")
    async with keeping(disks.folders, disks.state) as kept:
        assert kept.ids == [model_id]
        assert kept.registry.model(model_id).choices.port == 8081


@pytest.mark.parametrize("split", [False, True], ids=["one file", "split set"])
async def test_mv_itself(disks: Disks, split: bool) -> None:
    here, there = disks.folders
    sources = write_split(here, "big", 3) if split else [write_file(here / "big.gguf", model_bytes())]
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "big", Choices(port=8081))
        for part in sources:
            await asyncio.to_thread(run, "mv", part, there)
            await asyncio.sleep(0.4)
        await eventually(lambda: is_whole_at(kept, "big", there / sources[0].name), "it is the same model there")
        assert kept.ids == ["big"]
        assert kept.registry.model("big").choices.port == 8081


async def test_the_configured_folder_itself_is_moved(disks: Disks) -> None:
    here, _ = disks.folders
    write_file(here / "big.gguf", model_bytes())
    (disks.two / "models").rmdir()
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "big", Choices(port=8081))
        await asyncio.to_thread(run, "cp", "-r", here, disks.two)
        await eventually(kept.lists("big", "big-models"), "the copy is listed")
        await asyncio.to_thread(run, "rm", "-r", here)
        await eventually(lambda: is_whole_at(kept, "big", disks.two / "models" / "big.gguf"), "it goes on there")
        assert kept.ids == ["big"]


@pytest.mark.parametrize("split", [False, True], ids=["one file", "split set"])
@pytest.mark.parametrize("half", [False, True], ids=["all of it", "begun before"])
async def test_a_move_while_no_agent_runs(disks: Disks, split: bool, half: bool) -> None:
    here, there = disks.folders
    sources = write_split(here, "big", 3) if split else [write_file(here / "big.gguf", model_bytes())]
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "big", Choices(port=8081))
        if half and split:
            await asyncio.to_thread(shutil.move, sources[0], there)
            await eventually(kept.lists("big", "big-models"), "both are listed, and incomplete")
            await eventually(lambda: kept.status("big") is ModelStatus.INCOMPLETE, "a part is gone")
        elif half:
            (there / "big.gguf").write_bytes(sources[0].read_bytes()[:-1])
            await eventually(kept.lists("big", "big-models"), "both are listed, one of them incomplete")
    for part in sources:
        if part.exists():
            shutil.move(part, there / part.name)
    async with keeping(disks.folders, disks.state) as kept:
        assert is_whole_at(kept, "big", there / sources[0].name)
        assert kept.ids == ["big"]
        assert kept.registry.model("big").choices.port == 8081


async def test_a_copy_for_which_something_was_chosen_stays_a_model_of_its_own(disks: Disks) -> None:
    here, there = disks.folders
    source = write_file(here / "big.gguf", model_bytes())
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "big", Choices(port=8081))
        await copied(kept, [source], there, "big-models")
        await choose(kept, "big-models", Choices(tier_override=Tier.FAST))
        source.unlink()
        await eventually(kept.lists("big-models"), "the original goes")
        shutil.copy2(there / "big.gguf", here)
        await eventually(kept.lists("big", "big-models"), "and comes back")
        choices = {model_id: kept.registry.model(model_id).choices for model_id in kept.ids}
        assert choices == {"big": Choices(port=8081), "big-models": Choices(tier_override=Tier.FAST)}


async def test_a_disk_that_is_taken_out_leaves_no_id_to_the_copy_elsewhere(disks: Disks, tmp_path: Path) -> None:
    here, there = disks.folders
    source = write_file(here / "big.gguf", model_bytes())
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "big", Choices(port=8081))
        await copied(kept, [source], there, "big-models")
        await asyncio.to_thread(run, "mount", "--move", disks.one, tmp_path / "aside")
        await eventually(kept.lists("big-models"), "the disk is gone")
        await asyncio.to_thread(run, "mount", "--move", tmp_path / "aside", disks.one)
        await eventually(kept.lists("big", "big-models"), "and back")
        assert (path_of(kept, "big"), path_of(kept, "big-models")) == (str(source), str(there / "big.gguf"))
        assert kept.registry.model("big").choices.port == 8081


async def test_one_checkpoint_goes_and_another_comes(disks: Disks) -> None:
    here, there = disks.folders
    content = model_bytes(elements=1024)
    first = write_file(here / "step-100.gguf", content)
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "step-100", Choices(port=8081))
        async with kept.inventory._one_look:  # so that both are seen at once
            first.unlink()
            write_file(there / "step-200.gguf", content[:-1] + b"\1")
            await asyncio.sleep(0.3)
        await eventually(kept.lists("step-200"), "it is another model")
        assert kept.registry.model("step-200").choices == Choices()
        write_file(here / "again.gguf", content)
        await eventually(kept.lists("step-100", "step-200"), "and the first comes back with its content")
        assert kept.registry.model("step-100").choices.port == 8081


async def test_what_an_earlier_agent_left_is_known_by_its_header(disks: Disks) -> None:
    here, there = disks.folders
    content = model_bytes(elements=1024)
    source = write_file(here / "big.gguf", content)
    async with keeping(disks.folders, disks.state) as kept:
        await choose(kept, "big", Choices(port=8081))
    registry = disks.state / "registry.json"
    text = registry.read_text()
    sample = kept.registry.models["big"].facts.sample
    assert sample is not None
    assert text.count(f', "sample": "{sample}"') == 1
    registry.write_text(text.replace(f', "sample": "{sample}"', ""))
    shutil.move(source, there)
    async with keeping(disks.folders, disks.state) as kept:
        assert is_whole_at(kept, "big", there / "big.gguf")
        assert kept.registry.models["big"].facts.sample == sample
    assert sample in registry.read_text()


async def test_a_sample_that_is_taken_of_a_known_file_is_kept_at_once_and_no_news(disks: Disks) -> None:
    write_file(disks.folders[0] / "big.gguf", model_bytes())
    async with keeping(disks.folders, disks.state) as kept:
        sample = kept.registry.models["big"].facts.sample or ""
    registry = disks.state / "registry.json"
    registry.write_text(registry.read_text().replace(f', "sample": "{sample}"', ""))
    assert sample not in registry.read_text()
    again = Kept(disks.folders, disks.state, LONG)
    await again.registry.load()
    rescan = await again.inventory.rescan()
    assert (rescan.models_found, rescan.models_added, rescan.models_removed) == (1, 0, 0)
    assert sample in registry.read_text()
