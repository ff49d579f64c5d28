"""What a root is made of follows from the package that is tried in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from releases import RELEASES, release_named
from root_cache import RootError, dependencies_of


def package(folder: Path, *fields: str) -> Path:
    control = folder / "tree/DEBIAN/control"
    control.parent.mkdir(parents=True)
    lines = ["Package: thing", "Version: 1", "Architecture: all", "Maintainer: A <a@example.org>", *fields]
    control.write_text("\n".join([*lines, "Description: thing", ""]))
    made = folder / "thing.deb"
    subprocess.run(["dpkg-deb", "--build", str(folder / "tree"), str(made)], check=True, capture_output=True)
    return made


def test_the_first_of_each_choice_is_what_a_package_depends_on(tmp_path: Path) -> None:
    made = package(
        tmp_path,
        "Pre-Depends: init-system-helpers (>= 1.54~)",
        "Depends: python3 (<< 3.12), python3 (>= 3.11~), libc6:any (>= 2.36), caddy | nginx,\n systemd",
    )
    assert dependencies_of(made) == ["caddy", "init-system-helpers", "libc6", "python3", "systemd"]


def test_a_package_may_depend_on_nothing(tmp_path: Path) -> None:
    assert dependencies_of(package(tmp_path)) == []


def test_what_is_no_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.deb").write_text("no package")
    with pytest.raises(RootError, match=r"other\.deb is no package"):
        dependencies_of(tmp_path / "other.deb")


def test_a_release_is_known_by_each_of_its_names() -> None:
    for release in RELEASES:
        assert {release_named(name) for name in (release.name, release.codename, str(release.number))} == {release}
    with pytest.raises(ValueError, match="debian12, debian13"):
        release_named("11")
