"""Hosts for scenarios: Debian roots booted with the package on them, or, for autopkgtest, this very machine.

Scenarios are not collected by `make test`: their files are named so that only `make test-system` finds them.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import locations
import pytest
from releases import RELEASES, Release, release_named
from root_cache import CONTAINER_ROOTS, dependencies_of, kept_root
from toy_model import write_toy_model

from tests.system.host import Host, Parts
from tests.system.hosts import ContainerHosts, Hosts, ThisMachineHosts
from tests.system.packages import (
    break_the_agent,
    built_package,
    change_the_configuration,
    repacked,
    say_another_version,
)

_PARTS = Path("/opt/parts")
_LLAMA_CPP = Path("/opt/llama.cpp")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--packages", type=Path, default=locations.CHECKOUT / "dist", help="folder with the built .deb")
    parser.addoption("--this-machine", action="store_true", help="try the package on this machine, which it changes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "release" in metafunc.fixturenames:
        releases: tuple[Release, ...] = RELEASES
        if metafunc.config.getoption("--this-machine"):
            releases = (release_named(platform.freedesktop_os_release()["VERSION_ID"]),)
        # Where several processes share the scenarios, each has the hosts of one release. On a host that is tried
        # itself there may be nothing that knows of groups.
        grouped = metafunc.config.pluginmanager.hasplugin("xdist")
        metafunc.parametrize(
            "release",
            [
                pytest.param(each, id=each.name, marks=[pytest.mark.xdist_group(each.name)] if grouped else [])
                for each in releases
            ],
            scope="session",
        )


@pytest.fixture(scope="session")
def parts_folder(release: Release, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Everything a host gets: the package in its versions, and sample models."""
    # Around containers, /run is a private one in memory: nothing of it stays, whatever ends the run.
    place = None if request.config.getoption("--this-machine") else "/run"
    with tempfile.TemporaryDirectory(prefix="magi-parts-", dir=place) as folder:
        yield _filled(Path(folder), release, request.config.getoption("--packages"))


def _filled(folder: Path, release: Release, packages: Path) -> Path:
    package = shutil.copyfile(built_package(packages, release), folder / "package.deb")
    repacked(package, folder / "newer.deb", "+1", say_another_version)
    repacked(package, folder / "newer_configuration.deb", "+2", change_the_configuration)
    repacked(package, folder / "broken.deb", "+3", break_the_agent)
    samples = folder / "samples"
    samples.mkdir()
    write_toy_model(samples / "toy.gguf")
    write_toy_model(samples / "other.gguf", name="other", seed=2)
    shutil.copyfile(locations.SMOLLM2, samples / "talker.gguf")
    return folder


@pytest.fixture(scope="session")
def hosts(release: Release, parts_folder: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    llama_server = locations.LLAMA_SERVER.resolve()
    if request.config.getoption("--this-machine"):
        # Units see nothing of a checkout in somebody's home or in /tmp.
        shutil.copytree(llama_server.parent, _LLAMA_CPP, dirs_exist_ok=True)
        yield ThisMachineHosts(_parts(parts_folder, _LLAMA_CPP / llama_server.name))
        return
    shown = {str(_PARTS): parts_folder, str(_LLAMA_CPP): llama_server.parent}
    with kept_root(CONTAINER_ROOTS, release, dependencies_of(parts_folder / "package.deb")) as root:
        made = ContainerHosts(root, _parts(_PARTS, _LLAMA_CPP / llama_server.name), shown)
        with contextlib.closing(made):
            yield made


def _parts(folder: Path, llama_server: Path) -> Parts:
    return Parts(
        package=folder / "package.deb",
        newer=folder / "newer.deb",
        newer_configuration=folder / "newer_configuration.deb",
        broken=folder / "broken.deb",
        llama_server=llama_server,
        samples=folder / "samples",
    )


@pytest.fixture
def bare(hosts: Hosts) -> Iterator[Host]:
    """A host without the package, with a llama-server, a folder for models and two users."""
    with hosts.bare() as host:
        yield host
        host.print_journal()


@pytest.fixture
def installed(hosts: Hosts) -> Iterator[Host]:
    """A host with the package on it, no model, and one of the users in group magi."""
    with hosts.installed() as host:
        yield host
        host.print_journal()


@pytest.fixture
def serving(hosts: Hosts) -> Iterator[Host]:
    """A host that was booted with one model enabled, which is ready."""
    with hosts.serving() as host:
        yield host
        host.print_journal()
