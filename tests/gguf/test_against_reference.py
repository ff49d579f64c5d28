"""Files written by the reference writer, read by the reference reader and by ours."""

import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magi_agent.gguf.header import MAX_KEPT_NUMBERS, MAX_KEPT_STRINGS, GgufArray, GgufHeader, read_header
from magi_agent.gguf.reading import facts_of, read_facts


def assert_same(path: Path, header: GgufHeader) -> None:
    """Compare everything the two readers both know of one file."""
    reader = gguf.GGUFReader(path)
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(theirs)
    for key, field in theirs.items():
        value = header.metadata[key]
        contents = field.contents()
        if isinstance(value, GgufArray):
            assert value.length == len(contents), key
            assert int(value.element_type) == int(field.types[-1]), key
            if value.values is not None:
                assert list(value.values) == contents, key
        else:
            assert value == contents, key
            assert type(value) is type(contents), key
    assert header.tensor_count == len(reader.tensors)
    assert header.parameter_count == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert header.alignment == reader.alignment
    if reader.tensors:
        assert header.data_offset == reader.data_offset
        assert header.required_size == max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
        sizes: dict[int, int] = {}
        for tensor in reader.tensors:
            sizes[int(tensor.tensor_type)] = sizes.get(int(tensor.tensor_type), 0) + int(tensor.n_bytes)
        assert header.bytes_by_type == sizes


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_tensor_type_is_sized_as_the_reference_sizes_it(tmp_path):
    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        rows, blocks = 3, 2
        data = np.zeros((rows, blocks * size), dtype=np.uint8)
        writer.add_tensor(f"t.{kind.name}", data, raw_shape=(rows, blocks * size), raw_dtype=kind)
        assert block
    write(writer)
    header = read_header(path)
    assert_same(path, header)
    assert set(header.bytes_by_type) == {int(kind) for kind in gguf.GGML_QUANT_SIZES}


def test_every_value_type_and_array_is_read_as_the_reference_reads_it(tmp_path):
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 255)
    writer.add_int8("a.int8", -128)
    writer.add_uint16("a.uint16", 65535)
    writer.add_int16("a.int16", -32768)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 1e-5)
    writer.add_float64("a.float64", 1e-300)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve 🦙\n\x1b")
    writer.add_array("b.flags", [True, False, True])
    writer.add_array("b.numbers", list(range(MAX_KEPT_NUMBERS)))
    writer.add_array("b.more_numbers", list(range(MAX_KEPT_NUMBERS + 1)))
    writer.add_array("b.strings", [str(n) for n in range(MAX_KEPT_STRINGS)])
    writer.add_array("b.more_strings", [str(n) for n in range(MAX_KEPT_STRINGS + 1)])
    writer.add_array("b.floats", [0.5, -1.25])
    writer.add_custom_alignment(256)
    writer.add_tensor("x", np.zeros((3, 5), dtype=np.float32))
    writer.add_tensor("y", np.zeros((7,), dtype=np.float16))
    write(writer)
    header = read_header(path)
    assert_same(path, header)
    assert header.alignment == 256
    kept = {key: value.values is not None for key, value in header.metadata.items() if isinstance(value, GgufArray)}
    assert (kept["b.numbers"], kept["b.more_numbers"]) == (True, False)
    assert (kept["b.strings"], kept["b.more_strings"]) == (True, False)


def test_the_parts_of_a_split_set_say_which_they_are(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    writer.add_context_length(4096)
    for number in range(5):
        writer.add_tensor(f"blk.{number}.weight", np.zeros((4, 32), dtype=np.float32))
    write(writer)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    facts = [read_facts(part) for part in parts]
    assert [fact.split_no for fact in facts] == [0, 1, 2]
    assert {fact.split_count for fact in facts} == {3}
    assert {fact.split_tensors_count for fact in facts} == {5}
    assert sum(fact.parameter_count for fact in facts) == 5 * 128
    assert sum(fact.tensor_count for fact in facts) == 5
    assert [fact.context_length for fact in facts] == [4096, None, None]
    for part in parts:
        assert_same(part, read_header(part))
        assert read_header(part).is_whole


def test_big_endian_files_of_the_reference_writer_are_told(tmp_path):
    from magi_agent.gguf.errors import UnsupportedHeader

    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    write(writer)
    with pytest.raises(UnsupportedHeader, match="big endian"):
        read_header(path)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_SCALARS = st.one_of(
    st.tuples(st.just("add_uint8"), st.integers(0, 255)),
    st.tuples(st.just("add_int16"), st.integers(-(2**15), 2**15 - 1)),
    st.tuples(st.just("add_uint32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("add_int64"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("add_float32"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("add_bool"), st.booleans()),
    st.tuples(st.just("add_string"), _TEXT.filter(bool)),
    st.tuples(st.just("add_array"), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40)),
    st.tuples(st.just("add_array"), st.lists(_TEXT, min_size=1, max_size=80)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(_TEXT.filter(bool).map(lambda key: "k." + key), _SCALARS, max_size=8),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
)
def test_whatever_the_reference_writes_is_read_alike(tmp_path, entries, shapes):
    path = tmp_path / "any.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (method, value) in entries.items():
        getattr(writer, method)(key, value)
    for number, shape in enumerate(shapes):
        writer.add_tensor(f"t{number}", np.zeros(shape, dtype=random.Random(number).choice([np.float32, np.int8])))
    write(writer)
    header = read_header(path)
    assert_same(path, header)
    assert header.is_whole
    facts_of(header)
