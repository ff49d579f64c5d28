"""``magi-nvidia-nodes``: makes the device nodes of NVIDIA's GPUs that are missing. Not for people to run.

``magi-nvidia-uvm.service`` runs it before every start of a server. Where nothing is missing it does nothing, which is
why it imports next to nothing: see ``host.nvidia_nodes``, which knows the nodes. No shell is in it, and of the host it
runs NVIDIA's own ``nvidia-modprobe`` alone.
"""

import os
import sys

from magi_agent.host.nvidia_nodes import MODPROBE, may_make, nvidia_nodes

_FAILED = 1
_USAGE = 64
"""EX_USAGE of sysexits.h."""
_UNAVAILABLE = 69
"""EX_UNAVAILABLE of sysexits.h: a program that is needed is not there."""
_SECONDS = 20.0
"""For all that is to be made: the servers wait, and the agent gives a start 35 seconds."""
_MAX_WORDS = 500
"""Characters that are repeated of what nvidia-modprobe says."""


def main() -> int:
    """Make what is missing; returns the exit status."""
    if len(sys.argv) > 1:
        sys.stderr.write("magi-nvidia-nodes takes no arguments; magi-nvidia-uvm.service starts it\n")
        return _USAGE
    return make_missing("/proc", "/dev", MODPROBE)


def make_missing(proc: str, dev: str, modprobe: str) -> int:
    """Have ``modprobe`` make the nodes that are missing in ``dev``, and say which; returns the exit status.

    One that cannot be made keeps none of the others from being made.
    """
    missing: dict[tuple[str, ...], list[str]] = {}
    for node, options in nvidia_nodes(proc, dev).items():
        if not os.path.exists(node):  # noqa: PTH110  # pathlib takes longer to import than this takes
            missing.setdefault(options, []).append(node)
    if not missing:
        return 0
    names = ", ".join(node for nodes in missing.values() for node in nodes)
    if not may_make(proc):
        return _say_failed(
            f"{names} missing, and the driver forbids nvidia-modprobe to make nodes (ModifyDeviceFiles is 0 in "
            f"{proc}/driver/nvidia/params): whoever set that makes them by other means, as udev rules"
        )
    if not os.access(modprobe, os.X_OK):
        _say_failed(f"{names} missing, and {modprobe}, which makes them, as well: sudo apt install nvidia-modprobe")
        return _UNAVAILABLE
    return _make(missing, modprobe)


def _make(missing: dict[tuple[str, ...], list[str]], modprobe: str) -> int:
    # Here and not above, where it would cost each start of a server as much as Python itself.
    import subprocess
    import time

    status = 0
    deadline = time.monotonic() + _SECONDS
    for options, nodes in missing.items():
        command = [modprobe, *options]
        try:
            ran = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=max(0.0, deadline - time.monotonic()),
                check=False,
            )
        except subprocess.TimeoutExpired:
            status = _say_failed(f"{' '.join(command)} was given up: {_SECONDS:g} seconds are over")
            continue
        except OSError as error:
            status = _say_failed(f"{modprobe} cannot be run: {error.strerror}")
            continue
        for node in nodes:
            if os.path.exists(node):  # noqa: PTH110  # as above
                sys.stdout.write(f"made {node}\n")
            else:
                words = " ".join(ran.stdout.decode(errors="replace").split())[:_MAX_WORDS]
                said = f"exit status {ran.returncode}" + (f", {words}" if words else " and no word")
                status = _say_failed(f"{' '.join(command)} made no {node}: {said}")
    return status


def _say_failed(sentence: str) -> int:
    sys.stderr.write(f"magi-nvidia-nodes: {sentence}\n")
    return _FAILED


if __name__ == "__main__":
    sys.exit(main())
