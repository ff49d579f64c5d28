"""What ``magictl doctor`` looks at of the programs: each llama-server, its libraries, its version and devices."""

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magi_agent.cli.doctor_agent import AS_ROOT
from magi_agent.cli.doctor_findings import Finding, failed, ok, unknown, warning
from magi_agent.cli.doctor_patient import Patient
from magi_agent.cli.doctor_view import View, view_of_servers
from magi_agent.discovery.access import find_obstacle, granting, reason
from magi_agent.errors import MagiError
from magi_agent.host.accounts import DYNAMIC, Account
from magi_agent.host.executable import Executable, NotElf, read_executable
from magi_agent.host.gpu_devices import gpus
from magi_agent.host.libraries import Libraries, libraries_of
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.vocabulary import Scope

_READ_EXECUTE: Final = os.R_OK | os.X_OK
_MOST_BACK_ENDS: Final = 32
_PACKAGES: Final = {
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libcurl.so.4": "libcurl4",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
    "libvulkan.so.1": "libvulkan1",
    "libopenblas.so.0": "libopenblas0",
    "libcuda.so.1": "libcuda1",
    "libnuma.so.1": "libnuma1",
}
"""Debian's packages of libraries that builds of llama-server often need."""


def binaries(patient: Patient) -> Iterator[Finding]:
    """Whether each llama-server can be executed by the servers' user, and finds its libraries."""
    settings = patient.settings
    if settings is None:
        yield unknown("which llama-server is used is not known without the configuration")
        return
    keys = {settings.llama_server_path: "servers.llama_server_path"}
    keys.update({path: "servers.llama_server_alternatives" for _, path in settings.llama_server_alternatives})
    view = view_of_servers(settings)
    for path, key in keys.items():
        yield from _binary(path, patient.changing(key), patient.servers_account or DYNAMIC, view)


def _binary(path: Path, other: str, account: Account, view: View) -> Iterator[Finding]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            yield failed(f"{path} is no program", other)
            return
        obstacle = find_obstacle(str(path), account, needed=_READ_EXECUTE, shown_folders=view.mounted)
        if obstacle:
            yield failed(f"{path}: {reason(obstacle, account)}", granting(obstacle, account, None))
            return
        program = read_executable(path)
        libraries = libraries_of(path)
    except FileNotFoundError:
        yield failed(f"there is no {path}", f"install llama-server there, or {other}")
        return
    except PermissionError as error:
        yield unknown(f"{path}: {error.strerror}", AS_ROOT)
        return
    except OSError as error:
        yield failed(f"{path}: {error.strerror}")
        return
    except NotElf as error:
        yield _no_program(path, error)
        return
    trouble = [*_unfit(path, program), *_libraries(path, libraries, view), *_back_ends(path)]
    yield from trouble
    if not trouble:
        yield ok(f"{path}: for {program.machine}, all {len(libraries.found)} libraries found")


def _no_program(path: Path, error: NotElf) -> Finding:
    try:
        with path.open("rb") as file:
            is_script = file.read(2) == b"#!"
    except OSError:
        is_script = False
    if is_script:
        return warning(f"{path} is a script: what it runs is not looked at")
    return failed(f"{path}: {error}", "install a build of llama-server for this host")


def _unfit(path: Path, program: Executable) -> Iterator[Finding]:
    here = os.uname().machine
    if program.machine != here:
        yield failed(f"{path} is made for {program.machine}, and this host is {here}", "install a build for this host")
        return
    if program.interpreter and not Path(program.interpreter).exists():
        yield failed(
            f"{path} needs the loader {program.interpreter}, which is not here", "install a build for this host"
        )
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    if name == "glibc" and program.glibc > tuple(map(int, version.split(".")[:2])):
        needed = ".".join(map(str, program.glibc))
        yield failed(f"{path} needs glibc {needed}, and this host has {version}", "install a build for this release")


def _libraries(path: Path, libraries: Libraries, view: View) -> Iterator[Finding]:
    for library in libraries.missing:
        by = f", by way of {library.needed_by.name}" if library.needed_by.name != path.resolve().name else ""
        yield failed(f"{path} needs {library.name}, which is not found{by}", _installing(library.name))
    hidden = [place for library in libraries.found for place in (library, library.resolve()) if not view.has(place)]
    if hidden:
        yield failed(
            f"{hidden[0]}, which {path} needs, is not seen in the servers' sandbox",
            "put the program and its libraries below /opt or /usr/local, or the libraries beside the program",
        )


def _back_ends(path: Path) -> Iterator[Finding]:
    """The back ends that llama-server loads by itself, from beside its own file, and leaves out where that fails."""
    for back_end in sorted(path.resolve().parent.glob("libggml-*.so"))[:_MOST_BACK_ENDS]:
        try:
            missing = libraries_of(back_end).missing
        except (OSError, NotElf):
            continue
        if missing:
            names = ", ".join(library.name for library in missing)
            yield warning(f"{back_end.name} is left out, as {names} is not found", _installing(missing[0].name))


def _installing(library: str) -> str:
    package = _PACKAGES.get(library)
    return (
        f"sudo apt install {package}"
        if package
        else f"install the package that has {library}: apt-file search {library}"
    )


def devices(patient: Patient) -> Iterator[Finding]:
    """What each llama-server says of itself and of the devices, run as the servers are."""
    settings = patient.settings
    if settings is None:
        yield unknown("which llama-server is used is not known without the configuration")
        return
    if settings.systemd_scope is Scope.SYSTEM and not patient.is_root:
        yield unknown("llama-server's version and devices: only root may run it as the servers' user", AS_ROOT)
        return
    if patient.servers_account is None:
        yield unknown("llama-server's version and devices: there is no user whom it would run as")
        return
    from magi_agent.cli.doctor_probe import ask_binaries

    paths = [path for path in dict.fromkeys(settings.binaries) if os.path.isfile(path)]  # noqa: PTH113  # never raises
    try:
        # Without systemd there is nothing to wait for.
        properties(settings.systemd_scope, None, "Version")
        told = asyncio.run(ask_binaries(paths, settings))
    except (SystemctlFailed, MagiError) as error:
        yield unknown(f"llama-server's version and devices: {error}")
        return
    has_gpu = bool(gpus(patient.tree))
    for path, said in told.items():
        if said.problem:
            yield failed(f"{path} cannot be run as the servers are: {said.problem}")
        elif said.devices:
            yield ok(f"{path}: {said.version}; devices: {', '.join(said.devices)}")
        elif has_gpu:
            yield warning(f"{path}: {said.version}; it sees no GPU, and so models run on the CPU")
        else:
            yield ok(f"{path}: {said.version}; no GPU devices")
