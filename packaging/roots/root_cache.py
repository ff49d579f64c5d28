"""Debian root folders, made once by mmdebstrap and kept: those of containers in `.cache/roots`.

    PYTHONPATH=packaging/workbench python3 packaging/roots/root_cache.py 12 dist/magi-agent_*~deb12_*.deb

makes the one that a package is tried in, if it is not there. A root is named by what went into it, so a change of the
package list makes a new one. Nothing is ever written to a root that is finished: containers run on an overlay of it.
Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import locations
from releases import Release, release_named

HOST_PACKAGES = (
    "apt",
    "curl",
    "dbus",
    "iproute2",
    "libgomp1",
    "passwd",
    "polkitd",
    "procps",
    "python3",
    "systemd-sysv",
)
"""What a plain host with a llama-server has, and a client to ask the API with."""

_MAKING_SECONDS = 900.0
_NAME_BYTES = 6
_UNFINISHED = ".unfinished"


class RootError(Exception):
    """A root could not be made; the text says what to do."""


@dataclass(frozen=True, slots=True)
class RootKind:
    """Roots for one purpose: what is in them, and where they are kept."""

    folder: Path
    """Where they are kept; `make clean` leaves it alone."""
    packages: tuple[str, ...]
    size: str
    """What one of them takes up, in words."""
    recipe: tuple[object, ...]
    """What else decides how one is made, as JSON can hold it: another recipe is another root."""
    furnish: Callable[[Path], None] | None = None
    """Adds to a root what is in no package."""


CONTAINER_ROOTS = RootKind(locations.CACHE / "roots", HOST_PACKAGES, "about 250 MB", (1,))
"""What containers run on an overlay of."""


@contextlib.contextmanager
def kept_root(kind: RootKind, release: Release, more_packages: Iterable[str] = ()) -> Iterator[Path]:
    """Give the folder of a root with these packages on top of the usual ones, made if need be; it is only to be read.

    As long as it is given, no other run removes it. Raises RootError.
    """
    packages = sorted({*kind.packages, *more_packages})
    kind.folder.mkdir(parents=True, exist_ok=True)
    root = kind.folder / f"{release.codename}-{_hash_of(kind, release, packages)}"
    with (kind.folder / f"{release.codename}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not root.exists():
            # To change a lock is to release it for a moment: what was true before has to be asked again.
            _lock_alone(lock.fileno(), release)
            if not root.exists():
                _make(kind, release, packages, root)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield root


def dependencies_of(package: Path) -> list[str]:
    """Return the names a `.deb` depends on, the first of each choice. Raises RootError.

    A container has no network, so what apt would fetch for the package has to be in the root already.
    """
    asked = subprocess.run(
        ["dpkg-deb", "--field", str(package), "Pre-Depends", "Depends"], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        raise RootError(f"{package} is no package that dpkg-deb reads: {asked.stderr.strip()}")
    values = re.sub(r"^(Pre-)?Depends:", ",", asked.stdout, flags=re.MULTILINE)
    choices = [re.split(r"[|(:\[<\s]", choice.strip(), maxsplit=1)[0] for choice in values.split(",")]
    return sorted({name for name in choices if name})


def _lock_alone(lock: int, release: Release) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(f"waiting for another run that uses a root of Debian {release.number}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _say(text: str) -> None:
    print(f"roots: {text}", file=sys.stderr, flush=True)


def _hash_of(kind: RootKind, release: Release, packages: list[str]) -> str:
    made_of = json.dumps([*kind.recipe, release.codename, os.uname().machine, packages])
    return hashlib.sha256(made_of.encode()).hexdigest()[: 2 * _NAME_BYTES]


def _make(kind: RootKind, release: Release, packages: list[str], root: Path) -> None:
    """Make the root, and remove the release's others: whoever uses one holds the lock."""
    for old in kind.folder.glob(f"{release.codename}-*"):
        # An interrupted removal leaves no half root by a name that somebody may ask for again.
        shutil.rmtree(old if old.suffix == _UNFINISHED else old.rename(f"{old}{_UNFINISHED}"))
    _say(f"making one of Debian {release.number} in {kind.folder.name}, {kind.size}; once")
    unfinished = root.with_name(root.name + _UNFINISHED)
    command = [
        "mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--format=directory",
        f"--include={','.join(packages)}", release.codename, str(unfinished),
    ]  # fmt: skip
    try:
        made = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_MAKING_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise RootError("mmdebstrap is missing. As root: packaging/roots/prepare") from error
    except subprocess.TimeoutExpired as error:
        raise RootError(
            f"mmdebstrap was not through after {_MAKING_SECONDS:.0f} s; is the mirror reachable?"
        ) from error
    if made.returncode != 0:
        raise RootError(f"mmdebstrap made no Debian {release.number}: {made.stderr.strip()[-2000:]}")
    if kind.furnish is not None:
        kind.furnish(unfinished)
    unfinished.rename(root)


def main() -> int:
    """Make the root of a release that a package needs; the arguments are both."""
    release, package = sys.argv[1:]
    try:
        with kept_root(CONTAINER_ROOTS, release_named(release), dependencies_of(Path(package))):
            return 0
    except (RootError, OSError) as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
