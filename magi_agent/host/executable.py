"""What an ELF file says of itself: the machine it is for, its loader, and the libraries it needs.

Read from the file alone (elf(5)); nothing of it is run, so it may be anybody's.
"""

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

_MAGIC: Final = b"\x7fELF"
_IDENTIFICATION: Final = 16
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 15, 29
_MAX_SEGMENTS: Final = 512
_MAX_DYNAMIC: Final = 1 << 20
_MAX_STRINGS: Final = 1 << 24
_MAX_NAME: Final = 4096
_MAX_OFFSET: Final = 1 << 40
_GLIBC: Final = re.compile(rb"\0GLIBC_(\d{1,3})\.(\d{1,3})(?=[.\0])")
# e_machine of elf.h, by the names that uname(2) has for them.
_MACHINES: Final = {
    3: "i686",
    21: "ppc64le",
    22: "s390x",
    40: "armv7l",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    258: "loongarch64",
}


class NotElf(ValueError):
    """The file is no ELF file, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Executable:
    """A program or a library."""

    machine: str
    """As uname(2) calls it, or the number where that is not known here."""
    interpreter: str | None
    """The loader that a program asks for; a library asks for none."""
    needed: tuple[str, ...]
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]
    glibc: tuple[int, int]
    """The newest version of the C library of which it names something; (0, 0) for none."""


def read_executable(path: Path) -> Executable:
    """Read an ELF file. Raises ``OSError``, and ``NotElf`` with what is wrong."""
    with path.open("rb") as file:
        try:
            return _Reader(file).read()
        except (struct.error, OverflowError):
            raise NotElf("the ELF file is cut off") from None


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        identification = file.read(_IDENTIFICATION)
        if len(identification) < _IDENTIFICATION or not identification.startswith(_MAGIC):
            raise NotElf("it is no program (no ELF file)")
        self._wide = identification[4] == 2
        self._order = ">" if identification[5] == 2 else "<"

    def read(self) -> Executable:
        """Read what is asked."""
        header = self._unpack(_IDENTIFICATION, "HHIQQQIHHH" if self._wide else "HHIIIIIHHH")
        _, machine, _, _, table, _, _, _, entry_size, count = header
        segments = [self._segment(table + entry_size * index) for index in range(min(count, _MAX_SEGMENTS))]
        interpreter = next((self._text(offset, size) for kind, offset, _, size in segments if kind == _PT_INTERP), None)
        dynamic = self._dynamic(segments)
        strings = self._strings(segments, dict(dynamic))

        def texts(tag: int) -> tuple[str, ...]:
            return tuple(_string(strings, value) for found, value in dynamic if found == tag)

        return Executable(
            machine=_MACHINES.get(machine, f"machine {machine}"),
            interpreter=interpreter,
            needed=texts(_DT_NEEDED),
            rpath=tuple(folder for text in texts(_DT_RPATH) for folder in text.split(":") if folder),
            runpath=tuple(folder for text in texts(_DT_RUNPATH) for folder in text.split(":") if folder),
            glibc=max(((int(major), int(minor)) for major, minor in _GLIBC.findall(strings)), default=(0, 0)),
        )

    def _segment(self, offset: int) -> tuple[int, int, int, int]:
        """Kind, offset in the file, address and size in the file."""
        if self._wide:
            kind, _, begin, address, _, size, _, _ = self._unpack(offset, "IIQQQQQQ")
        else:
            kind, begin, address, _, size, _, _, _ = self._unpack(offset, "IIIIIIII")
        return kind, begin, address, size

    def _dynamic(self, segments: list[tuple[int, int, int, int]]) -> list[tuple[int, int]]:
        found = next(((begin, size) for kind, begin, _, size in segments if kind == _PT_DYNAMIC), None)
        if found is None:
            return []
        entry = struct.Struct(self._order + ("QQ" if self._wide else "II"))
        data = self._bytes(found[0], min(found[1], _MAX_DYNAMIC))
        return list(_until_null(entry.iter_unpack(data[: len(data) // entry.size * entry.size])))

    def _strings(self, segments: list[tuple[int, int, int, int]], dynamic: dict[int, int]) -> bytes:
        address = dynamic.get(_DT_STRTAB)
        if address is None:
            return b""
        for kind, begin, start, size in segments:
            if kind == _PT_LOAD and start <= address < start + size:
                return self._bytes(begin + address - start, min(dynamic.get(_DT_STRSZ, 0), _MAX_STRINGS))
        raise NotElf("the ELF file is damaged: its names lie outside of it")

    def _text(self, offset: int, size: int) -> str:
        return _string(self._bytes(offset, min(size, _MAX_NAME)), 0)

    def _unpack(self, offset: int, layout: str) -> tuple[int, ...]:
        form = struct.Struct(self._order + layout)
        return form.unpack(self._bytes(offset, form.size))

    def _bytes(self, offset: int, size: int) -> bytes:
        if offset > _MAX_OFFSET:
            raise NotElf("the ELF file is damaged: it points far outside of itself")
        self._file.seek(offset)
        return self._file.read(size)


def _until_null(entries: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    for tag, value in entries:
        if tag == _DT_NULL:
            return
        yield tag, value


def _string(strings: bytes, begin: int) -> str:
    end = strings.find(b"\0", begin, begin + _MAX_NAME)
    return os.fsdecode(strings[begin : end if end >= 0 else begin + _MAX_NAME])
