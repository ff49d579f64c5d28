"""This host's GPUs: what a llama-server lists, joined with what the drivers say.

A llama-server names a device (``CUDA0``) and says what the driver calls it, and no address. Which GPU on the PCI bus
that is follows from the order in which CUDA and ROCm number theirs; for other back ends from the name, where only one
GPU can be meant. It is never guessed: numbers change between boots, addresses do not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from magi_agent.host.card_figures import CardFigures
from magi_agent.host.gpu_devices import Card, Vendor
from magi_agent.host.listed_devices import ListedDevice
from magi_agent.host.nvml_figures import NvidiaFigures, NvidiaGpu

_WORDS: Final = {
    Vendor.NVIDIA: ("NVIDIA", "GeForce", "Tesla", "Quadro"),
    Vendor.AMD: ("AMD", "Radeon", "RADV"),
    Vendor.INTEL: ("Intel",),
}
_INTEGRATED: Final = 1.25
"""A device that is said to have that many times its own memory has the host's too."""
_WITHOUT_MEMORY: Final = ("llvmpipe", "SwiftShader", "Orin", "Xavier", "Tegra", "GB10", "NVIDIA Thor")
"""Words in the names of GPUs in software, and of NVIDIA's that have the host's memory."""
_PROCESSORS_BUS: Final = "0000:00:"
_PART: Final = 0.75
"""A device with less than so much of its GPU's memory is a part of that GPU."""
_NO_LIST: Final = "llama-server tells only total and free memory"
_FIELDS: Final = {
    "memory_total": "memoryTotalBytes",
    "memory_free": "memoryFreeBytes",
    "temperature": "temperatureCelsius",
    "utilization": "utilizationPercent",
    "uuid": "uuid",
    "processes": "processes",
}
"""How ``nvml_figures`` calls them."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; sizes are bytes. A field that is ``None`` stands in ``unavailable`` with the reason."""

    device: str | None
    """What llama-server calls it; ``None`` for one that it does not list."""
    backend: str | None
    vendor: Vendor | None
    name: str | None
    uuid: str | None
    pci_address: str | None
    memory_total: int | None
    memory_free: int | None
    temperature: float | None
    """Degrees Celsius."""
    utilization: float | None
    """Percent."""
    processes: Mapping[int, int | None] | None
    """The bytes that each process has of it, by process id; ``None`` where its driver does not say.

    AMD's knows of processes that compute by ROCm, and of no other.
    """
    is_live: bool
    """Whether ``memory_free`` is of now; otherwise it is of when llama-server was asked for its devices."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    is_integrated: bool = False
    """Whether its memory is the host's, as of a part of the processor, or of a GPU in software."""


@dataclass(frozen=True, slots=True)
class Drivers:
    """What the drivers say."""

    cards: tuple[Card, ...] = ()
    figures: Mapping[str, CardFigures] = field(default_factory=dict)
    """Of AMD's and Intel's, by address."""
    nvidia: NvidiaFigures | None = None
    nvidia_problem: str | None = None
    """Why nothing, or not everything, is known from NVIDIA's driver."""
    cuda_order: tuple[str, ...] | None = None
    """The addresses of CUDA's numbers; ``None`` where they are not known."""
    rocm_order: tuple[str, ...] = ()


def gpus_of(listed: Sequence[ListedDevice], drivers: Drivers, not_listed: str) -> tuple[Gpu, ...]:
    """Join what is listed with what the drivers say; then the GPUs that no device is, with ``not_listed`` as reason."""
    by_address = {gpu.pci_address: gpu for gpu in drivers.nvidia.gpus} if drivers.nvidia else {}
    vendors = dict.fromkeys(by_address, Vendor.NVIDIA) | {card.address: card.vendor for card in drivers.cards}
    found = [
        _joined(device, *_address(device, listed, drivers, vendors), drivers, by_address, vendors) for device in listed
    ]
    taken = {gpu.pci_address for gpu in found}
    left = [address for address in sorted(vendors) if address not in taken]
    return (*found, *(_unlisted(address, not_listed, drivers, by_address, vendors) for address in left))


def vendor_in(description: str) -> Vendor | None:
    """Whose GPU a device is, by what its driver calls it."""
    return next((vendor for vendor, words in _WORDS.items() if any(word in description for word in words)), None)


def _address(
    device: ListedDevice, listed: Sequence[ListedDevice], drivers: Drivers, vendors: Mapping[str, Vendor]
) -> tuple[str | None, str]:
    """The address of a device, or why it is not known."""
    order = {"CUDA": drivers.cuda_order, "ROCm": drivers.rocm_order or None}.get(device.backend)
    if order is not None and device.number < len(order):
        return order[device.number], ""
    vendor = vendor_in(device.description)
    if vendor is None:
        return None, "it is no GPU on the PCI bus that is known"
    peers = [each for each in listed if each.backend == device.backend and vendor_in(each.description) is vendor]
    addresses = [address for address, its_vendor in vendors.items() if its_vendor is vendor]
    if len(peers) == len(addresses) == 1:
        return addresses[0], ""
    # NVIDIA's driver has one name for a GPU, whoever asks; AMD's and Intel's have not.
    named = [gpu.pci_address for gpu in drivers.nvidia.gpus if gpu.name == device.description] if drivers.nvidia else []
    if len(named) == Counter(each.description for each in peers)[device.description] == 1:
        return named[0], ""
    if not addresses:
        return None, f"the PCI bus shows no GPU of {vendor}"
    return None, f"llama-server does not say which of {len(addresses)} GPUs of {vendor} it is"


def _joined(
    device: ListedDevice,
    address: str | None,
    no_address: str,
    drivers: Drivers,
    nvidia: Mapping[str, NvidiaGpu],
    vendors: Mapping[str, Vendor],
) -> Gpu:
    told = _told(address, drivers, nvidia, vendors, device.memory_total) if address else _Told(reasons={})
    reasons = dict(told.reasons)
    if not address:
        reasons["pci_address"] = no_address
        reasons |= dict.fromkeys(("uuid", "temperature", "utilization", "processes"), f"{_NO_LIST}, and {no_address}")
    total, free, is_live = told.memory_total, told.memory_free, told.memory_free is not None
    if device.memory_total is not None and (total is None or device.memory_total < _PART * total):
        # The driver does not tell, or this is a part of a GPU (MIG, a virtual one), and it tells of the whole.
        total, free, is_live = device.memory_total, device.memory_free, False
    elif free is None:
        free = device.memory_free
    for name, value in (("memory_total", total), ("memory_free", free)):
        if value is None:
            reasons.setdefault(name, "llama-server tells none")
        else:
            reasons.pop(name, None)
    vendor = vendors.get(address or "") or vendor_in(device.description)
    if vendor is None:
        reasons["vendor"] = "its name names none that is known"
    return Gpu(
        device=device.name,
        backend=device.backend,
        vendor=vendor,
        name=told.name or device.description,
        uuid=told.uuid,
        pci_address=address,
        memory_total=total,
        memory_free=free,
        temperature=told.temperature,
        utilization=told.utilization,
        processes=told.processes,
        is_live=is_live,
        unavailable=reasons,
        is_integrated=told.is_integrated or _is_integrated(device.description, vendor, address),
    )


def _unlisted(
    address: str, reason: str, drivers: Drivers, nvidia: Mapping[str, NvidiaGpu], vendors: Mapping[str, Vendor]
) -> Gpu:
    told = _told(address, drivers, nvidia, vendors, None)
    reasons = {"device": reason, "backend": reason, **told.reasons}
    if told.name is None:
        reasons["name"] = "the driver does not tell it"
    return Gpu(
        device=None,
        backend=None,
        vendor=vendors.get(address),
        name=told.name,
        uuid=told.uuid,
        pci_address=address,
        memory_total=told.memory_total,
        memory_free=told.memory_free,
        temperature=told.temperature,
        utilization=told.utilization,
        processes=told.processes,
        is_live=told.memory_free is not None,
        unavailable=reasons,
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What the driver of one GPU says."""

    reasons: Mapping[str, str]
    name: str | None = None
    uuid: str | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    temperature: float | None = None
    utilization: float | None = None
    processes: Mapping[int, int | None] | None = None
    is_integrated: bool = False


def _told(
    address: str,
    drivers: Drivers,
    nvidia: Mapping[str, NvidiaGpu],
    vendors: Mapping[str, Vendor],
    listed_total: int | None,
) -> _Told:
    if (gpu := nvidia.get(address)) is not None:
        return _of_nvml(gpu)
    if vendors.get(address) is Vendor.NVIDIA:
        return _Told(dict.fromkeys(_FIELDS, drivers.nvidia_problem or "NVIDIA's driver does not know it"))
    if address not in drivers.figures:
        return _Told(dict.fromkeys(_FIELDS, "its driver has not answered"))
    return _of_sysfs(drivers.figures[address], listed_total)


def _of_nvml(gpu: NvidiaGpu) -> _Told:
    figures: dict[str, object] = {
        "memory_total": gpu.memory_total_bytes,
        "memory_free": gpu.memory_free_bytes,
        "temperature": gpu.temperature_celsius,
        "utilization": gpu.utilization_percent,
        "uuid": gpu.uuid,
        "processes": gpu.processes,
    }
    reasons = {
        name: f"NVIDIA's driver: {gpu.reasons.get(_FIELDS[name], 'it tells none')}"
        for name, value in figures.items()
        if value is None
    }
    return _Told(
        reasons,
        gpu.name,
        gpu.uuid,
        gpu.memory_total_bytes,
        gpu.memory_free_bytes,
        gpu.temperature_celsius,
        gpu.utilization_percent,
        gpu.processes,
    )


def _of_sysfs(card: CardFigures, listed_total: int | None) -> _Told:
    total, free = card.vram_total, card.vram_free
    is_integrated = False
    if (
        total is not None
        and free is not None
        and listed_total is not None
        and listed_total > _INTEGRATED * total
        and card.shared_free is not None
    ):
        # Of an integrated one its own memory is the smaller part of what llama-server uses.
        total, free = listed_total, min(listed_total, free + card.shared_free)
        is_integrated = True
    return _Told(
        *(card.reasons, card.name, card.uuid, total, free, card.temperature, card.utilization, card.processes),
        is_integrated,
    )


def _is_integrated(description: str, vendor: Vendor | None, address: str | None) -> bool:
    """Whether a device has the host's memory, by what is known of it but sizes."""
    # Intel's own GPUs are on the processor's bus, its cards behind a bridge.
    on_processor = vendor is Vendor.INTEL and (address or "").startswith(_PROCESSORS_BUS)
    return on_processor or any(word in description for word in _WITHOUT_MEMORY)
