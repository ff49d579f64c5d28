"""GGUF headers written byte by byte, right and wrong ones, for what the reference writer refuses to write."""

import struct
from collections.abc import Sequence

STRING, ARRAY, UINT8, UINT32, UINT64, FLOAT32, BOOL = 8, 9, 0, 4, 10, 6, 7


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    """One metadata entry; ``value`` as it stands in the file."""
    return string(key) + struct.pack("<I", kind) + value


def text_entry(key: str, text: str | bytes) -> bytes:
    return entry(key, STRING, string(text))


def number_entry(key: str, number: int) -> bytes:
    return entry(key, UINT32, struct.pack("<I", number))


def array_entry(key: str, kind: int, length: int, content: bytes) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", kind, length) + content)


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    entry_count: int | None = None,
    tensor_count: int | None = None,
    data: int = 0,
    alignment: int = 32,
) -> bytes:
    """A whole file: the header, padding, and ``data`` zero bytes."""
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    header += b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment + data) if data else header
