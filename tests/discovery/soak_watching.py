"""What takes too long for every run of the tests: `make soak`."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from magi_agent.discovery.scanner import Scanner
from tests.discovery.model_files import model_bytes, write_file
from tests.discovery.watching_process import watching
from tests.registry.kept_inventory import eventually, keeping

FILES = 300_000
MINUTES = int(os.environ.get("SOAK_MINUTES", "3"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def write_model(path: Path) -> Path:
    return write_file(path, model_bytes("llama", texts={"general.name": path.name}))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("held_up", [True, False])
async def test_hundreds_of_thousands_of_files(models: Path, tmp_path: Path, held_up: bool) -> None:
    gone = write_model(models / "gone.gguf")
    async with watching(models, tmp_path) as kept:
        if held_up:
            kept.process.send_signal(signal.SIGSTOP)
        for number in range(FILES):
            (models / f"{number:06d}").touch()
        write_model(models / "new" / "unheard.gguf")
        gone.unlink()
        kept.process.send_signal(signal.SIGCONT)
        await kept.until(lambda: kept.ids == ["unheard"], "what came and went is found", 60)
        write_model(models / "new" / "next.gguf")
        await kept.until(lambda: kept.ids == ["next", "unheard"], "and what comes later", 60)


class Upheaval:
    """Random things that happen in a folder of models."""

    def __init__(self, top: Path, chance: random.Random) -> None:
        self.top = top
        self.chance = chance
        self.acts = 0
        self._folders = [top, top / "a", top / "a" / "b", top / "c", top / "c" / "d" / "e"]
        self._choices = [self.write] * 6 + [self.clear, self.move, self.write_odd, self.remove, self.rename, self.tidy]

    def act(self) -> None:
        self.acts += 1
        self.chance.choice(self._choices)()

    def write(self) -> None:
        write_model(self.chance.choice(self._folders) / f"m{self.acts}.gguf")

    def write_odd(self) -> None:
        folder = self.chance.choice(self._folders)
        if folder.is_dir():
            Path(os.fsdecode(os.fsencode(folder) + b"/odd-\xff")).touch()

    def clear(self) -> None:
        shutil.rmtree(self.chance.choice(self._folders), ignore_errors=True)
        self.top.mkdir(exist_ok=True)

    def move(self) -> None:
        there = [path for path in self._folders[1:] if path.is_dir()]
        if there:
            self.chance.choice(there).rename(self.top / f"moved{self.acts}")

    def remove(self) -> None:
        for path in list(self.top.rglob("*.gguf"))[:20]:
            path.unlink()

    def rename(self) -> None:
        there = list(self.top.rglob("*.gguf"))
        if there:
            path = self.chance.choice(there)
            path.rename(path.with_name(f"renamed{self.acts}.gguf"))

    def tidy(self) -> None:
        for path in [path for path in self.top.iterdir() if path.name.startswith("moved")][:5]:
            shutil.rmtree(path)


@pytest.mark.timeout(60 * MINUTES + 120)
async def test_minutes_of_anything_end_where_a_fresh_scan_does(tmp_path: Path, models: Path) -> None:
    seed = int(os.environ.get("SOAK_SEED", "0")) or random.randrange(1, 2**32)
    upheaval = Upheaval(models, random.Random(seed))
    ended = time.monotonic() + 60 * MINUTES
    async with keeping([models], tmp_path) as kept:
        while time.monotonic() < ended:
            for _ in range(upheaval.chance.randrange(1, 30)):
                upheaval.act()
                await asyncio.sleep(upheaval.chance.choice([0, 0, 0.001, 0.05]))
            there = {facts.file_path for facts in Scanner([models]).scan().models}
            await eventually(
                kept.has_paths(there),
                f"{upheaval.acts} acts of SOAK_SEED={seed} are known",
                20,
            )
        print(f"{upheaval.acts} acts, {kept.scanner.scans} scans, {kept.scanner.refreshes} looks")
