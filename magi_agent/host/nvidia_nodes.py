"""The device nodes that programs open to use NVIDIA's GPUs, and what makes each of them.

Which GPUs there are the driver says below ``/proc/driver/nvidia/gpus``: a folder for each, whose ``information`` has a
line ``Device Minor:`` (README of NVIDIA's driver, on its proc interface). The driver makes no nodes itself; its program
``nvidia-modprobe`` does, where nobody else has. Its options are these, by nvidia-modprobe(1) and its source
(https://github.com/NVIDIA/nvidia-modprobe, nvidia-modprobe.c and modprobe-utils):

* ``-c N`` makes ``/dev/nvidiaN``, and with 255 ``/dev/nvidiactl``;
* ``-u`` loads the module nvidia-uvm and makes no node, and ``-u -c 0`` makes ``/dev/nvidia-uvm`` and
  ``/dev/nvidia-uvm-tools`` with it: beside ``-u``, ``-c`` is no number of a GPU but the first of these two's own.

It calls mknod(2) and opens no device. Owner and mode are those that ``/proc/driver/nvidia/params`` gives, and it makes
nothing where that says ``ModifyDeviceFiles: 0``.

Left out are nodes that computing on a whole GPU does without: those for MIG's parts of a GPU (``-f``, below
``/dev/nvidia-caps``), for screens and for NVSwitch.

``magi-nvidia-nodes`` imports this before every start of a server, so nothing is imported here that takes time:
``typing`` and ``pathlib`` each take longer than all that is done.
"""

import os

MODPROBE = "/usr/bin/nvidia-modprobe"
_CONTROL = 255
"""The minor number of ``/dev/nvidiactl``."""
_MINOR = "Device Minor:"


def is_loaded(proc: str) -> bool:
    """Whether the kernel has NVIDIA's driver; ``proc`` is where its own file system is."""
    return os.path.exists(f"{proc}/driver/nvidia/version")  # noqa: PTH110  # see above


def gpu_minors(proc: str) -> list[int]:
    """The minor numbers of the driver's GPUs, in order; none where it does not tell."""
    try:
        folders = os.listdir(f"{proc}/driver/nvidia/gpus")  # noqa: PTH208  # see above
    except OSError:
        return []
    minors = (_minor_in(f"{proc}/driver/nvidia/gpus/{folder}/information") for folder in folders)
    return sorted({minor for minor in minors if minor is not None})


def nvidia_nodes(proc: str, dev: str) -> dict[str, tuple[str, ...]]:
    """Every node that should be there, with the options by which ``nvidia-modprobe`` makes it."""
    if not is_loaded(proc):
        return {}
    unified_memory = ("-u", "-c", "0")
    nodes = {f"{dev}/nvidiactl": ("-c", str(_CONTROL))}
    nodes |= {f"{dev}/nvidia{minor}": ("-c", str(minor)) for minor in gpu_minors(proc)}
    return nodes | {f"{dev}/nvidia-uvm": unified_memory, f"{dev}/nvidia-uvm-tools": unified_memory}


def may_make(proc: str) -> bool:
    """Whether the driver lets ``nvidia-modprobe`` make nodes."""
    return "ModifyDeviceFiles: 0" not in _text(f"{proc}/driver/nvidia/params").splitlines()


def _minor_in(information: str) -> int | None:
    for line in _text(information).splitlines():
        if line.startswith(_MINOR):
            number = line[len(_MINOR) :].strip()
            return int(number) if number.isdecimal() and int(number) < _CONTROL else None
    return None


def _text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:  # noqa: PTH123  # see above
            return file.read(1 << 16)
    except OSError:
        return ""
