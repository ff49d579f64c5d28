"""A virtual machine with the package on it, booted once for all scenarios; they are found by `make test-vm` alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import locations
import pytest
from releases import RELEASES
from root_cache import dependencies_of, kept_root
from toy_model import write_toy_model
from virtual_machine import VirtualMachine, VirtualMachineError, booted
from vm_image import IMAGES, MACHINE_ROOTS, PARTS, image_of, write_disk

from tests.system.host import Host, Parts
from tests.system.hosts import furnish
from tests.system.packages import built_package

SLOW = 300.0
"""Seconds: on an emulated processor, and beside other work, all takes ten times as long."""
MEMORY_MEBIBYTES = 3072
_INSIDE = Path(__file__).with_name("inside")
_RUN = "run-"
_LEAKY = "llama-server-leaky"
_FILES = {
    # systemd's window for quick retries, one minute, is too short for four starts that take ten times as long.
    "/etc/systemd/system/magi-llama-.service.d/slow.conf": "[Unit]\nStartLimitIntervalSec=1200\n",
    "/etc/default/magi-agent": f"MAGI_LLAMA_SERVER_ALTERNATIVES=leaky=/usr/local/bin/{_LEAKY}\n",
}

_figures: list[str] = []


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines that are printed in the end: what was measured."""
    return _figures


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("measured in the virtual machine")
        for line in _figures:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    release = RELEASES[0]
    package = built_package(locations.CHECKOUT / "dist", release)
    with contextlib.ExitStack() as stack:
        _remove_what_killed_runs_left()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=IMAGES, prefix=f"{_RUN}{os.getpid()}-")))
        parts = folder / "parts"
        _fill(parts)
        write_disk(parts, folder / "parts.disk", "2G")
        shutil.rmtree(parts)
        root = stack.enter_context(kept_root(MACHINE_ROOTS, release, dependencies_of(package)))
        image = image_of(root, folder, package, _FILES)
        machine = stack.enter_context(booted(image, folder / "parts.disk", folder, memory_mebibytes=MEMORY_MEBIBYTES))
        shown = Path(PARTS)
        none = shown / "none.deb"
        host = Host(machine, Parts(none, none, none, none, _server(machine), shown / "samples"))
        try:
            _furnish(host)
            yield host
        except (AssertionError, VirtualMachineError):
            print(machine.last_words())
            raise


def _remove_what_killed_runs_left() -> None:
    for folder in IMAGES.glob(f"{_RUN}*"):
        if not Path("/proc", folder.name.removeprefix(_RUN).partition("-")[0]).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _fill(parts: Path) -> None:
    samples = parts / "samples"
    samples.mkdir(parents=True)
    write_toy_model(samples / "toy.gguf", context_length=8192)
    write_toy_model(samples / "narrow.gguf", name="narrow", seed=2)
    write_toy_model(samples / "leaking.gguf", name="leaking", seed=3)
    shutil.copyfile(locations.SMOLLM2, samples / "talker.gguf")
    shutil.copyfile(locations.GEMMA, samples / "large.gguf")
    for number, server in enumerate(sorted((IMAGES / "servers").rglob("bin/llama-server"))):
        shutil.copytree(server.parent, parts / f"server{number}", symlinks=True)
        shutil.copyfile(_INSIDE / _LEAKY, parts / f"server{number}" / _LEAKY)
        (parts / f"server{number}" / _LEAKY).chmod(0o755)
    shutil.copyfile(_INSIDE / "read_file.py", parts / "read_file.py")


def _server(machine: VirtualMachine) -> Path:
    """The llama-server that runs on the emulated processor: each was built for the one it was built on."""
    probe = (
        f"for server in {PARTS}/server*/llama-server; do "
        f"$server --model {PARTS}/samples/toy.gguf --ctx-size 64 --no-warmup --port 9999 >/dev/null 2>&1 & pid=$!; "
        "for _ in $(seq 120); do "
        "curl --silent --fail http://127.0.0.1:9999/health >/dev/null && { kill $pid; echo $server; exit; }; "
        "kill -0 $pid 2>/dev/null || break; sleep 0.5; done; kill $pid; done; exit 1"
    )
    found = machine.entered(["bash", "-c", probe], within=SLOW, check=False)
    assert found.returncode == 0, "no pinned llama-server runs on QEMU's processor"
    return Path(found.stdout.strip())


def _furnish(host: Host) -> None:
    furnish(host)
    host.run("ln", "--symbolic", f"{host.parts.llama_server}-leaky", f"/usr/local/bin/{_LEAKY}")
    host.until_api_answers(within=SLOW)
