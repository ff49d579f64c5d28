"""A program that prints, as one JSON object in one line, what NVIDIA's driver says of its GPUs. Not for people to run.

It opens the GPUs, which the agent may not: it is run for a moment as the servers' user in the servers' sandbox
(``servers.questions``), by its path, so it imports nothing of ours. Whoever reads what it prints trusts none of it
(``nvml_figures``).

The management library (NVML) is spoken to by NVIDIA's own binding, ``nvidia-ml-py``
(https://docs.nvidia.com/deploy/nvml-api). CUDA numbers GPUs otherwise than NVML, the fastest first, unless
``CUDA_DEVICE_ORDER`` says otherwise; so CUDA's driver library itself is asked for the PCI address of each number
(``cuDeviceGetPCIBusId``, CUDA driver API, device management). It makes no context, so it takes none of a GPU's memory.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

FIGURES = "--figures"
ORDER = "--cuda-order"
MOST_GPUS = 64
MOST_PROCESSES = 512
"""For each GPU."""
_ADDRESS_BYTES = 32
_FAILED = 1
_USAGE = 64
"""EX_USAGE of sysexits.h."""


def main() -> int:
    """Print the answer; returns the exit status."""
    if sys.argv[1:] == [FIGURES]:
        # Where the package keeps what it brings along, beside this package of ours.
        sys.path.insert(0, os.path.abspath(f"{__file__}/../../.."))  # noqa: PTH100  # pathlib is not worth its import
        answer = figures()
    elif sys.argv[1:] == [ORDER]:
        answer = cuda_order()
    else:
        sys.stderr.write(f"give {FIGURES} or {ORDER}; the agent runs this\n")
        return _USAGE
    sys.stdout.write(json.dumps(answer, separators=(",", ":")) + "\n")
    sys.stdout.flush()
    # NVIDIA's libraries may hang or crash as they are unloaded; all has been said.
    os._exit(0)


def figures() -> dict[str, Any]:
    """All GPUs that NVML knows, and why there are none where it does not start."""
    try:
        import pynvml
    except ImportError as error:
        return {"gpus": [], "problem": f"nvidia-ml-py is not installed: {error}"}
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return {"gpus": [], "problem": str(error)}
    gpus, lost = [], []
    for index in range(min(count, MOST_GPUS)):
        try:
            gpus.append(_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)))
        except pynvml.NVMLError as error:
            lost.append(f"GPU {index}: {error}")
    return {"gpus": gpus, "problem": "; ".join(lost) or None}


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    """One GPU. Raises ``NVMLError`` where not even its address is told."""
    gpu: dict[str, Any] = {"pciAddress": _text(nvml.nvmlDeviceGetPciInfo(handle).busId)}
    reasons: dict[str, str] = {}

    def tell(key: str, ask: Callable[[], object]) -> None:
        try:
            gpu[key] = ask()
        except nvml.NVMLError as error:
            gpu[key] = None
            reasons[key] = str(error)

    tell("uuid", lambda: _text(nvml.nvmlDeviceGetUUID(handle)))
    tell("name", lambda: _text(nvml.nvmlDeviceGetName(handle)))
    tell("memoryTotalBytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total or None)
    tell("memoryFreeBytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).free)
    tell("temperatureCelsius", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    tell("utilizationPercent", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    tell("processes", lambda: _processes(nvml, handle))
    gpu["reasons"] = reasons
    return gpu


def _processes(nvml: Any, handle: Any) -> dict[int, int | None]:
    """The bytes that each process has of a GPU, by process id; ``None`` where the driver does not say."""
    # Vulkan's are listed as graphics, CUDA's as compute; one that does both is in both lists with all that it has.
    asked = (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses)
    found: dict[int, int | None] = {}
    for process in (process for ask in asked for process in ask(handle)):
        told = [each for each in (found.get(process.pid), process.usedGpuMemory) if each is not None]
        found[process.pid] = max(told, default=None)
    return dict(sorted(found.items())[:MOST_PROCESSES])


def _text(value: object) -> str:
    # Releases of the binding differ in which of the two they give.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def cuda_order(library: Any = None) -> dict[str, Any]:
    """The PCI address of each of CUDA's device numbers, in their order."""
    try:
        cuda = library or ctypes.CDLL("libcuda.so.1")
        count, device = ctypes.c_int(), ctypes.c_int()
        _must(cuda.cuInit(0), "cuInit")
        _must(cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
        addresses = []
        for ordinal in range(min(count.value, MOST_GPUS)):
            address = ctypes.create_string_buffer(_ADDRESS_BYTES)
            _must(cuda.cuDeviceGet(ctypes.byref(device), ordinal), "cuDeviceGet")
            _must(cuda.cuDeviceGetPCIBusId(address, _ADDRESS_BYTES, device), "cuDeviceGetPCIBusId")
            addresses.append(_text(address.value))
    except OSError as error:
        return {"order": [], "problem": str(error)}
    return {"order": addresses, "problem": None}


def _must(status: int, call: str) -> None:
    if status:
        raise OSError(f"CUDA's {call} failed with {status}")


if __name__ == "__main__":
    sys.exit(main())
