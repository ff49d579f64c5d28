"""Models in several files: one model when all parts are there and tell the same story, else what is wrong."""

import tracemalloc
from pathlib import Path

import pytest

from magi_agent.discovery.facts import ModelFacts
from magi_agent.discovery.scanner import Scanner
from magi_agent.vocabulary import ModelStatus
from tests.discovery.model_files import model_bytes, write_file, write_split


def only_model(folder: Path) -> ModelFacts:
    (facts,) = Scanner([folder]).scan().models
    return facts


def part(number: int, count: int, tensors: int, *, of: int = 1) -> bytes:
    numbers = {"split.no": number - 1, "split.count": count, "split.tensors.count": tensors}
    return model_bytes("llama" if number == 1 else None, numbers=numbers, tensors=of, name=f"part{number}")


def test_all_parts_are_one_model(tmp_path):
    parts = write_split(tmp_path, "Qwen3-235B-A22B-Q4_K_M", 12)
    facts = only_model(tmp_path)
    assert (facts.status, facts.problem) == (ModelStatus.OK, None)
    assert facts.file_path == str(parts[0])
    assert facts.filename == parts[0].name
    assert facts.parts == tuple(map(str, parts))
    assert facts.size_bytes == sum(path.stat().st_size for path in parts)
    assert facts.parameter_count == 12 * 2 * 64
    assert facts.size_params == 235
    assert "00001" not in facts.display_name


def test_missing_parts_are_named(tmp_path):
    write_split(tmp_path, "m", 6, only=[1, 3])
    facts = only_model(tmp_path)
    assert facts.status is ModelStatus.INCOMPLETE
    assert facts.problem == (
        "4 of 6 parts missing: m-00002-of-00006.gguf, m-00004-of-00006.gguf, m-00005-of-00006.gguf and 1 more"
    )
    assert facts.parameter_count is None
    assert facts.parts == tuple(str(tmp_path / f"m-0000{number}-of-00006.gguf") for number in (1, 3))


def test_the_first_part_names_the_model_even_while_it_is_missing(tmp_path):
    write_split(tmp_path, "m", 3, only=[2, 3])
    facts = only_model(tmp_path)
    assert (facts.status, facts.file_path) == (ModelStatus.INCOMPLETE, str(tmp_path / "m-00001-of-00003.gguf"))
    scanner = Scanner([tmp_path])
    scanner.scan()
    (first,) = write_split(tmp_path, "m", 3, only=[1])
    (facts,) = scanner.refresh([str(first)]).models
    assert facts.status is ModelStatus.OK


def test_sets_of_other_counts_or_prefixes_are_models_of_their_own(tmp_path):
    write_split(tmp_path, "m", 2)
    write_split(tmp_path, "m", 3)
    write_split(tmp_path, "n", 2)
    write_split(tmp_path / "other", "m", 2)
    result = Scanner([tmp_path]).scan()
    assert [facts.status for facts in result.models] == [ModelStatus.OK] * 4


def test_a_set_of_one_is_a_plain_file(tmp_path):
    write_file(tmp_path / "m-00001-of-00001.gguf", model_bytes("llama"))
    facts = only_model(tmp_path)
    assert (facts.status, len(facts.parts)) == (ModelStatus.OK, 1)


@pytest.mark.parametrize(
    ("second", "status", "says"),
    [
        (part(2, 3, 2), ModelStatus.INVALID, "speaks of 3"),
        (model_bytes("llama"), ModelStatus.INVALID, "says nothing of a split model"),
        (part(1, 2, 2), ModelStatus.INVALID, "is part 1 by its header"),
        (part(2, 2, 9), ModelStatus.INVALID, "another model"),
        (part(2, 2, 2, of=3), ModelStatus.INVALID, "hold 4 tensors"),
        (b"no gguf at all" * 10, ModelStatus.INVALID, "part 2 of 2: the file does not begin"),
        (part(2, 2, 2)[:-8], ModelStatus.INCOMPLETE, "part 2 of 2: "),
        (b"", ModelStatus.INCOMPLETE, "part 2 of 2: the file is empty"),
        (part(2, 2, 2), ModelStatus.OK, "None"),
    ],
)
def test_parts_must_agree_and_be_whole(tmp_path, second, status, says):
    write_file(tmp_path / "m-00001-of-00002.gguf", part(1, 2, 2))
    write_file(tmp_path / "m-00002-of-00002.gguf", second)
    facts = only_model(tmp_path)
    assert facts.status is status
    assert says in str(facts.problem)


def test_a_part_that_was_renamed_is_said_to_be_one(tmp_path):
    write_file(tmp_path / "m.gguf", part(2, 5, 10))
    facts = only_model(tmp_path)
    assert facts.status is ModelStatus.INVALID
    assert "-00002-of-00005.gguf" in str(facts.problem)


def test_two_names_for_one_part_count_once(tmp_path):
    write_split(tmp_path, "m", 2)
    write_file(tmp_path / "m-00002-of-00002.GGUF", part(2, 2, 4, of=2))
    facts = only_model(tmp_path)
    assert facts.status is ModelStatus.OK
    assert len(facts.parts) == 2
    assert facts.parameter_count == 4 * 64


def test_parts_that_are_links_are_one_model_under_the_links(tmp_path):
    write_split(tmp_path / "blobs", "m", 2)
    for path in (tmp_path / "blobs").iterdir():
        path.rename(path.with_suffix(""))
        (tmp_path / path.name).symlink_to(path.with_suffix(""))
    facts = only_model(tmp_path)
    assert (facts.status, facts.file_path) == (ModelStatus.OK, str(tmp_path / "m-00001-of-00002.gguf"))


def test_a_name_that_claims_many_parts_costs_no_list_of_them(tmp_path):
    write_file(tmp_path / "m-00002-of-99999.gguf", part(2, 99_999, 2))
    tracemalloc.start()
    try:
        facts = only_model(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert facts.problem == (
        "99998 of 99999 parts missing: m-00001-of-99999.gguf, m-00003-of-99999.gguf, m-00004-of-99999.gguf "
        "and 99995 more"
    )
    assert peak < 500_000  # bytes; the list alone has 800,000
