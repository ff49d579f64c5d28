"""A bounded reader of GGUF headers, versions 2 and 3, little endian.

The format is described in ggml's ``docs/gguf.md``. A header is walked once, front to back, in a window of
256 KiB. Large arrays (a vocabulary, its scores, its merges) are stepped over; of them the element type and the
length are kept. Headers are input from strangers: every length is checked against the file's size and against the
limits below before anything is read or allocated for it.
"""

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from magi_agent.gguf.errors import (
    MalformedHeader,
    NotGguf,
    UnsupportedHeader,
    UnwrittenHeader,
)
from magi_agent.gguf.ggml import TENSOR_TYPES
from magi_agent.gguf.window import Window

MAX_HEADER_BYTES: Final = 512 * 1024 * 1024
MAX_METADATA: Final = 65_536  # entries
MAX_TENSORS: Final = 200_000
MAX_NAME_BYTES: Final = 65_535  # of a metadata key or a tensor's name; the format's own limit for keys
MAX_STRINGS: Final = 4_194_304  # in all string arrays of one header, stepped over or kept
MAX_KEYS_BYTES: Final = 4 * 1024 * 1024  # of all metadata keys together
MAX_KEPT_BYTES: Final = 4 * 1024 * 1024  # of strings and small arrays in one header, as an estimate of memory
MAX_KEPT_NUMBERS: Final = 1024  # in one array
MAX_KEPT_STRINGS: Final = 64  # in one array
MAX_KEPT_STRING_BYTES: Final = 1024  # of one string in an array
MAX_DIMENSIONS: Final = 4  # ggml's own limit
MAX_INTEGER: Final = 2**63 - 1  # sizes and offsets are signed 64-bit numbers in ggml

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_CLASSIFIER_TENSORS = frozenset({"cls.weight", "cls.output.weight"})
_INPUT_TENSORS = ("token_embd.weight", "position_embd.", "token_types.", "per_layer_token_embd.")
_BLOCK_TENSORS = "blk."
_REPACKED_ROWS = 8  # llama.cpp repacks matrices by eight rows; those with another number of rows stay as they are
_ZEROS_THAT_TELL = 24  # the smallest tensor description; no metadata entry that means anything has so many zeros
_ENTRY_OVERHEAD = 64  # bytes of memory, about, that a kept object takes beyond its content
_NUMBER_MEMORY = 40  # bytes of memory, about, that a number in a tuple takes

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_ARRAY = struct.Struct("<IQ")
_TENSOR = tuple(struct.Struct(f"<{dimensions}QIQ") for dimensions in range(MAX_DIMENSIONS + 1))


class ValueType(IntEnum):
    """The types of metadata values, with GGUF's own numbers."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_NUMBERS: Final[Mapping[ValueType, struct.Struct]] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array among the metadata; ``values`` only where it is small."""

    element_type: ValueType
    length: int
    values: tuple[int | float | bool | str, ...] | None


@dataclass(frozen=True, slots=True)
class GgufText:
    """A string among the metadata that was too long to keep."""

    length: int  # bytes


GgufValue = int | float | bool | str | GgufArray | GgufText
"""One metadata value. Strings are decoded as UTF-8, with U+FFFD for what is not."""


@dataclass(slots=True)
class TensorGroups:
    """The bytes of a file's tensors, by what part of a model they are; for what of it lies in which memory."""

    input: int = 0  # what looks tokens up: the embeddings
    blocks: int = 0  # "blk.<n>.…" without experts
    experts: int = 0  # "blk.<n>.…_exps…"
    rest: int = 0  # output matrix, output norm, and what belongs to no block
    embedding: int = 0  # of the input, the embedding matrix of the tokens
    embedding_type: int | None = None  # its ggml_type
    has_output: bool = False  # there is an output matrix, so the embedding matrix does not serve as one
    matrices_by_type: dict[int, int] = field(default_factory=dict)
    """ggml_type → bytes, of what is multiplied with and has rows that llama.cpp can repack."""

    def add(self, name: str, type_number: int, size: int, rows: int | None) -> None:
        """Count a tensor; ``rows`` of a matrix, ``None`` for a vector."""
        if name.startswith(_INPUT_TENSORS):
            self.input += size
            if name == "token_embd.weight":
                self.embedding, self.embedding_type = size, type_number
            return
        if not name.startswith(_BLOCK_TENSORS):
            self.rest += size
            self.has_output = self.has_output or name == "output.weight"
        elif "_exps" in name:
            self.experts += size
        else:
            self.blocks += size
        if size and rows is not None and rows % _REPACKED_ROWS == 0:
            self.matrices_by_type[type_number] = self.matrices_by_type.get(type_number, 0) + size


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a header holds: its metadata, and its tensors summed up."""

    version: int
    metadata: Mapping[str, GgufValue]
    tensor_count: int
    parameter_count: int  # elements of all tensors
    expert_parameter_count: int  # of those, in expert tensors (names with "_exps")
    has_classifier: bool  # whether there are tensors of a classification head ("cls.output.weight")
    bytes_by_type: Mapping[int, int]  # ggml_type → bytes; 0 for a type whose block size is not known
    alignment: int  # bytes
    data_offset: int  # byte of the file at which tensor data begins
    required_size: int  # bytes the file must have for all tensors to be inside it
    file_size: int  # bytes the file had when it was opened
    fingerprint: str  # hex; of all header bytes but the content of arrays stepped over
    tensor_groups: TensorGroups = field(default_factory=TensorGroups)

    @property
    def is_whole(self) -> bool:
        """Whether the file is as long as its tensors need."""
        return self.file_size >= self.required_size


def read_header(file: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> GgufHeader:
    """Read the header of a GGUF file, given by its path or by an open descriptor (which stays open).

    Raises ``GgufError`` (see there for its kinds) where the content is to blame, ``OSError`` where the system is.
    Never waits for a writer: a pipe or a device is refused unread.
    """
    with _opened(file) as fd:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotGguf("not a regular file")
        return _Walk(Window(fd, status.st_size, MAX_HEADER_BYTES), status.st_size).header()


@contextmanager
def _opened(file: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> Iterator[int]:
    if isinstance(file, int):
        yield file
        return
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


class _Walk:
    """One walk over one header. Its sums are filled in as tensors go by."""

    def __init__(self, window: Window, size: int) -> None:
        self._window = window
        self._size = size
        self._kept = 0  # estimated bytes of memory
        self._strings = 0  # in arrays
        self._alignment = _DEFAULT_ALIGNMENT
        self._parameters = 0
        self._expert_parameters = 0
        self._has_classifier = False
        self._bytes_by_type: dict[int, int] = {}
        self._groups = TensorGroups()
        self._padded_bytes = 0  # of all tensors, each with its padding
        self._data_end = 0  # of the tensor that ends last, from the beginning of the data

    def header(self) -> GgufHeader:
        window = self._window
        version = self._version()
        tensors, entries = window.unpack(_COUNTS)
        if entries > MAX_METADATA:
            raise self._malformed(f"the header claims {entries} metadata entries; at most {MAX_METADATA} are read")
        if tensors > MAX_TENSORS:
            raise self._malformed(f"the header claims {tensors} tensors; at most {MAX_TENSORS} are read")
        metadata = self._metadata(entries)
        self._alignment = self._alignment_of(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        for _ in range(tensors):
            self._tensor()
        end = window.position
        data_offset = self._padded(end)
        required = data_offset + self._data_end if tensors else end
        self._check_sums(required)
        return GgufHeader(
            version=version,
            metadata=metadata,
            tensor_count=tensors,
            parameter_count=self._parameters,
            expert_parameter_count=self._expert_parameters,
            has_classifier=self._has_classifier,
            bytes_by_type=self._bytes_by_type,
            alignment=self._alignment,
            data_offset=data_offset,
            required_size=required,
            file_size=self._size,
            fingerprint=window.digest(),
            tensor_groups=self._groups,
        )

    def _version(self) -> int:
        magic = self._window.peek(len(_MAGIC))
        if magic and not any(magic):
            raise UnwrittenHeader("the file begins with zeros: its data is not there yet")
        if magic != _MAGIC[: len(magic)]:
            raise NotGguf("the file does not begin as a GGUF file does")
        self._window.take(len(_MAGIC))
        (version,) = self._window.unpack(_U32)
        if version == 0:
            raise UnwrittenHeader("zeros stand where the format's version belongs: the data is not there yet", 4)
        if version & 0xFFFF == 0:
            raise UnsupportedHeader("the file is big endian; only little-endian GGUF files can be used", 4)
        if version not in (2, 3):
            raise UnsupportedHeader(f"the file is GGUF version {version}; versions 2 and 3 can be used", 4)
        return version

    def _metadata(self, entries: int) -> dict[str, GgufValue]:
        metadata: dict[str, GgufValue] = {}
        keys_bytes = 0
        for _ in range(entries):
            self._refuse_zeros()
            begin = self._window.position
            key = self._name("key")
            keys_bytes += self._window.position - begin
            if keys_bytes > MAX_KEYS_BYTES:
                raise MalformedHeader(f"the metadata's keys take more than {MAX_KEYS_BYTES} bytes", begin)
            if key in metadata:
                raise MalformedHeader(f"the metadata key {_shown(key)} is there twice", begin)
            metadata[key] = self._value(self._value_type())
        return metadata

    def _value_type(self) -> ValueType:
        (number,) = self._window.unpack(_U32)
        try:
            return ValueType(number)
        except ValueError:
            raise self._malformed(f"there is no metadata type {number}") from None

    def _value(self, kind: ValueType) -> GgufValue:
        if kind is ValueType.ARRAY:
            return self._array()
        if kind is ValueType.STRING:
            return self._text()
        (value,) = self._window.unpack(_NUMBERS[kind])
        return value

    def _text(self) -> str | GgufText:
        (length,) = self._window.unpack(_U64)
        if self._kept + length > MAX_KEPT_BYTES:
            self._window.skip(length)
            return GgufText(length)
        text = self._window.take(length).decode("utf-8", "replace")
        self._kept += length + _ENTRY_OVERHEAD
        return text

    def _array(self) -> GgufArray:
        element_type = self._value_type()
        if element_type is ValueType.ARRAY:
            raise self._malformed("an array of arrays stands in the metadata; no reader of models takes it")
        (length,) = self._window.unpack(_U64)
        if element_type is ValueType.STRING:
            return GgufArray(element_type, length, self._strings_of(length))
        number = _NUMBERS[element_type]
        memory = length * _NUMBER_MEMORY
        if length > MAX_KEPT_NUMBERS or self._kept + memory > MAX_KEPT_BYTES:
            self._window.skip(length * number.size)
            return GgufArray(element_type, length, None)
        data = self._window.take(length * number.size)
        self._kept += memory
        return GgufArray(element_type, length, tuple(value for (value,) in number.iter_unpack(data)))

    def _strings_of(self, length: int) -> tuple[str, ...] | None:
        window = self._window
        self._strings += length
        if self._strings > MAX_STRINGS:
            raise self._malformed(f"the metadata's arrays hold more than {MAX_STRINGS} strings")
        if length > MAX_KEPT_STRINGS:
            window.skip_strings(length)
            return None
        kept: list[str] = []
        for done in range(length):
            (size,) = window.unpack(_U64)
            if size > MAX_KEPT_STRING_BYTES or self._kept + size > MAX_KEPT_BYTES:
                window.skip(size)
                window.skip_strings(length - done - 1)
                return None
            kept.append(window.take(size).decode("utf-8", "replace"))
            self._kept += size + _ENTRY_OVERHEAD
        return tuple(kept)

    def _tensor(self) -> None:
        self._refuse_zeros()
        begin = self._window.position
        name = self._name("tensor's name")
        (dimensions,) = self._window.unpack(_U32)
        if dimensions > MAX_DIMENSIONS:
            raise MalformedHeader(f"the tensor {_shown(name)} has {dimensions} dimensions; ggml has at most 4", begin)
        *shape, type_number, offset = self._window.unpack(_TENSOR[dimensions])
        if offset % self._alignment:
            raise MalformedHeader(f"the tensor {_shown(name)} is not aligned to {self._alignment} bytes", begin)
        elements = 1
        for extent in shape:
            elements *= extent
        size = _bytes_of(name, shape[0] if shape else 1, elements, type_number, begin)
        if elements > MAX_INTEGER or offset + size > MAX_INTEGER:
            raise MalformedHeader(f"the tensor {_shown(name)} is larger than any file", begin)
        self._parameters += elements
        if "_exps" in name:
            self._expert_parameters += elements
        elif name in _CLASSIFIER_TENSORS:
            self._has_classifier = True
        self._bytes_by_type[type_number] = self._bytes_by_type.get(type_number, 0) + size
        self._groups.add(name, type_number, size, shape[1] if dimensions > 1 else None)
        self._padded_bytes += self._padded(size)
        self._data_end = max(self._data_end, offset + size)

    def _check_sums(self, required: int) -> None:
        if self._parameters > MAX_INTEGER or required > MAX_INTEGER:
            raise self._malformed("the tensors together are larger than any file")
        # More bytes than there is room for, whatever the order: some tensors lie over each other.
        if self._padded_bytes > self._padded(self._data_end):
            raise self._malformed("the tensors overlap")

    def _name(self, what: str) -> str:
        (length,) = self._window.unpack(_U64)
        if length > MAX_NAME_BYTES:
            raise self._malformed(f"a {what} of {length} bytes is too long; at most {MAX_NAME_BYTES} are read")
        return self._window.take(length).decode("utf-8", "replace")

    def _refuse_zeros(self) -> None:
        """Tell a header that is not written to its end from a damaged one."""
        window = self._window
        if window.next_byte() == 0:
            ahead = window.peek(_ZEROS_THAT_TELL)
            if len(ahead) == _ZEROS_THAT_TELL and not any(ahead):
                raise UnwrittenHeader(
                    "zeros stand where the header goes on: its data is not there yet", window.position
                )

    def _alignment_of(self, value: GgufValue) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value & (value - 1):
            raise self._malformed("the metadata's general.alignment is not a power of two")
        return value

    def _padded(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment

    def _malformed(self, message: str) -> MalformedHeader:
        return MalformedHeader(message, self._window.position)


def _bytes_of(name: str, row: int, elements: int, type_number: int, offset: int) -> int:
    """Return the bytes that a tensor's data takes; 0 where its type is not known."""
    kind = TENSOR_TYPES.get(type_number)
    if kind is None:
        return 0
    if row % kind.block_size:
        raise MalformedHeader(
            f"the tensor {_shown(name)} has rows of {row} elements, and {kind.name} comes in blocks of "
            f"{kind.block_size}",
            offset,
        )
    return elements // kind.block_size * kind.block_bytes


def _shown(name: str) -> str:
    """Return a name as a person may be shown it: quoted, control characters escaped, not too long."""
    return ascii(name if len(name) <= 64 else name[:61] + "...")
