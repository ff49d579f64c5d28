"""Whole folders of damaged headers: every file is listed or left out, with sound facts, and nothing is ever raised."""

from __future__ import annotations

import math
import random
from pathlib import Path

import psutil
import pytest

from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.scanner import Scanner
from magi_agent.registry.merging import merge
from magi_agent.registry.stored import RegistryContent, RegistryWriter, read_registry
from magi_agent.vocabulary import ModelStatus
from tests.gguf.damaged import damaged_header, fuzz_cases, fuzz_seed

_A_FOLDER = 200
NAMES = [
    "{0}.gguf",
    "Qwen3-30B-A3B-Instruct-2507-Q4_K_M-{0}.gguf",
    "mmproj-{0}-F16.gguf",
    "mmproj.{0}.gguf",
    "set-{1}-0000{2}-of-00003.gguf",
    "bge-reranker-{0}.Q8_0.GGUF",
]


def write_folder(folder: Path, seed: str, numbers: range) -> None:
    """One file for each number; some are parts of sets, by their names."""
    folder.mkdir()
    random_ = random.Random(f"{seed}:{numbers.start}")
    for number in numbers:
        name = random_.choice(NAMES).format(number, random_.randrange(20), random_.randrange(1, 4))
        (folder / name).write_bytes(damaged_header(seed, number))


def check_facts(facts: ModelFacts) -> None:
    assert (facts.problem is None) == (facts.status is ModelStatus.OK)
    shown = [facts.problem, facts.display_name, facts.family, facts.quantization, facts.version, facts.architecture]
    if facts.header is not None:
        shown += [facts.header.name, facts.header.basename, facts.header.finetune, facts.header.size_label]
    assert all(text is None or (text.isprintable() and len(text) <= 1000) for text in shown)
    assert all((facts.display_name, facts.family, facts.quantization, facts.parts))
    assert math.isfinite(facts.size_params)
    assert facts.size_params >= 0
    assert (facts.projector_path or "") == "".join(facts.projectors[:1])
    assert facts.is_embedding or not facts.is_reranker


def test_a_folder_of_damaged_headers_is_scanned_with_sound_facts(tmp_path: Path):
    seed, cases = fuzz_seed(), fuzz_cases(2000)
    print(f"FUZZ_SEED={seed} FUZZ_CASES={cases}")
    process = psutil.Process()
    resident = 0
    statuses: set[ModelStatus] = set()
    for start in range(0, cases, _A_FOLDER):
        folder = tmp_path / str(start)
        write_folder(folder, seed, range(start, min(start + _A_FOLDER, cases)))
        try:
            result = Scanner([folder]).scan()
            for facts in result.models:
                check_facts(facts)
                statuses.add(facts.status)
            assert all(str(problem).isprintable() for problem in result.problems)
            models = merge({}, result.models, ()).models
            assert len(models) == len(result.models)
            reading = read_registry(RegistryWriter().written(RegistryContent(models)))
            assert (reading.problems, reading.content.models) == ((), models)
        except Exception as error:
            raise AssertionError(f"cases {start} to {start + _A_FOLDER - 1} of FUZZ_SEED={seed}: {error!r}") from error
        for path in folder.iterdir():
            path.unlink()
        if start >= cases // 4 and not resident:
            resident = process.memory_info().rss
    assert process.memory_info().rss - resident < 32 * 1024 * 1024
    assert statuses == {ModelStatus.OK, ModelStatus.INCOMPLETE, ModelStatus.INVALID}


@pytest.mark.parametrize("rewrites", [3])
def test_files_that_are_damaged_anew_again_and_again_are_as_a_new_scanner_sees_them(tmp_path: Path, rewrites: int):
    folder = tmp_path / "models"
    write_folder(folder, "rewritten", range(100))
    scanner = Scanner([folder])
    scanner.scan()
    for turn in range(rewrites):
        paths = sorted(folder.iterdir())[turn::3]
        for number, path in enumerate(paths):
            path.write_bytes(damaged_header(f"turn {turn}", number))
        known = scanner.refresh(map(str, paths))
        new = Scanner([folder]).scan()
        assert known.models == new.models
        assert set(known.problems) == set(new.problems)
