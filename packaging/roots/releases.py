"""The Debian releases that the package is made for and tried in. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Release:
    """One release of Debian."""

    number: int
    codename: str

    @property
    def name(self) -> str:
        """Its name in test ids and messages, such as ``debian12``."""
        return f"debian{self.number}"

    @property
    def mark(self) -> str:
        """What the version of a package built for it ends with, such as ``~deb12``."""
        return f"~deb{self.number}"


RELEASES = (Release(12, "bookworm"), Release(13, "trixie"))
"""Every release that there is a package for, oldest first."""


def release_named(name: str) -> Release:
    """Return the release of this name, codename or number. Raises ValueError, naming those there are."""
    for release in RELEASES:
        if name in {release.name, release.codename, str(release.number)}:
            return release
    raise ValueError(f"no release {name!r}: there are {', '.join(release.name for release in RELEASES)}")
