"""Debian root folders, made once by mmdebstrap and kept in `.cache/roots`.

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
from collections.abc import Iterable, Iterator
from pathlib import Path

import locations
from releases import Release, release_named

ROOTS = locations.CACHE / "roots"
"""Where they are kept; `make clean` leaves it alone."""

_PACKAGES = ("apt", "curl", "dbus", "iproute2", "libgomp1", "passwd", "polkitd", "procps", "python3", "systemd-sysv")
"""What a plain host with a llama-server has, and a client to ask the API with."""

_RECIPE = 1
"""To be raised when the way a root is made changes and its packages do not."""

_MAKING_SECONDS = 600.0
_NAME_BYTES = 6
_UNFINISHED = ".unfinished"


class RootError(Exception):
    """A root could not be made; the text says what to do."""


@contextlib.contextmanager
def root_for(release: Release, more_packages: Iterable[str] = ()) -> Iterator[Path]:
    """Give the folder of a root with these packages on top of the usual ones, made if need be.

    As long as it is given, no other run removes it. Raises RootError.
    """
    packages = sorted({*_PACKAGES, *more_packages})
    ROOTS.mkdir(parents=True, exist_ok=True)
    root = ROOTS / f"{release.codename}-{_hash_of(release, packages)}"
    with (ROOTS / f"{release.codename}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not root.exists():
            # To change a lock is to release it for a moment: what was true before has to be asked again.
            _lock_alone(lock.fileno(), release)
            if not root.exists():
                _make(release, packages, root)
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


def _hash_of(release: Release, packages: list[str]) -> str:
    made_of = json.dumps([_RECIPE, release.codename, os.uname().machine, packages])
    return hashlib.sha256(made_of.encode()).hexdigest()[: 2 * _NAME_BYTES]


def _make(release: Release, packages: list[str], root: Path) -> None:
    """Make the root, and remove the release's others: whoever uses one holds the lock."""
    for old in ROOTS.glob(f"{release.codename}-*"):
        # An interrupted removal leaves no half root by a name that somebody may ask for again.
        shutil.rmtree(old if old.suffix == _UNFINISHED else old.rename(f"{old}{_UNFINISHED}"))
    _say(f"making one of Debian {release.number}, about 250 MB")
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
    unfinished.rename(root)


def main() -> int:
    """Make the root of a release that a package needs; the arguments are both."""
    release, package = sys.argv[1:]
    try:
        with root_for(release_named(release), dependencies_of(Path(package))):
            return 0
    except (RootError, OSError) as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
