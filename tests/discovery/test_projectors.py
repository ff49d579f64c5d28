"""Multimodal projectors: told by their metadata, paired with their model, never a model themselves."""

import os
import time
from pathlib import Path

import pytest

from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.files import FileRecord
from magi_agent.discovery.projectors import Projectors, named
from magi_agent.discovery.scanner import Scanner
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import model_bytes, write_file
from tests.gguf.builder import BOOL, entry, gguf, text_entry

F16, BF16, F32, Q8_0, Q4_K_M = 1, 32, 0, 7, 15
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


def names_of(paths: tuple[str, ...]) -> list[str]:
    return [path.rpartition("/")[2] for path in paths]


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


@pytest.mark.parametrize(
    ("has", "senses"),
    [
        ((), (True, False)),
        (("vision",), (True, False)),
        (("audio",), (False, True)),
        (("vision", "audio"), (True, True)),
    ],
)
def test_a_projector_says_whether_it_is_for_images_or_for_sound(tmp_path, has, senses):
    """One that says neither was made before there were any for sound."""
    write_file(tmp_path / "model.gguf", MODEL)
    flags = [entry(f"clip.has_{sense}_encoder", BOOL, b"\1") for sense in has]
    write_file(tmp_path / "mmproj.gguf", gguf([text_entry("general.architecture", "clip"), *flags], []))
    (facts,) = models(tmp_path)
    assert (facts.has_vision, facts.has_audio) == senses


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


def test_all_that_go_with_a_model_are_offered_the_one_to_load_first(tmp_path):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    file_types = {"a.q4_k_m": Q4_K_M, "b.f32": F32, "c.q8_0": Q8_0, "d.bf16": BF16, "e.f16": F16, "f.f16": F16}
    for name, file_type in file_types.items():
        write_file(tmp_path / f"mmproj-{name.partition('.')[0]}.gguf", projector(file_type, name="Gemma 3 4B It"))
    write_file(tmp_path / "gemma-3-4b-it.mmproj-Q8_0.gguf", projector(Q8_0))
    write_file(tmp_path / "mmproj-model-f16.gguf", projector())
    (facts,) = models(tmp_path)
    expected = [
        "gemma-3-4b-it.mmproj-Q8_0.gguf",
        *(f"mmproj-{letter}.gguf" for letter in "efdcba"),
        "mmproj-model-f16.gguf",
    ]
    assert names_of(facts.projectors) == expected
    assert facts.projector_path == facts.projectors[0]


def test_projectors_that_come_and_go_are_offered_and_offered_no_more(tmp_path):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    bf16 = write_file(tmp_path / "mmproj-BF16.gguf", projector(BF16))
    scanner = Scanner([tmp_path])
    assert scanner.scan().models[0].projectors == (str(bf16),)
    f16 = write_file(tmp_path / "mmproj-F16.gguf", projector(F16))
    assert scanner.refresh([str(f16)]).models[0].projectors == (str(f16), str(bf16))
    f16.unlink()
    assert scanner.refresh([str(f16)]).models[0].projectors == (str(bf16),)
    bf16.unlink()
    (facts,) = scanner.refresh([str(bf16)]).models
    assert (facts.projectors, facts.projector_path, facts.has_vision) == ((), None, False)


@pytest.mark.parametrize(
    ("model", "projector_name"),
    [
        ("google_gemma-3-4b-it-Q4_K_M.gguf", "mmproj-google_gemma-3-4b-it-f16.gguf"),
        ("Qwen2.5-VL-7B-Instruct.Q4_K_M.gguf", "Qwen2.5-VL-7B-Instruct.mmproj-fp16.gguf"),
        ("Qwen2.5-VL-7B-Instruct.i1-IQ2_M.gguf", "Qwen2.5-VL-7B-Instruct.mmproj-Q8_0.gguf"),
        ("Qwen3VL-4B-Instruct-Q4_K_M.gguf", "mmproj-Qwen3VL-4B-Instruct-F16.gguf"),
        ("moondream2-text-model-f16.gguf", "moondream2-mmproj-f16.gguf"),
        ("llava-llama-3-8b-v1_1-int4.gguf", "llava-llama-3-8b-v1_1-mmproj-f16.gguf"),
        ("SmolVLM2-2.2B-Instruct-Q4_K_M.gguf", "mmproj-SmolVLM2-2.2B-Instruct-Q8_0.gguf"),
        ("Kimi-VL-A3B-Thinking-2506-UD-Q4_K_XL.gguf", "mmproj-Kimi-VL-A3B-Thinking-2506-f16.gguf"),
        ("ggml-model-Q4_K_M.gguf", "mmproj-model-f16.gguf"),
        ("Model-7.6B-Q4_K_M.gguf", "mmproj-model-f16.gguf"),
    ],
)
def test_models_and_projectors_are_paired_as_publishers_name_them(tmp_path, model, projector_name):
    write_file(tmp_path / "other-1b-Q8_0.gguf", model_bytes("llama"))
    if "odel-" not in model:
        write_file(tmp_path / model, model_bytes("qwen2vl"))
    else:
        (tmp_path / "other-1b-Q8_0.gguf").rename(tmp_path / model)
    write_file(tmp_path / projector_name, projector())
    assert pairs(tmp_path)[model] == projector_name


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


def test_an_embedding_model_gets_only_a_projector_of_its_name(tmp_path):
    write_file(tmp_path / "Qwen3-VL-Reranker-2B.Q8_0.gguf", model_bytes("qwen3vl"))
    write_file(tmp_path / "mmproj.gguf", projector())
    assert pairs(tmp_path) == {"Qwen3-VL-Reranker-2B.Q8_0.gguf": None}
    write_file(tmp_path / "Qwen3-VL-Reranker-2B.mmproj-f16.gguf", projector())
    assert pairs(tmp_path) == {"Qwen3-VL-Reranker-2B.Q8_0.gguf": "Qwen3-VL-Reranker-2B.mmproj-f16.gguf"}


def test_a_change_beside_a_projector_makes_no_other_model_anew(tmp_path):
    paths = [write_file(tmp_path / f"m{number}x.gguf", MODEL) for number in range(5)]
    write_file(tmp_path / "mmproj-m1x.gguf", projector())
    write_file(tmp_path / "mmproj-m2.gguf", projector())
    scanner = Scanner([tmp_path])
    before = scanner.scan().models
    assert [facts.has_vision for facts in before] == [False, True, True, False, False]
    write_file(paths[2], model_bytes("llama"), age=100)
    after = scanner.refresh([str(paths[2])]).models
    assert [new is old for new, old in zip(after, before, strict=True)] == [True, True, False, True, True]
    assert after[2].has_vision


def test_a_lone_projector_is_given_up_when_a_model_of_another_name_comes(tmp_path):
    write_file(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf", MODEL)
    write_file(tmp_path / "mmproj-F16.gguf", projector())
    scanner = Scanner([tmp_path])
    assert [facts.has_vision for facts in scanner.scan().models] == [True]
    other = write_file(tmp_path / "other.gguf", model_bytes("llama"))
    assert [facts.has_vision for facts in scanner.refresh([str(other)]).models] == [False, False]
    other.unlink()
    assert [facts.has_vision for facts in scanner.refresh([str(other)]).models] == [True]


def test_one_projector_makes_a_change_among_many_models_no_dearer(tmp_path):
    paths = [write_file(tmp_path / f"m{number}x.gguf", MODEL) for number in range(2000)]
    scanner = Scanner([tmp_path])
    scanner.scan()
    without = change_seconds(scanner, paths[0])
    beside = write_file(tmp_path / "mmproj-m1x.gguf", projector())
    assert sum(facts.has_vision for facts in scanner.refresh([str(beside)]).models) == 1
    assert change_seconds(scanner, paths[0]) < 5 * without


def change_seconds(scanner: Scanner, path: Path) -> float:
    """The processor time of a refresh of one model that changed, the least of three."""
    times = []
    for number in range(3):
        write_file(path, model_bytes("llama", texts={"general.name": f"Name {number}"}), age=100 + number)
        begin = time.thread_time()
        scanner.refresh([str(path)])
        times.append(time.thread_time() - begin)
    return min(times)


def test_among_many_projectors_a_model_finds_its_own_without_a_look_at_each():
    assert pairing_seconds(4000) < 24 * pairing_seconds(500)  # 8 in proportion


def pairing_seconds(count: int) -> float:
    """The processor time of pairing as many models as projectors, the least of three."""
    names = [f"mmproj-m{number}x.gguf" for number in range(count)]
    records = [FileRecord(f"/{name}", name, None, None, ModelStatus.OK, None, settled=True) for name in names]
    titles = [named(f"m{number}x.gguf", None) for number in range(count)]
    times = []
    for _ in range(3):
        begin = time.thread_time()
        projectors = Projectors(records, alone=False)
        found = [projectors.offered(title, only_namesakes=False) for title in titles]
        times.append(time.thread_time() - begin)
        assert found == [[record] for record in records]
    return min(times)
