"""Which device nodes NVIDIA's GPUs need, in made-up trees; the files are as on real hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from magi_agent.host.nvidia_nodes import gpu_minors, is_loaded, may_make, nvidia_nodes

INFORMATION = """\
Model: \t\t NVIDIA H100 80GB HBM3
IRQ:   \t\t 187
GPU UUID: \t GPU-6d9f5f32-0c3e-6b1c-3c2e-8a4f0f9f2d11
Video BIOS: \t 96.00.99.00.01
Bus Type: \t PCIe
DMA Size: \t 52 bits
DMA Mask: \t 0xfffffffffffff
Bus Location: \t 0000:{slot}:00.0
Device Minor: \t {minor}
GPU Firmware: \t 570.86.15
GPU Excluded:\t No
"""


class Driver:
    """NVIDIA's part of /proc, filled as the driver would."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.dev = folder / "dev"
        self.folder = self.proc / "driver" / "nvidia"
        self.dev.mkdir(parents=True)

    def load(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01\n")
        (self.folder / "params").write_text("ResmanDebugLevel: 4294967295\nModifyDeviceFiles: 1\nDeviceFileMode: 438\n")

    def gpu(self, slot: str, minor: str) -> None:
        path = self.folder / "gpus" / f"0000:{slot}:00.0"
        path.mkdir(parents=True)
        (path / "information").write_text(INFORMATION.format(slot=slot, minor=minor))


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def test_without_a_driver_nothing_is_needed(driver: Driver) -> None:
    assert not is_loaded(str(driver.proc))
    assert nvidia_nodes(str(driver.proc), str(driver.dev)) == {}
    assert gpu_minors(str(driver.proc)) == []


def test_every_gpu_has_a_node_by_its_number_and_not_by_its_place(driver: Driver) -> None:
    driver.load()
    for slot, minor in (("18", "1"), ("2a", "0"), ("3b", "10"), ("ab", "2")):
        driver.gpu(slot, minor)

    assert gpu_minors(str(driver.proc)) == [0, 1, 2, 10]
    dev = driver.dev
    assert nvidia_nodes(str(driver.proc), str(dev)) == {
        f"{dev}/nvidiactl": ("-c", "255"),
        f"{dev}/nvidia0": ("-c", "0"),
        f"{dev}/nvidia1": ("-c", "1"),
        f"{dev}/nvidia2": ("-c", "2"),
        f"{dev}/nvidia10": ("-c", "10"),
        f"{dev}/nvidia-uvm": ("-u", "-c", "0"),
        f"{dev}/nvidia-uvm-tools": ("-u", "-c", "0"),
    }


@pytest.mark.parametrize("minor", ["", "x", "-1", "255", "1; reboot", "N/A"])
def test_what_is_no_number_of_a_gpu_is_passed_over(driver: Driver, minor: str) -> None:
    driver.load()
    driver.gpu("18", minor)
    driver.gpu("2a", "3")
    (driver.folder / "gpus" / "0000:ff:00.0").mkdir()

    assert gpu_minors(str(driver.proc)) == [3]


def test_a_driver_that_forbids_nodes_is_believed(driver: Driver) -> None:
    driver.load()
    assert may_make(str(driver.proc))
    (driver.folder / "params").write_text("ModifyDeviceFiles: 0\nDeviceFileMode: 438\n")
    assert not may_make(str(driver.proc))
