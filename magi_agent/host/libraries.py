"""Which shared libraries a program would be given by the dynamic loader, and which it would not find.

The search is that of ld.so(8), without running anything: ``RPATH`` of who needs a library and of who needs that,
``RUNPATH`` of who needs it, the loader's cache, the usual folders. Environment variables count for nothing, as units
have none of these.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.host.executable import Executable, NotElf, read_executable

_CACHED: Final = re.compile(r"^\s+(\S+) \(.*\) => (/.*)$", re.MULTILINE)
_MOST_LIBRARIES: Final = 1000
_SECONDS: Final = 10.0
_USUAL_FOLDERS: Final = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")


@dataclass(frozen=True, slots=True)
class MissingLibrary:
    """A library that the loader would not find."""

    name: str
    needed_by: Path


@dataclass(frozen=True, slots=True)
class Libraries:
    """The libraries of one program, those that its libraries need included."""

    found: tuple[Path, ...]
    missing: tuple[MissingLibrary, ...]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A file that would be loaded, with the ``RPATH`` folders that count for what it needs."""

    path: Path
    executable: Executable
    inherited: tuple[str, ...]


def libraries_of(program: Path) -> Libraries:
    """Find what a program would be loaded with. Raises ``OSError`` and ``NotElf`` for the program itself."""
    real = Path(os.path.realpath(program))
    first = read_executable(real)
    known = _cache()
    found: dict[str, Path] = {}
    missing: dict[str, MissingLibrary] = {}
    waiting = [_Loaded(real, first, ())]
    while waiting and len(found) < _MOST_LIBRARIES:
        loaded = waiting.pop()
        for name in loaded.executable.needed:
            if name in found or name in missing:
                continue
            library = _find(name, loaded, first.machine, known)
            if library is None:
                missing[name] = MissingLibrary(name, loaded.path)
                continue
            found[name] = library.path
            waiting.append(library)
    return Libraries(tuple(found.values()), tuple(missing.values()))


def installed_library(name: str) -> Path | None:
    """The file behind a library of this host's, links followed; ``None`` where the loader's cache has none."""
    for path in _cache().get(name, ()):
        real = Path(os.path.realpath(path))
        try:
            # There may be one for 32 bits too.
            if read_executable(real).machine == os.uname().machine:
                return real
        except (OSError, NotElf):
            continue
    return None


def _find(name: str, by: _Loaded, machine: str, known: Mapping[str, list[str]]) -> _Loaded | None:
    rpath = () if by.executable.runpath else tuple(_expanded(by.executable.rpath, by.path))
    inherited = (*rpath, *by.inherited)
    for candidate in _candidates(name, by, inherited, known):
        try:
            executable = read_executable(Path(candidate))
        except (OSError, NotElf):
            continue
        if executable.machine == machine:
            return _Loaded(Path(candidate), executable, inherited)
    return None


def _candidates(name: str, by: _Loaded, rpath: tuple[str, ...], known: Mapping[str, list[str]]) -> Iterator[str]:
    if "/" in name:
        yield name
        return
    folders = (*rpath, *_expanded(by.executable.runpath, by.path))
    yield from (f"{folder}/{name}" for folder in folders)
    yield from known.get(name, ())
    triplet = f"{os.uname().machine}-linux-gnu"
    yield from (f"{folder}/{name}" for base in _USUAL_FOLDERS for folder in (f"{base}/{triplet}", base))


def _expanded(folders: tuple[str, ...], by: Path) -> Iterator[str]:
    for folder in folders:
        yield folder.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", str(by.parent))


def _cache() -> dict[str, list[str]]:
    """The loader's cache, as ldconfig(8) prints it: the paths of each name, the one that is taken first."""
    program = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    paths: dict[str, list[str]] = {}
    if program is None:
        return paths
    try:
        # What is cached is printed also by somebody who may not write it.
        printed = subprocess.run(
            [program, "-p"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env={"LC_ALL": "C"},
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return paths
    for name, path in _CACHED.findall(printed):
        paths.setdefault(name, []).append(path)
    return paths
