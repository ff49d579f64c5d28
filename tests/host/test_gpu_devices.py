"""GPUs as the kernel shows them, in made-up trees of hardware that is not here; the files are as on real hosts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from magi_agent.cli.doctor_findings import Result
from magi_agent.cli.doctor_host import gpu_findings
from magi_agent.host.accounts import Account
from magi_agent.host.gpu_devices import (
    Gpus,
    Tree,
    Vendor,
    gpus,
    is_any_driver_up,
    nvidia_driver_version,
    version_in_name,
)

SERVERS = Account("user magi-llama", 61202, frozenset({61202}))
VERSION_OF_535 = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
VERSION_OF_OPEN_570 = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U22-I3)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


class Hardware:
    """A tree that is filled as the kernel would."""

    def __init__(self, folder: Path) -> None:
        self.tree = Tree(folder / "proc", folder / "sys", folder / "dev")
        for part in (self.tree.proc, self.tree.sys, self.tree.dev):
            part.mkdir()
            part.chmod(0o755)

    def card(self, slot: str, vendor: str, driver: str | None, kind: str = "0x030000", node: str | None = None) -> None:
        device = self.tree.sys / "bus" / "pci" / "devices" / slot
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        if driver:
            (device / "driver").symlink_to(f"../../../drivers/{driver}")
        if node:
            (device / "drm" / node).mkdir(parents=True)

    def node(self, name: str, mode: int = 0o666, group: int = 0) -> Path:
        path = self.tree.dev / name
        path.parent.mkdir(exist_ok=True)
        path.parent.chmod(0o755)
        path.touch()
        path.chmod(mode)
        os.chown(path, 0, group)
        return path

    def nvidia(self, version: str = VERSION_OF_535) -> None:
        self.card("0000:01:00.0", "0x10de", "nvidia", "0x030200")
        path = self.tree.proc / "driver" / "nvidia"
        path.mkdir(parents=True)
        (path / "version").write_text(version)

    def findings(
        self, account: Account | None = SERVERS, cuda: str | None = None
    ) -> list[tuple[Result, str, str | None]]:
        library = Path(f"/usr/lib/x86_64-linux-gnu/libcuda.so.{cuda}") if cuda else None
        return [
            (finding.result, finding.found, finding.mend)
            for each in gpus(self.tree)
            for finding in gpu_findings(each, account, self.tree, library)
        ]


@pytest.fixture
def hardware() -> Iterator[Hardware]:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    # One that everybody can reach, which pytest's own are not.
    with tempfile.TemporaryDirectory(prefix="magi-hardware-") as folder:
        Path(folder).chmod(0o755)
        yield Hardware(Path(folder))


def test_nothing_but_a_server_s_own_graphics_is_no_gpu(hardware: Hardware) -> None:
    hardware.card("0000:02:00.0", "0x1a03", "ast")
    hardware.card("0000:03:00.0", "0x10de", "snd_hda_intel", "0x040300")

    assert gpus(hardware.tree) == ()


@pytest.mark.parametrize(("text", "version"), [(VERSION_OF_535, "535.183.01"), (VERSION_OF_OPEN_570, "570.86.15")])
def test_the_driver_says_its_version(hardware: Hardware, text: str, version: str) -> None:
    hardware.nvidia(text)

    assert nvidia_driver_version(hardware.tree) == version


def test_libraries_have_theirs_in_their_names() -> None:
    assert version_in_name(Path("/usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.535.183.01")) == "535.183.01"
    assert version_in_name(Path("/usr/lib/libcuda.so.570.86")) == "570.86"
    assert version_in_name(Path("/usr/lib/libcuda.so.1")) is None


def test_a_whole_nvidia_gpu_is_well(hardware: Hardware) -> None:
    hardware.nvidia()
    nodes = [hardware.node(name) for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1")]
    hardware.node("nvidia-modeset")

    [found] = gpus(hardware.tree)
    assert found == Gpus(Vendor.NVIDIA, 1, "nvidia", tuple(nodes), ())
    [(result, said, mend)] = hardware.findings(cuda="535.183.01")
    assert (result, mend) == (Result.OK, None)
    assert said.startswith("1 GPU of NVIDIA, driver nvidia 535.183.01; user magi-llama may use /")


def test_a_library_of_another_version_than_the_driver_is_wrong(hardware: Hardware) -> None:
    hardware.nvidia()
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0"):
        hardware.node(name)

    [(result, said, mend)] = hardware.findings(cuda="535.216.01")
    assert (result, mend) == (Result.FAILED, "sudo reboot")
    assert "driver 535.183.01, and its libraries are 535.216.01" in said
    [(result, said, mend)] = hardware.findings(cuda=None)
    assert (result, mend) == (Result.WARNING, "sudo apt install libcuda1")


def test_nodes_that_are_not_there_are_named_with_what_makes_them(hardware: Hardware) -> None:
    hardware.nvidia()
    hardware.node("nvidiactl")

    told = hardware.findings(cuda="535.183.01")

    assert [(result, mend) for result, _, mend in told] == [
        (Result.WARNING, "sudo systemctl start magi-nvidia-uvm.service")
    ] * 3
    assert f"{hardware.tree.dev}/nvidia-uvm, without which CUDA does not find any GPU" in told[0][1]
    assert f"{hardware.tree.dev}/nvidia0, without which CUDA does not find that GPU" in told[2][1]


def test_each_of_several_gpus_needs_a_node_of_its_own(hardware: Hardware) -> None:
    hardware.nvidia()
    for slot, minor in (("0000:01:00.0", 1), ("0000:41:00.0", 0)):
        folder = hardware.tree.proc / "driver" / "nvidia" / "gpus" / slot
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t NVIDIA L40S\nDevice Minor: \t {minor}\n")
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0"):
        hardware.node(name)

    [found] = gpus(hardware.tree)
    assert found.missing == (hardware.tree.dev / "nvidia1",)


def test_a_card_without_a_driver_is_told(hardware: Hardware) -> None:
    hardware.card("0000:01:00.0", "0x10de", None, "0x030200")
    hardware.card("0000:02:00.0", "0x10de", None, "0x030200")

    [(result, said, mend)] = hardware.findings()
    assert (result, said) == (Result.WARNING, "2 GPUs of NVIDIA, and no driver: models run on the CPU")
    assert mend is not None
    assert "nvidia-driver" in mend


def test_nouveau_does_not_compute(hardware: Hardware) -> None:
    hardware.card("0000:01:00.0", "0x10de", "nouveau")

    [(result, said, _)] = hardware.findings()
    assert result is Result.WARNING
    assert "the driver nouveau, which cannot compute" in said


def test_amds_nodes_are_for_a_group_and_the_command_puts_the_user_into_it(hardware: Hardware) -> None:
    hardware.card("0000:03:00.0", "0x1002", "amdgpu", node="renderD129")
    hardware.node("dri/renderD129", 0o660, 44)
    hardware.node("kfd", 0o660, 44)

    told = hardware.findings()

    assert [(result, mend) for result, _, mend in told] == [(Result.FAILED, "sudo usermod -aG video magi-llama")] * 2
    assert "(video, mode 0660) does not let user magi-llama use it" in told[0][1]
    member = Account(SERVERS.name, SERVERS.uid, frozenset({*SERVERS.gids, 44}))
    assert [result for result, _, _ in hardware.findings(member)] == [Result.OK]


def test_without_kfd_there_is_vulkan(hardware: Hardware) -> None:
    hardware.card("0000:03:00.0", "0x1002", "amdgpu", node="renderD128")
    hardware.node("dri/renderD128")

    [(result, said, _)] = hardware.findings()
    assert result is Result.WARNING
    assert "ROCm finds no GPU, Vulkan does" in said


def test_intels_graphics_that_nobody_may_use_fail_nobody(hardware: Hardware) -> None:
    hardware.card("0000:00:02.0", "0x8086", "i915", node="renderD128")
    hardware.node("dri/renderD128", 0o660, 44)

    [(result, _, mend)] = hardware.findings()
    assert (result, mend) == (Result.WARNING, "sudo usermod -aG video magi-llama")


def test_a_dynamic_user_cannot_be_put_into_a_group(hardware: Hardware) -> None:
    hardware.card("0000:03:00.0", "0x1002", "amdgpu", node="renderD128")
    hardware.node("dri/renderD128", 0o660, 44)
    hardware.node("kfd")

    [(result, _, mend)] = hardware.findings(Account("a dynamic user", None, frozenset()))
    assert result is Result.FAILED
    assert mend is not None
    assert "llama_server_user" in mend


def test_whom_the_servers_run_as_may_not_be_known(hardware: Hardware) -> None:
    hardware.card("0000:03:00.0", "0x1002", "amdgpu", node="renderD128")
    hardware.node("dri/renderD128")
    hardware.node("kfd")

    [(result, _, _)] = hardware.findings(None)
    assert result is Result.UNKNOWN


@pytest.mark.parametrize(
    ("path", "is_up"),
    [
        ("class/drm/renderD128", True),
        ("class/drm/card0", False),
        ("module/nvidia", True),
        ("module/nvgpu", True),
        ("module/nouveau", False),
        ("class/kfd", True),
        ("class/misc/dxg", True),
        ("class/misc/mali0", True),
    ],
)
def test_whether_any_driver_of_a_gpu_is_up(hardware: Hardware, path: str, is_up: bool) -> None:
    assert not is_any_driver_up(hardware.tree.sys)
    (hardware.tree.sys / path).mkdir(parents=True)
    assert is_any_driver_up(hardware.tree.sys) is is_up
