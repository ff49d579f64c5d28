"""What a program needs is told without running it, and is what the dynamic loader says."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from magi_agent.host.executable import NotElf, read_executable
from magi_agent.host.libraries import installed_library, libraries_of

_MACHINE = 18
"""Where e_machine stands."""


@pytest.fixture
def copied_server(llama_server: Path, tmp_path: Path) -> Path:
    """A llama-server whose folder may be changed."""
    for path in llama_server.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    copy = tmp_path / llama_server.name
    copy.unlink()
    shutil.copy(llama_server, copy)
    return copy


def as_ldd_says(program: Path) -> tuple[set[str], set[str]]:
    """The names that are found, and those that are not."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=30, check=True).stdout
    found = set(re.findall(r"^\t(\S+) => /", said, re.MULTILINE))
    return found, set(re.findall(r"^\t(\S+) => not found", said, re.MULTILINE))


def test_the_libraries_are_those_that_ldd_finds(copied_server: Path) -> None:
    libraries = libraries_of(copied_server)

    found, missing = as_ldd_says(copied_server)
    assert len(found) > 10
    assert {path.name for path in libraries.found} - {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"} == found
    assert (libraries.missing, missing) == ((), set())


def test_what_is_missing_is_what_ldd_misses(copied_server: Path) -> None:
    for name in ("libggml.so.0", "libmtmd.so.0"):
        (copied_server.parent / name).unlink()
    # By the links the others would be found beside the libraries' own files.
    for path in copied_server.parent.iterdir():
        if path.is_symlink() and ".so" in path.name:
            target = path.resolve()
            path.unlink()
            shutil.copy(target, path)

    libraries = libraries_of(copied_server)

    assert {library.name for library in libraries.missing} == as_ldd_says(copied_server)[1]
    assert {"libggml.so.0", "libmtmd.so.0"} <= {library.name for library in libraries.missing}
    assert {library.needed_by.name for library in libraries.missing} <= {
        path.name for path in copied_server.parent.iterdir()
    }


def test_a_library_for_another_machine_is_none(copied_server: Path) -> None:
    name = "libllama-server-impl.so"
    library = copied_server.parent / name
    content = bytearray(library.read_bytes())
    content[_MACHINE : _MACHINE + 2] = struct.pack("<H", 183 if os.uname().machine != "aarch64" else 62)
    library.unlink()
    library.write_bytes(content)

    assert [missing.name for missing in libraries_of(copied_server).missing] == [name]


def test_a_program_says_what_it_is_for(copied_server: Path) -> None:
    program = read_executable(copied_server)

    assert program.machine == os.uname().machine
    assert program.interpreter is not None
    assert Path(program.interpreter).exists()
    assert program.runpath == ("$ORIGIN",)
    assert (2, 2) < program.glibc <= tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")))  # type: ignore[union-attr]


def test_a_damaged_program_is_an_error_and_nothing_else(copied_server: Path, tmp_path: Path) -> None:
    content = copied_server.read_bytes()
    numbers = random.Random(2)
    path = tmp_path / "damaged"
    refused = 0
    for number in range(600):
        damaged = bytearray(content[: numbers.randrange(len(content))] if number % 2 else content)
        for _ in range(numbers.randrange(1, 20)):
            place = numbers.randrange(min(len(damaged), 0x1000 if number % 3 else len(damaged)) or 1)
            damaged[place : place + 1] = bytes([numbers.randrange(256)])
        path.write_bytes(damaged)
        try:
            read_executable(path)
        except NotElf:
            refused += 1
    assert 20 < refused < 600


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"GGUF" + bytes(100)])
def test_what_is_no_program_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)

    with pytest.raises(NotElf):
        read_executable(path)


def test_a_library_of_the_host_is_found_by_its_name() -> None:
    path = installed_library("libc.so.6")

    assert path is not None
    assert path.is_file()
    assert installed_library("libnobody-has-this.so.1") is None
