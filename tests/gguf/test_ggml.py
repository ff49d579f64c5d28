"""Our tables against those of the reference package."""

import gguf
import pytest

from magi_agent.gguf.ggml import FILE_TYPES, TENSOR_TYPES, quantization_of

NEWER_THAN_THE_REFERENCE = {42}


def test_every_tensor_type_of_the_reference_is_known_with_its_sizes():
    theirs = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert set(theirs) == {int(kind) for kind in gguf.GGMLQuantizationType}
    ours = {number: (kind.name, kind.block_size, kind.block_bytes) for number, kind in TENSOR_TYPES.items()}
    assert {number: ours.get(number) for number in theirs} == theirs
    assert set(ours) - set(theirs) <= NEWER_THAN_THE_REFERENCE


def test_every_file_type_of_the_reference_is_known_by_its_name():
    for kind in gguf.LlamaFileType:
        name = kind.name.removeprefix("ALL_").removeprefix("MOSTLY_").removesuffix("_MOE").lower()
        assert quantization_of(int(kind)) == (None if kind is gguf.LlamaFileType.GUESSED else name)


def test_names_are_lower_case_and_without_ornaments():
    for name in [*FILE_TYPES.values(), *(kind.name for kind in TENSOR_TYPES.values())]:
        assert name == name.lower()
        assert "mostly" not in name
        assert "moe" not in name


@pytest.mark.parametrize("number", [5, 6, 42, 1024, 1024 + 15, 2**40])
def test_an_unknown_or_guessed_file_type_names_nothing(number):
    assert quantization_of(number) is None


def test_the_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        FILE_TYPES[0] = "x"  # type: ignore[index]  # as the types say, too
    with pytest.raises(TypeError):
        TENSOR_TYPES[0] = TENSOR_TYPES[1]  # type: ignore[index]  # likewise
