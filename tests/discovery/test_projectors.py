"""Multimodal projectors: told by their metadata, paired with their model, never a model themselves."""

import os
from pathlib import Path

import pytest

from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.scanner import Scanner
from tests.discovery.model_files import model_bytes, write_file

F16, BF16, F32 = 1, 32, 0
MODEL = model_bytes("gemma3", texts={"general.name": "Gemma 3 4B It"})


def projector(file_type: int = F16, *, name: str | None = None, kind: str | None = "mmproj") -> bytes:
    texts = {"general.name": name} if name else {}
    if kind:
        texts["general.type"] = kind
    return model_bytes("clip", texts=texts, numbers={"general.file_type": file_type})


def pairs(folder: Path) -> dict[str, str | None]:
    return {
        facts.filename: os.path.basename(facts.projector_path) if facts.projector_path else None  # noqa: PTH119
        for facts in Scanner([folder]).scan().models
    }


def models(folder: Path) -> list[ModelFacts]:
    return list(Scanner([folder]).scan().models)


@pytest.mark.parametrize("name", ["mmproj-F16.gguf", "anything.gguf", "gemma-3-4b-it-mmproj.gguf"])
@pytest.mark.parametrize("kind", ["mmproj", None])
def test_a_projector_is_told_by_its_metadata(tmp_path, name, kind):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    write_file(tmp_path / name, projector(kind=kind))
    (facts,) = models(tmp_path)
    assert facts.filename == "gemma-3-4b-it-Q4_K_M.gguf"
    assert (facts.has_vision, facts.projector_path is not None) == (name != "anything.gguf",) * 2


def test_a_model_that_calls_itself_a_projector_is_a_model(tmp_path):
    write_file(tmp_path / "mmproj-model.gguf", MODEL)
    (facts,) = models(tmp_path)
    assert not facts.has_vision


def test_a_model_without_projector_sees_nothing(tmp_path):
    write_file(tmp_path / "a" / "model.gguf", MODEL)
    write_file(tmp_path / "b" / "mmproj.gguf", projector())
    (facts,) = models(tmp_path)
    assert (facts.has_vision, facts.projector_path) == (False, None)


def test_of_several_the_one_named_after_the_model_goes_first_and_f16_before_others(tmp_path):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    write_file(tmp_path / "mmproj-F32.gguf", projector(F32))
    write_file(tmp_path / "mmproj-BF16.gguf", projector(BF16))
    assert pairs(tmp_path) == {"gemma-3-4b-it-Q4_K_M.gguf": "mmproj-BF16.gguf"}
    write_file(tmp_path / "mmproj-F16.gguf", projector(F16))
    assert pairs(tmp_path) == {"gemma-3-4b-it-Q4_K_M.gguf": "mmproj-F16.gguf"}
    write_file(tmp_path / "mmproj-gemma-3-4b-it-f32.gguf", projector(F32))
    assert pairs(tmp_path) == {"gemma-3-4b-it-Q4_K_M.gguf": "mmproj-gemma-3-4b-it-f32.gguf"}


def test_in_a_folder_of_many_models_only_names_pair(tmp_path):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    write_file(tmp_path / "gemma-3-4b-it-Q8_0.gguf", MODEL)
    write_file(tmp_path / "Qwen2-VL-2B-Instruct-Q4_K_M.gguf", model_bytes("qwen2vl"))
    write_file(tmp_path / "mmproj-F16.gguf", projector())
    assert set(pairs(tmp_path).values()) == {None}
    write_file(tmp_path / "mmproj-Qwen2-VL-2B-Instruct-f16.gguf", projector())
    write_file(tmp_path / "eyes.gguf", projector(name="Gemma 3 4B It"))
    assert pairs(tmp_path) == {
        "gemma-3-4b-it-Q4_K_M.gguf": "eyes.gguf",
        "gemma-3-4b-it-Q8_0.gguf": "eyes.gguf",
        "Qwen2-VL-2B-Instruct-Q4_K_M.gguf": "mmproj-Qwen2-VL-2B-Instruct-f16.gguf",
    }


def test_an_unfinished_projector_is_no_model_and_is_reported(tmp_path):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    path = write_file(tmp_path / "mmproj-F16.gguf", projector()[:30])
    scanner = Scanner([tmp_path])
    result = scanner.scan()
    assert [facts.has_vision for facts in result.models] == [False]
    assert [problem.path for problem in result.problems] == [str(path)]
    write_file(path, projector())
    result = scanner.refresh([str(path)])
    assert ([facts.has_vision for facts in result.models], result.problems) == ([True], ())
    path.unlink()
    assert [facts.has_vision for facts in scanner.refresh([str(path)]).models] == [False]


def test_an_embedding_model_gets_no_projector(tmp_path):
    write_file(tmp_path / "bge-m3-f16.gguf", model_bytes("bert"))
    write_file(tmp_path / "mmproj.gguf", projector())
    assert pairs(tmp_path) == {"bge-m3-f16.gguf": None}
