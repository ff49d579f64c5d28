"""The header reader: what it keeps, what it sums up, where it refuses."""

import os
import struct
from pathlib import Path

import pytest

from magi_agent.gguf import header as header_module
from magi_agent.gguf.errors import (
    GgufError,
    MalformedHeader,
    NotGguf,
    TruncatedHeader,
    UnsupportedHeader,
    UnwrittenHeader,
)
from magi_agent.gguf.header import GgufArray, GgufHeader, GgufText, ValueType, read_header
from magi_agent.gguf.window import WINDOW_BYTES
from tests.gguf.builder import (
    ARRAY,
    BOOL,
    FLOAT32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    array_entry,
    entry,
    gguf,
    number_entry,
    string,
    tensor,
    text_entry,
)


@pytest.fixture
def read(tmp_path: Path):
    """Write bytes to a file and read its header."""

    def write_and_read(content: bytes) -> GgufHeader:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_header(path)

    return write_and_read


SMALL = gguf(
    [
        text_entry("general.architecture", "llama"),
        number_entry("llama.context_length", 4096),
        array_entry("general.tags", STRING, 2, string("chat") + string("små")),
        array_entry("llama.attention.head_count", UINT32, 3, struct.pack("<3I", 8, 8, 4)),
        array_entry("tokenizer.ggml.tokens", STRING, 100, b"".join(string(f"t{n}") for n in range(100))),
        array_entry("tokenizer.ggml.scores", FLOAT32, 2000, bytes(8000)),
    ],
    [
        tensor("token_embd.weight", (64, 10), kind=8, offset=0),
        tensor("blk.0.ffn_up_exps.weight", (32, 4, 8), kind=2, offset=704),
        tensor("output_norm.weight", (10,), kind=0, offset=1280),
    ],
    data=1320,
)
SMALL_HEADER_END = SMALL.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4 + 8


def test_a_small_header_is_read_in_full(read):
    header = read(SMALL)
    assert header.version == 3
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.context_length"] == 4096
    assert header.metadata["general.tags"] == GgufArray(ValueType.STRING, 2, ("chat", "små"))
    assert header.metadata["llama.attention.head_count"] == GgufArray(ValueType.UINT32, 3, (8, 8, 4))
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray(ValueType.STRING, 100, None)
    assert header.metadata["tokenizer.ggml.scores"] == GgufArray(ValueType.FLOAT32, 2000, None)
    assert header.tensor_count == 3
    assert header.parameter_count == 640 + 1024 + 10
    assert header.expert_parameter_count == 1024
    assert header.bytes_by_type == {8: 680, 2: 576, 0: 40}
    assert header.data_offset == -(-SMALL_HEADER_END // 32) * 32
    assert header.required_size == header.data_offset + 1280 + 40
    assert header.file_size == len(SMALL)
    assert header.is_whole


def test_one_byte_less_than_the_tensors_need_is_not_whole(read):
    header = read(SMALL[:-1])
    assert header.required_size == len(SMALL)
    assert not header.is_whole


def test_paths_of_every_kind_and_descriptors_are_read(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(SMALL)
    odd = os.fsencode(tmp_path) + b"/\xff.gguf"
    Path(os.fsdecode(odd)).write_bytes(SMALL)
    expected = read_header(path)
    assert read_header(str(path)) == expected
    assert read_header(odd) == expected
    with path.open("rb") as file:
        file.read(11)
        assert read_header(file.fileno()) == expected
        assert file.tell() == 11
        assert len(file.read(5)) == 5


def test_reading_leaves_no_descriptor_open(tmp_path):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(SMALL)
    bad.write_bytes(SMALL[:100])
    before = descriptors()
    read_header(good)
    with pytest.raises(GgufError):
        read_header(bad)
    with pytest.raises(NotGguf):
        read_header(tmp_path)
    assert descriptors() == before


def test_version_2_is_read_as_version_3_is(read):
    old = bytearray(SMALL)
    old[4] = 2
    assert read(bytes(old)).parameter_count == read(SMALL).parameter_count


@pytest.mark.parametrize("kind", list(header_module._NUMBERS))
def test_every_kind_of_number_is_read_alone_and_in_an_array(read, kind):
    packing = header_module._NUMBERS[kind]
    number = True if kind is ValueType.BOOL else 1.5 if kind.name.startswith("FLOAT") else 7
    packed = packing.pack(number)
    header = read(gguf([entry("one", kind, packed), array_entry("two", kind, 2, packed * 2)]))
    assert header.metadata == {"one": number, "two": GgufArray(kind, 2, (number, number))}
    assert type(header.metadata["one"]) is type(number)


def test_a_header_cut_at_any_byte_is_truncated(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(SMALL[:SMALL_HEADER_END])
    read_header(path)
    for cut in reversed(range(SMALL_HEADER_END)):
        os.truncate(path, cut)
        with pytest.raises(TruncatedHeader):
            read_header(path)


def test_a_header_cut_inside_a_long_string_or_array_is_truncated(read):
    long = gguf([text_entry("tokenizer.chat_template", "x" * (3 * WINDOW_BYTES)), number_entry("after", 1)])
    assert read(long).metadata["after"] == 1
    for cut in (WINDOW_BYTES, 2 * WINDOW_BYTES, len(long) - 30):
        with pytest.raises(TruncatedHeader):
            read(long[:cut])


def test_arrays_around_the_edges_of_the_window_are_stepped_over_exactly(read):
    for shift in range(12):
        words = [b"a" * (n % 40) for n in range(20_000)]
        header = read(
            gguf(
                [
                    text_entry("pad", "p" * shift),
                    array_entry("words", STRING, len(words), b"".join(map(string, words))),
                    array_entry("long", STRING, 3, b"".join(map(string, [b"", b"b" * 2 * WINDOW_BYTES, b""]))),
                    array_entry("numbers", UINT8, 300_000, bytes(300_000)),
                    text_entry("end", "here"),
                ]
            )
        )
        assert header.metadata["words"] == GgufArray(ValueType.STRING, 20_000, None)
        assert header.metadata["long"] == GgufArray(ValueType.STRING, 3, None)
        assert header.metadata["numbers"] == GgufArray(ValueType.UINT8, 300_000, None)
        assert header.metadata["end"] == "here"


def test_a_text_too_long_to_keep_leaves_its_length(read):
    length = header_module.MAX_KEPT_BYTES + 1
    header = read(gguf([text_entry("long", b"x" * length), text_entry("short", "kept")]))
    assert header.metadata == {"long": GgufText(length), "short": "kept"}


def test_many_small_arrays_are_kept_only_within_the_limit(read):
    arrays = [array_entry(f"a{n}", UINT8, 1024, bytes(1024)) for n in range(1000)]
    kept = [value for value in read(gguf(arrays)).metadata.values() if value.values is not None]
    assert 50 < len(kept) < 200


def test_what_is_no_utf_8_is_replaced(read):
    assert read(gguf([text_entry("name", b"a\xffb")])).metadata["name"] == "a\ufffdb"


class TestRefusals:
    """Each hostile header has its own error, and none costs more than its own bytes."""

    @pytest.mark.parametrize(
        "content",
        [b"", b"G", b"GGUF", b"GGUF\x03\0\0\0", gguf(entry_count=1), gguf(tensor_count=5)],
        ids=["empty", "one byte", "magic", "version", "no entries", "no tensors"],
    )
    def test_a_file_that_ends_too_early_is_truncated(self, read, content):
        with pytest.raises(TruncatedHeader):
            read(content)

    @pytest.mark.parametrize("content", [bytes(1), bytes(4), bytes(4096), b"GGUF" + bytes(4096)])
    def test_zeros_where_data_belongs_are_data_not_there_yet(self, read, content):
        with pytest.raises(UnwrittenHeader):
            read(content)

    def test_a_header_that_goes_on_in_zeros_is_not_there_yet(self, read):
        for end in (SMALL.index(b"llama.context_length") - 8, SMALL.index(b"token_embd") - 8):
            with pytest.raises(UnwrittenHeader):
                read(SMALL[:end] + bytes(len(SMALL)))

    @pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), b"gguf" + bytes(100), b"GGU?", b"{"])
    def test_another_kind_of_file_is_not_gguf(self, read, content):
        with pytest.raises(NotGguf):
            read(content)

    def test_a_big_endian_file_is_named_so(self, read):
        with pytest.raises(UnsupportedHeader, match="big endian"):
            read(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))

    @pytest.mark.parametrize("version", [1, 4, 77])
    def test_other_versions_are_named(self, read, version):
        with pytest.raises(UnsupportedHeader, match=f"version {version}"):
            read(gguf(version=version))

    @pytest.mark.parametrize("length", [2**40, 2**62, 2**63, 2**64 - 1])
    @pytest.mark.parametrize("kind", [UINT8, UINT64, STRING])
    def test_an_array_that_claims_the_world_is_refused(self, read, kind, length):
        with pytest.raises(MalformedHeader):
            read(gguf([array_entry("a", kind, length, b"")]))

    @pytest.mark.parametrize("length", [2**40, 2**63 - 8, 2**63, 2**64 - 9, 2**64 - 1])
    def test_a_string_that_claims_the_world_is_refused(self, read, length):
        claim = struct.pack("<Q", length)
        for hostile in (
            [entry("text", STRING, claim)],
            [claim],
            [array_entry("few", STRING, 2, claim)],
            [array_entry("many", STRING, 100, string("x") * 50 + claim + bytes(2000))],
            [array_entry("last", STRING, 100, string("x") * 99 + claim)],
        ):
            with pytest.raises(MalformedHeader):
                read(gguf(hostile))

    def test_an_array_longer_than_the_file_is_truncated(self, read):
        with pytest.raises(TruncatedHeader):
            read(gguf([array_entry("a", UINT8, 1_000_000, bytes(10))]))
        with pytest.raises(TruncatedHeader):
            read(gguf([array_entry("a", STRING, 1_000_000, bytes(80))]))

    def test_too_many_strings_are_refused(self, read, monkeypatch):
        monkeypatch.setattr(header_module, "MAX_STRINGS", 150)
        hundred = b"".join(string("x") for _ in range(100))
        assert read(gguf([array_entry("a", STRING, 100, hundred)])).metadata["a"].length == 100
        with pytest.raises(MalformedHeader, match="strings"):
            read(gguf([array_entry("a", STRING, 100, hundred), array_entry("b", STRING, 100, hundred)]))

    def test_arrays_of_arrays_are_refused(self, read):
        with pytest.raises(MalformedHeader, match="array of arrays"):
            read(gguf([array_entry("a", ARRAY, 1, struct.pack("<IQ", UINT8, 1) + b"\0")]))

    @pytest.mark.parametrize("kind", [13, 255, 2**32 - 1])
    def test_unknown_types_are_refused(self, read, kind):
        with pytest.raises(MalformedHeader, match=str(kind)):
            read(gguf([entry("a", kind, bytes(8))]))
        with pytest.raises(MalformedHeader, match=str(kind)):
            read(gguf([array_entry("a", kind, 1, bytes(8))]))

    def test_a_key_that_is_there_twice_is_refused(self, read):
        with pytest.raises(MalformedHeader, match="twice"):
            read(gguf([number_entry("a", 1), number_entry("a", 1)]))

    def test_too_many_entries_or_tensors_are_refused(self, read):
        with pytest.raises(MalformedHeader, match="entries"):
            read(gguf(entry_count=65_537))
        with pytest.raises(MalformedHeader, match="tensors"):
            read(gguf(tensor_count=200_001))
        with pytest.raises(MalformedHeader):
            read(gguf(entry_count=2**64 - 1, tensor_count=2**64 - 1))

    def test_keys_that_are_too_long_are_refused(self, read):
        assert "k" * 65_535 in read(gguf([number_entry("k" * 65_535, 1)])).metadata
        with pytest.raises(MalformedHeader, match="key"):
            read(gguf([number_entry("k" * 65_536, 1)]))
        with pytest.raises(MalformedHeader, match="keys"):
            read(gguf([number_entry(f"{n:065000}", 1) for n in range(70)]))

    @pytest.mark.parametrize("alignment", [0, 3, 48, 2**32 - 1])
    def test_an_alignment_that_is_no_power_of_two_is_refused(self, read, alignment):
        with pytest.raises(MalformedHeader, match="alignment"):
            read(gguf([number_entry("general.alignment", alignment)]))

    @pytest.mark.parametrize(
        "value", [entry("general.alignment", BOOL, b"\1"), text_entry("general.alignment", "32")], ids=["flag", "text"]
    )
    def test_an_alignment_of_another_type_is_refused(self, read, value):
        with pytest.raises(MalformedHeader, match="alignment"):
            read(gguf([value]))

    def test_a_tensor_with_five_dimensions_is_refused(self, read):
        with pytest.raises(MalformedHeader, match="5 dimensions"):
            read(gguf([], [tensor("t", (1, 1, 1, 1, 1))], data=4))

    def test_a_tensor_off_its_alignment_is_refused(self, read):
        with pytest.raises(MalformedHeader, match="aligned"):
            read(gguf([], [tensor("t", (8,), offset=16)], data=64))

    def test_tensors_that_overlap_are_refused(self, read):
        with pytest.raises(MalformedHeader, match="overlap"):
            read(gguf([], [tensor("a", (64,)), tensor("b", (64,), offset=32)], data=1000))
        with pytest.raises(MalformedHeader, match="overlap"):
            read(gguf([], [tensor("a", (8,)), tensor("b", (8,))], data=1000))

    def test_a_row_that_is_no_number_of_blocks_is_refused(self, read):
        with pytest.raises(MalformedHeader, match="blocks of 256"):
            read(gguf([], [tensor("t", (100, 256), kind=12)], data=100_000))

    @pytest.mark.parametrize("shape", [(2**63,), (2**32, 2**32), (2**64 - 1,) * 4, (2**61,)])
    def test_a_tensor_larger_than_any_file_is_refused(self, read, shape):
        with pytest.raises(MalformedHeader, match="larger than any file"):
            read(gguf([], [tensor("t", shape)], data=4))

    def test_an_offset_beyond_any_file_is_refused(self, read):
        with pytest.raises(MalformedHeader, match="larger than any file"):
            read(gguf([], [tensor("t", (8,), offset=2**64 - 32)], data=4))

    def test_sums_beyond_any_file_are_refused(self, read):
        # Of a type nobody knows, so that no size of one tensor stands in the way of the sum.
        with pytest.raises(MalformedHeader, match="larger than any file"):
            read(gguf([], [tensor(f"t{n}", (2**62,), kind=999) for n in range(3)], data=4))

    def test_a_header_beyond_the_limit_is_refused(self, tmp_path):
        path = tmp_path / "sparse.gguf"
        with path.open("wb") as file:
            file.write(gguf([array_entry("a", UINT8, 2**30, b"")], entry_count=2))
            file.truncate(2**31)
        with pytest.raises(MalformedHeader, match="claims"):
            read_header(path)

    def test_names_in_messages_are_harmless(self, read):
        with pytest.raises(MalformedHeader) as caught:
            read(gguf([], [tensor("\x1b[2J\n" + "x" * 10_000, (8,), offset=1)], data=64))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


def test_a_tensor_of_an_unknown_type_counts_by_its_offset(read):
    header = read(gguf([], [tensor("a", (8,)), tensor("b", (1000,), kind=999, offset=32)], data=64))
    assert header.parameter_count == 1008
    assert header.bytes_by_type == {0: 32, 999: 0}
    assert header.required_size == header.data_offset + 32


def test_gaps_and_another_order_are_fine(read):
    header = read(gguf([], [tensor("b", (8,), offset=640), tensor("a", (8,), offset=0)], data=672))
    assert header.required_size == header.data_offset + 672
    assert header.is_whole


def test_empty_and_scalar_tensors_are_counted(read):
    header = read(gguf([], [tensor("empty", (0, 5)), tensor("one", ())], data=4))
    assert header.parameter_count == 1
    assert header.is_whole


def test_alignment_moves_the_data(read):
    wide = gguf([number_entry("general.alignment", 4096)], [tensor("t", (8,))], data=32, alignment=4096)
    header = read(wide)
    assert header.data_offset == 4096
    assert header.is_whole
    assert header.required_size == len(wide)


def test_a_header_without_tensors_needs_nothing_after_it(read):
    header = read(gguf([number_entry("split.count", 2)]))
    assert header.required_size == header.file_size


def test_the_fingerprint_follows_the_content_and_not_the_data(read):
    fingerprint = read(SMALL).fingerprint
    assert read(SMALL + b"more").fingerprint == fingerprint
    assert read(SMALL[:-1] + b"\1").fingerprint == fingerprint
    for old, new in ((b"context_length", b"context_lengtX"), (b"output_norm", b"output_nXrm")):
        assert read(SMALL.replace(old, new)).fingerprint != fingerprint
    stepped_over = SMALL.replace(string("t42"), string("T42"))
    assert stepped_over != SMALL
    assert read(stepped_over).fingerprint == fingerprint


def test_the_fingerprint_is_over_what_was_read_and_nothing_else(read):
    def digest(*parts: bytes) -> str:
        from hashlib import blake2b

        return blake2b(b"".join(parts), digest_size=16).hexdigest()

    text = text_entry("long", "y" * (2 * WINDOW_BYTES + 5))
    head = gguf([text], entry_count=3)
    words = b"".join(string(f"w{n}") for n in range(60_000))
    array = array_entry("words", STRING, 60_000, b"")
    end = number_entry("end", 1)
    assert read(head + array + words + end).fingerprint == digest(head, array, end)


class TestOddFiles:
    """What has the name of a model and is none."""

    def test_a_pipe_is_refused_without_waiting(self, tmp_path):
        path = tmp_path / "pipe.gguf"
        os.mkfifo(path)
        with pytest.raises(NotGguf, match="regular"):
            read_header(path)

    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/random"])
    def test_a_device_is_refused_unread(self, tmp_path, device):
        link = tmp_path / "device.gguf"
        link.symlink_to(device)
        with pytest.raises(NotGguf, match="regular"):
            read_header(link)

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(NotGguf, match="regular"):
            read_header(tmp_path)

    def test_what_the_system_says_stays_its_own_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_header(tmp_path / "none.gguf")
        loop = tmp_path / "loop.gguf"
        loop.symlink_to(loop)
        with pytest.raises(OSError):
            read_header(loop)

    def test_a_file_that_shrinks_while_it_is_read_is_truncated(self, tmp_path, monkeypatch):
        path = tmp_path / "model.gguf"
        path.write_bytes(SMALL)
        real = os.fstat

        def fstat_then_cut(fd):
            status = real(fd)
            os.truncate(path, 200)
            return status

        monkeypatch.setattr(os, "fstat", fstat_then_cut)
        with pytest.raises(TruncatedHeader):
            read_header(path)

    def test_a_file_system_that_answers_in_small_pieces_is_read_all_the_same(self, tmp_path, monkeypatch):
        path = tmp_path / "model.gguf"
        path.write_bytes(SMALL)
        expected = read_header(path)
        real = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset))
        assert read_header(path) == expected
