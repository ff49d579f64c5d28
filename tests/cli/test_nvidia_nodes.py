"""magi-nvidia-nodes in made-up trees, with a program that stands in for nvidia-modprobe: there is no such GPU here."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import locations
import pytest

from magi_agent.cli import nvidia_nodes
from magi_agent.cli.nvidia_nodes import make_missing

MODPROBE = r"""#!/bin/sh
# As nvidia-modprobe reads its options: beside -u, the number of -c is not a GPU's, and without -c it makes no node.
echo "$*" >>{log}
[ "$*" != "{fails}" ] || {{ echo "NVIDIA: cannot"; exit 1; }}
case $* in
    "-u -c 0") touch {dev}/nvidia-uvm {dev}/nvidia-uvm-tools ;;
    "-c 255") touch {dev}/nvidiactl ;;
    "-c "*) touch {dev}/nvidia$2 ;;
esac
"""
ALL = ["nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"]


class Machine:
    """A driver with four GPUs, an empty /dev, and something that makes nodes."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.dev = folder / "proc", folder / "dev"
        self.modprobe, self.log = folder / "nvidia-modprobe", folder / "log"
        driver = self.proc / "driver" / "nvidia"
        for minor in range(4):
            (driver / "gpus" / f"0000:{minor}1:00.0").mkdir(parents=True)
            (driver / "gpus" / f"0000:{minor}1:00.0" / "information").write_text(f"Device Minor: \t {minor}\n")
        (driver / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01\n")
        self.params = driver / "params"
        self.params.write_text("ModifyDeviceFiles: 1\n")
        self.dev.mkdir()
        self.provide()

    def provide(self, fails: str = "nothing") -> None:
        self.modprobe.write_text(MODPROBE.format(dev=self.dev, log=self.log, fails=fails))
        self.modprobe.chmod(0o755)

    def make(self) -> int:
        return make_missing(str(self.proc), str(self.dev), str(self.modprobe))

    def nodes(self) -> list[str]:
        return sorted(path.name for path in self.dev.iterdir())

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_that_is_missing_is_made_and_said(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.make() == 0

    assert machine.nodes() == ALL
    assert machine.calls() == ["-c 255", "-c 0", "-c 1", "-c 2", "-c 3", "-u -c 0"]
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == [f"made {machine.dev}/{name}" for name in ALL]
    assert err == ""


def test_a_gpu_that_lacks_its_node_gets_it_though_others_made_the_rest(machine: Machine) -> None:
    for name in ALL:
        if name != "nvidia2":
            (machine.dev / name).touch()

    assert machine.make() == 0

    assert machine.calls() == ["-c 2"]
    assert machine.nodes() == ALL


def test_where_all_are_there_nothing_is_run_and_nothing_said(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ALL:
        (machine.dev / name).touch()
    machine.modprobe.unlink()

    assert machine.make() == 0
    assert capsys.readouterr() == ("", "")


def test_what_cannot_be_made_is_said_and_keeps_nothing_else_back(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.provide(fails="-c 1")

    assert machine.make() == 1

    assert machine.nodes() == [name for name in ALL if name != "nvidia1"]
    said = f"{machine.modprobe} -c 1 made no {machine.dev}/nvidia1: exit status 1, NVIDIA: cannot\n"
    assert capsys.readouterr().err == f"magi-nvidia-nodes: {said}"


def test_a_program_that_says_it_did_and_did_not_is_not_believed(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.modprobe.write_text("#!/bin/sh\nexit 0\n")

    assert machine.make() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "made no" in err
    assert "exit status 0 and no word" in err


def test_without_nvidia_modprobe_it_says_how_to_get_it(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    (machine.dev / "nvidia0").touch()
    machine.modprobe.unlink()

    assert machine.make() == 69
    said = capsys.readouterr().err
    assert said.endswith(": sudo apt install nvidia-modprobe\n")
    assert f"{machine.dev}/nvidia1" in said
    assert f"{machine.dev}/nvidia0" not in said


def test_a_program_that_cannot_be_run_is_named(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.modprobe.write_text("#!/no/such/interpreter\n")

    assert machine.make() == 1
    assert f"{machine.modprobe} cannot be run: No such file or directory" in capsys.readouterr().err


def test_a_driver_that_forbids_nodes_is_named(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.params.write_text("ModifyDeviceFiles: 0\n")

    assert machine.make() == 1
    assert machine.calls() == []
    assert "ModifyDeviceFiles is 0" in capsys.readouterr().err


def test_one_that_hangs_is_given_up(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.modprobe.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(nvidia_nodes, "_SECONDS", 0.2)

    before = time.monotonic()
    assert machine.make() == 1
    assert time.monotonic() - before < 5
    assert "was given up" in capsys.readouterr().err


def run_by_itself(code: str) -> list[str]:
    """What a Python prints that has nothing but its own library and this package, as the installed program has."""
    start = f"import sys; sys.path.insert(0, {str(locations.CHECKOUT)!r}); "
    command = [sys.executable, "-IS", "-c", start + code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()


def test_hardly_anything_is_imported_as_it_runs_before_every_start() -> None:
    before = run_by_itself("import os; print(*sys.modules)")
    code = "from magi_agent.cli.nvidia_nodes import make_missing; make_missing('/proc', '/dev', '/x'); "
    after = run_by_itself(code + "print(*sys.modules)")

    assert {name for name in set(after) - set(before) if not name.startswith("magi_agent")} == set()
    assert {name for name in after if name.startswith("magi_agent")} == {
        "magi_agent",
        "magi_agent.cli",
        "magi_agent.cli.nvidia_nodes",
        "magi_agent.host",
        "magi_agent.host.nvidia_nodes",
    }


def test_it_takes_no_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["magi-nvidia-nodes", "--help"])
    assert nvidia_nodes.main() == 64
    assert "magi-nvidia-uvm.service" in capsys.readouterr().err
