"""Other versions of a built package, made of itself: what an upgrade needs to have something to upgrade to."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from releases import Release

_AGENT = Path("usr/lib/magi-agent/magi_agent")


def built_package(folder: Path, release: Release) -> Path:
    """The package for a release, the one built last; fails where there is none."""
    built = sorted(folder.glob(f"magi-agent_*{release.mark}_*.deb"), key=lambda path: path.stat().st_mtime)
    if not built:
        pytest.fail(f"no magi-agent_*{release.mark}_*.deb in {folder}: run packaging/roots/prepare")
    return built[-1]


def version_of(package: Path) -> str:
    return subprocess.run(
        ["dpkg-deb", "--field", str(package), "Version"], check=True, text=True, capture_output=True
    ).stdout.strip()


def repacked(package: Path, into: Path, suffix: str, change: Callable[[Path], None]) -> Path:
    """The package once more with a longer version; ``change`` gets the folder with what it installs."""
    tree = into.with_suffix(".tree")
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", rf"\g<0>{suffix}", control.read_text()))
    change(tree)
    subprocess.run(["dpkg-deb", "-Zgzip", "-z1", "--build", str(tree), str(into)], check=True, capture_output=True)
    shutil.rmtree(tree)
    return into


def say_another_version(tree: Path) -> None:
    """Have the API say that it is version 99."""
    about = tree / _AGENT / "__init__.py"
    about.write_text(about.read_text() + '\n__version__ = "99"\n')


def change_the_configuration(tree: Path) -> None:
    """Have the package bring another agent.toml."""
    say_another_version(tree)
    shipped = tree / "etc/magi-agent/agent.toml"
    shipped.write_text(f"# This line is new in this version.\n{shipped.read_text()}")


def break_the_agent(tree: Path) -> None:
    """Have the agent end as soon as it is started."""
    (tree / _AGENT / "agent.py").write_text('raise SystemExit("this version does not work")\n')
