"""What goes over the wire of the host: processors, memory, GPUs, disks.

A figure that cannot be had is null, and ``unavailable`` beside it says why, by the key of the figure.
"""

from datetime import datetime

from pydantic import Field

from magi_agent.api.schemas import Answer

_WHY = "for each figure that is null, why"


class ProcessorsAnswer(Answer):
    """What computes beside GPUs."""

    model: str | None
    cores: int | None
    threads: int | None
    load: list[float] | None = Field(description="processes that run or wait to, averaged over 1, 5 and 15 minutes")
    unavailable: dict[str, str] = Field(description=_WHY)


class PressureAnswer(Answer):
    """How much of the time processes waited for memory, in percent, over 10, 60 and 300 seconds."""

    some: list[float] = Field(description="some of them")
    full: list[float] = Field(description="all of them at once")


class MemoryLimitAnswer(Answer):
    """A control group whose limit holds for the servers."""

    control_group: str
    unit: str
    high_bytes: int | None = Field(description="beyond it processes are slowed down; null for no such limit")
    max_bytes: int | None = Field(description="beyond it processes are killed; null for no such limit")
    used_bytes: int | None = Field(description="anonymous memory and mapped files of all in it")
    room_bytes: int = Field(description="what is left below the limit that is met first")
    is_binding: bool = Field(description="whether it leaves less than every other, and less than the host has")
    unavailable: dict[str, str] = Field(description=_WHY)


class MemoryAnswer(Answer):
    """The host's memory."""

    total_bytes: int
    available_bytes: int = Field(description="what processes may take without swapping, as the kernel estimates it")
    swap_total_bytes: int
    swap_free_bytes: int
    room_bytes: int = Field(
        description="what all servers together may still take: what is available and not mapped, or what a limit leaves"
    )
    promised_bytes: int | None = Field(
        description="of roomBytes, what servers that are starting, or run, have not taken yet and will"
    )
    reserve_bytes: int = Field(description="of roomBytes, what no server gets (servers.memory_reserve)")
    room_for_start_bytes: int | None = Field(
        description="what is left of roomBytes without both: a start that needs more is refused; 0 where it is less"
    )
    limits: list[MemoryLimitAnswer] = Field(description="from the servers' slice upwards")
    pressure: PressureAnswer | None
    unavailable: dict[str, str] = Field(description=_WHY)


class GpuAnswer(Answer):
    """One GPU as llama-server and its driver see it."""

    index: str | None = Field(description="what llama-server calls it, and --device takes: CUDA0, Vulkan1")
    backend: str | None = Field(description="CUDA, ROCm, Vulkan, …")
    vendor: str | None
    name: str | None
    uuid: str | None
    pci_address: str | None = Field(description="stays the same from boot to boot, which the index does not")
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    memory_free_is_live: bool = Field(description="whether it is of now; else of when llama-server was asked")
    temperature_celsius: float | None
    utilization_percent: float | None
    models: list[str] | None = Field(description="ids of the models that use it")
    unavailable: dict[str, str] = Field(description=_WHY)


class DiskAnswer(Answer):
    """The file system of a model folder."""

    folder: str
    total_bytes: int | None
    free_bytes: int | None
    unavailable: dict[str, str] = Field(description=_WHY)


class HostAnswer(Answer):
    """What this host has."""

    taken_at: datetime
    hostname: str
    kernel: str
    systemd_version: str | None
    booted_at: datetime
    uptime_seconds: int
    cpu: ProcessorsAnswer
    memory: MemoryAnswer
    gpus: list[GpuAnswer] = Field(description="as the llama-server that was asked about lists them, then the others")
    llama_server: str = Field(description="whose list of devices it is")
    devices_listed_at: datetime | None = Field(description="when it was asked for its devices")
    disks: list[DiskAnswer]
    unavailable: dict[str, str] = Field(
        description=f"{_WHY}; devices: why llama-server lists none; nvidiaDriver: what is wrong with it"
    )
