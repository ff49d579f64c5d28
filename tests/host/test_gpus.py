"""Devices that llama-server lists joined with what drivers say, on made-up hosts: such GPUs are not here."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from magi_agent.host.card_figures import CardFigures, card_figures, rocm_order
from magi_agent.host.gpu_devices import Card, Tree, Vendor, cards
from magi_agent.host.gpus import Drivers, Gpu, gpus_of
from magi_agent.host.listed_devices import ListedDevice, listed_devices
from magi_agent.host.nvml_figures import NvidiaFigures, NvidiaGpu

MIB = 1024 * 1024
NOT_LISTED = "llama-server lists no such device"


def listed(*lines: str) -> tuple[ListedDevice, ...]:
    found = listed_devices("\n  ".join(("Available devices:", *lines)))
    assert found is not None
    assert len(found) == len(lines)
    return found


def nvidia(address: str, name: str = "NVIDIA GeForce RTX 3090", **changes: object) -> NvidiaGpu:
    figures = {
        "pciAddress": address, "uuid": f"GPU-{address}", "name": name, "memoryTotalBytes": 24576 * MIB,
        "memoryFreeBytes": 20000 * MIB, "temperatureCelsius": 40, "utilizationPercent": 0, "processes": {},
    }  # fmt: skip
    return NvidiaGpu.model_validate(figures | changes)


def drivers(*gpus: NvidiaGpu, order: tuple[str, ...] | None = None, problem: str | None = None) -> Drivers:
    found = tuple(Card(Vendor.NVIDIA, gpu.pci_address, Path("/nowhere"), "nvidia") for gpu in gpus)
    return Drivers(cards=found, nvidia=NvidiaFigures(gpus=list(gpus), problem=problem), cuda_order=order)


def addresses(found: tuple[Gpu, ...]) -> dict[str | None, str | None]:
    return {gpu.device: gpu.pci_address for gpu in found}


def complete(found: tuple[Gpu, ...]) -> None:
    """Each figure is there, or says why it is not."""
    for gpu in found:
        told_later = {"is_live", "unavailable"}
        names = {field.name for field in fields(gpu)} - told_later
        missing = {name for name in names if getattr(gpu, name) is None}
        assert missing == set(gpu.unavailable), gpu
        assert all(gpu.unavailable.values())
        assert gpu.memory_total != 0


@pytest.mark.parametrize(
    ("line", "is_integrated"),
    [
        ("Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)", True),
        ("CUDA0: NVIDIA GB10 (122880 MiB, 100000 MiB free)", True),
        ("CUDA0: Orin (30697 MiB, 20000 MiB free)", True),
        ("CUDA0: NVIDIA GeForce RTX 3090 (24135 MiB, 100 MiB free)", False),
        ("SYCL0: Intel(R) Arc(TM) A770 Graphics (16225 MiB, 16225 MiB free)", False),
    ],
)
def test_what_has_no_memory_of_its_own_is_told_by_its_name(line: str, is_integrated: bool) -> None:
    [found] = gpus_of(listed(line), Drivers(), NOT_LISTED)
    assert found.is_integrated is is_integrated


@pytest.mark.parametrize(("address", "is_integrated"), [("0000:00:02.0", True), ("0000:03:00.0", False)])
def test_intels_on_the_processors_bus_have_the_hosts_memory(address: str, is_integrated: bool) -> None:
    cards = (Card(Vendor.INTEL, address, Path("/nowhere"), "xe"),)
    [found] = gpus_of(listed("Vulkan0: Intel(R) Graphics (9000 MiB, 8000 MiB free)"), Drivers(cards=cards), NOT_LISTED)
    assert found.is_integrated is is_integrated


def test_one_that_a_virtual_machine_is_given_has_its_own_memory() -> None:
    gpu = nvidia("0000:00:05.0")
    [found] = gpus_of(listed("CUDA0: NVIDIA GeForce RTX 3090 (24135 MiB, 100 MiB free)"), drivers(gpu), NOT_LISTED)
    assert (found.pci_address, found.is_integrated) == ("0000:00:05.0", False)


def test_cudas_own_order_says_which_gpu_is_which() -> None:
    first, second = nvidia("0000:01:00.0"), nvidia("0000:41:00.0", memoryFreeBytes=0, processes={7: 5})
    found = gpus_of(
        listed(
            "CUDA0: NVIDIA GeForce RTX 3090 (24135 MiB, 100 MiB free)",
            "CUDA1: NVIDIA GeForce RTX 3090 (24135 MiB, 100 MiB free)",
        ),
        drivers(first, second, order=("0000:41:00.0", "0000:01:00.0")),
        NOT_LISTED,
    )

    assert addresses(found) == {"CUDA0": "0000:41:00.0", "CUDA1": "0000:01:00.0"}
    busy, idle = found
    assert (busy.memory_total, busy.memory_free, busy.processes, busy.is_live) == (24576 * MIB, 0, {7: 5}, True)
    assert (idle.memory_free, idle.utilization, idle.uuid) == (20000 * MIB, 0, "GPU-0000:01:00.0")
    complete(found)


def test_without_that_order_equal_gpus_are_not_told_apart_and_different_ones_are() -> None:
    gpus = nvidia("0000:01:00.0"), nvidia("0000:41:00.0"), nvidia("0000:81:00.0", "NVIDIA RTX A6000")
    found = gpus_of(
        listed(
            "CUDA0: NVIDIA RTX A6000 (48541 MiB, 48000 MiB free)",
            "CUDA1: NVIDIA GeForce RTX 3090 (24135 MiB, 23000 MiB free)",
            "CUDA2: NVIDIA GeForce RTX 3090 (24135 MiB, 22000 MiB free)",
        ),
        drivers(*gpus),
        NOT_LISTED,
    )

    assert [gpu.pci_address for gpu in found] == ["0000:81:00.0", None, None, "0000:01:00.0", "0000:41:00.0"]
    assert found[1].unavailable["pci_address"] == "llama-server does not say which of 3 GPUs of NVIDIA it is"
    # What llama-server itself said is left, and is not of now.
    assert (found[1].memory_free, found[1].is_live) == (23000 * MIB, False)
    assert found[3].unavailable["device"] == NOT_LISTED
    complete(found)


def test_the_only_gpu_of_a_vendor_is_the_one_whatever_it_is_called() -> None:
    amd = Card(Vendor.AMD, "0000:0b:00.0", Path("/nowhere"), "amdgpu")
    both = Drivers(
        cards=(*drivers(nvidia("0000:01:00.0")).cards, amd),
        nvidia=NvidiaFigures(gpus=[nvidia("0000:01:00.0")], problem=None),
        figures={
            amd.address: CardFigures(
                vram_total=24560 * MIB, vram_free=1000 * MIB, temperature=51.5, processes={3: None}
            )
        },
    )
    found = gpus_of(
        listed(
            "Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24000 MiB free)",
            "Vulkan1: NVIDIA GeForce RTX 3090 (24576 MiB, 24000 MiB free)",
            "Vulkan2: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)",
        ),
        both,
        NOT_LISTED,
    )

    assert addresses(found) == {"Vulkan0": "0000:0b:00.0", "Vulkan1": "0000:01:00.0", "Vulkan2": None}
    assert (found[0].memory_free, found[0].temperature, found[0].processes) == (1000 * MIB, 51.5, {3: None})
    assert found[2].unavailable["pci_address"] == "it is no GPU on the PCI bus that is known"
    assert (found[2].memory_total, found[2].memory_free, found[2].is_live) == (2048 * MIB, 2048 * MIB, False)


def test_a_driver_that_does_not_answer_is_a_reason_and_no_figure() -> None:
    card = Card(Vendor.NVIDIA, "0000:01:00.0", Path("/nowhere"), "nvidia")
    silent = Drivers(cards=(card,), nvidia_problem="NVIDIA's driver has not answered within 10 s")
    [gpu] = gpus_of((), silent, NOT_LISTED)

    assert (gpu.device, gpu.pci_address, gpu.memory_total, gpu.memory_free) == (None, card.address, None, None)
    assert gpu.unavailable["memory_free"] == "NVIDIA's driver has not answered within 10 s"
    complete((gpu,))


def test_one_figure_that_the_driver_does_not_have_says_so() -> None:
    gpu = nvidia("0000:01:00.0", memoryTotalBytes=None, temperatureCelsius=None,
                 reasons={"temperatureCelsius": "Not Supported"})  # fmt: skip
    [found] = gpus_of(listed("CUDA0: NVIDIA GeForce RTX 3090 (24135 MiB, 100 MiB free)"), drivers(gpu), NOT_LISTED)

    assert found.unavailable == {"temperature": "NVIDIA's driver: Not Supported"}
    # Of its memory llama-server knows.
    assert found.memory_total == 24135 * MIB
    complete((found,))


def test_a_part_of_a_gpu_has_its_own_memory_and_not_the_wholes() -> None:
    gpu = nvidia("0000:01:00.0", "NVIDIA A100-SXM4-40GB", memoryTotalBytes=40960 * MIB)
    part = listed("CUDA0: NVIDIA A100-SXM4-40GB MIG 1g.5gb (4864 MiB, 4800 MiB free)")
    [found] = gpus_of(part, drivers(gpu, order=("0000:01:00.0",)), NOT_LISTED)

    assert (found.memory_total, found.memory_free, found.is_live) == (4864 * MIB, 4800 * MIB, False)
    assert found.pci_address == "0000:01:00.0"


class Sysfs:
    """A tree as amdgpu and its driver for computing fill it."""

    def __init__(self, folder: Path) -> None:
        self.tree = Tree(folder / "proc", folder / "sys", folder / "dev")

    def card(self, address: str, vendor: str = "0x1002", driver: str = "amdgpu", **files: object) -> None:
        folder = self.tree.sys / "bus" / "pci" / "devices" / address
        folder.mkdir(parents=True)
        (folder / "driver").symlink_to(f"../../../drivers/{driver}")
        for name, text in {"vendor": vendor, "class": "0x030000", **files}.items():
            (folder / name).write_text(f"{text}\n")

    def sensor(self, address: str, thousandths: int, number: int = 1) -> None:
        folder = self.tree.sys / "bus" / "pci" / "devices" / address / "hwmon" / "hwmon3"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"temp{number}_input").write_text(f"{thousandths}\n")
        (folder / f"temp{number}_crit").write_text("100000\n")

    def node(self, number: int, gpu_id: int, location: int = 0) -> None:
        folder = self.tree.sys / "class" / "kfd" / "kfd" / "topology" / "nodes" / str(number)
        folder.mkdir(parents=True)
        (folder / "gpu_id").write_text(f"{gpu_id}\n")
        (folder / "properties").write_text(f"simd_count 192\nlocation_id {location}\ndomain 0\n")

    def process(self, pid: int, gpu_id: int, bytes_of: object) -> None:
        folder = self.tree.sys / "class" / "kfd" / "kfd" / "proc" / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"vram_{gpu_id}").write_text(f"{bytes_of}\n")

    def figures(self) -> list[CardFigures]:
        return [card_figures(card, self.tree.sys) for card in cards(self.tree)]


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_amds_driver_tells_memory_load_warmth_and_processes(sysfs: Sysfs) -> None:
    sysfs.card("0000:0b:00.0", mem_info_vram_total=24560 * MIB, mem_info_vram_used=560 * MIB, gpu_busy_percent=0,
               unique_id="3dd5d0a1c4e2f101")  # fmt: skip
    sysfs.sensor("0000:0b:00.0", 51_500)
    sysfs.node(0, 0)
    sysfs.node(1, 51110, 0x0B00)
    sysfs.process(4711, 51110, 1 << 30)
    sysfs.process(4712, 51110, 0)
    sysfs.process(4713, 51110, "odd")
    sysfs.process(4714, 51110, -1)
    sysfs.process(4715, 777, 1 << 30)

    [found] = sysfs.figures()
    assert (found.vram_total, found.vram_free) == (24560 * MIB, 24000 * MIB)
    assert (found.utilization, found.temperature, found.uuid) == (0, 51.5, "GPU-3dd5d0a1c4e2f101")
    assert found.processes == {4711: 1 << 30, 4713: None, 4714: None}
    assert found.reasons == {}


def test_rocm_numbers_gpus_by_their_nodes(sysfs: Sysfs) -> None:
    sysfs.node(0, 0)
    for number, location in ((10, 0x0300), (2, 0xC100), (1, 0x4108)):
        sysfs.node(number, number, location)

    order = rocm_order(sysfs.tree.sys)
    found_cards = tuple(Card(Vendor.AMD, address, Path("/nowhere"), "amdgpu") for address in order)
    assert order == ("0000:41:01.0", "0000:c1:00.0", "0000:03:00.0")
    found = gpus_of(
        listed("ROCm1: AMD Instinct MI100 (32752 MiB, 32000 MiB free)"),
        Drivers(cards=found_cards, rocm_order=order),
        NOT_LISTED,
    )
    assert found[0].pci_address == "0000:c1:00.0"


def test_an_integrated_gpu_has_the_hosts_memory_too(sysfs: Sysfs) -> None:
    sysfs.card("0000:c4:00.0", mem_info_vram_total=512 * MIB, mem_info_vram_used=12 * MIB,
               mem_info_gtt_total=16000 * MIB, mem_info_gtt_used=1000 * MIB)  # fmt: skip
    [card], [figures] = cards(sysfs.tree), sysfs.figures()
    [found] = gpus_of(
        listed("Vulkan0: AMD Radeon 780M (RADV PHOENIX) (16512 MiB, 16000 MiB free)"),
        Drivers(cards=(card,), figures={card.address: figures}),
        NOT_LISTED,
    )

    assert (found.memory_total, found.memory_free) == (16512 * MIB, 15500 * MIB)
    assert found.is_live


@pytest.mark.parametrize("text", ["", "-1", "x", "9" * 30, "101", "\x00"])
def test_odd_files_are_no_figures(sysfs: Sysfs, text: str) -> None:
    sysfs.card("0000:0b:00.0", mem_info_vram_total=text, mem_info_vram_used=text, gpu_busy_percent=text, unique_id="")

    [found] = sysfs.figures()
    assert (found.utilization, found.temperature, found.uuid, found.processes) == (None, None, None, None)
    assert set(found.reasons) >= {"utilization", "temperature", "uuid", "processes"}


def test_intels_driver_shows_little_and_says_so(sysfs: Sysfs) -> None:
    sysfs.card("0000:03:00.0", vendor="0x8086", driver="xe")
    sysfs.sensor("0000:03:00.0", 61_000, number=3)
    sysfs.sensor("0000:03:00.0", 44_000, number=2)

    [found] = sysfs.figures()
    assert found.temperature == 44.0
    assert found.reasons["memory_free"] == "the kernel's driver xe shows none in sysfs"
