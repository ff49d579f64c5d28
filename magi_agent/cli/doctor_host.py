"""What ``magictl doctor`` looks at of the host: systemd, users, GPUs, memory."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magi_agent.cli.answers import text
from magi_agent.cli.doctor_agent import AS_ROOT
from magi_agent.cli.doctor_findings import Finding, failed, ok, unknown, warning
from magi_agent.cli.doctor_patient import Patient
from magi_agent.cli.phrasing import counted, number, size
from magi_agent.discovery.access import READERS, find_obstacle
from magi_agent.host.accounts import Account, group_id, group_name
from magi_agent.host.gpu_devices import CUDA, Gpus, Tree, Vendor, gpus, nvidia_driver_version, nvidia_mismatch
from magi_agent.host.libraries import installed_library
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.vocabulary import Scope

_FIRST_SYSTEMD: Final = 252
_USER_KEY: Final = "servers.llama_server_user"
_FOR_GPUS: Final = ("render", "video")
_LITTLE: Final = 512 * 1024 * 1024
"""Bytes of free memory below which nothing should be started."""
_READ_WRITE: Final = os.R_OK | os.W_OK


def systemd(patient: Patient) -> Iterator[Finding]:
    """Whether systemd runs this host, and is new enough."""
    try:
        version = properties(patient.servers_scope, None, "Version").get("Version", "")
    except SystemctlFailed as error:
        yield failed(f"systemd cannot be asked: {error}")
        return
    major = "".join(letter for letter in version.partition(".")[0].partition("~")[0] if letter.isdigit())
    if not major:
        yield unknown(f"systemd's version is {version or 'not told'}")
    elif int(major) < _FIRST_SYSTEMD:
        yield failed(f"systemd is {version}; the agent needs {_FIRST_SYSTEMD} or later", "upgrade the host's release")
    else:
        yield ok(f"systemd {version}")


def users(patient: Patient) -> Iterator[Finding]:
    """Whom the servers run as, and in which groups that user and the service are."""
    settings = patient.settings
    if settings is None:
        yield unknown("whom the servers run as is not known without the configuration")
        return
    servers, service = patient.servers_account, patient.agents_account
    if settings.systemd_scope is Scope.USER:
        yield ok(f"agent and servers run as {service.name if service else 'the same user'}")
        return
    if servers is None:
        yield failed(
            f"there is no user {settings.llama_server_user} for the servers",
            # The package's own user, and no other, is what that makes.
            "sudo systemd-sysusers" if settings.llama_server_user == READERS else patient.changing(_USER_KEY),
        )
        return
    if servers.uid is None:
        yield ok("each server runs as a user of its own that systemd makes for the moment")
        return
    if servers.uid == 0:
        yield warning("the servers run as root", patient.changing(_USER_KEY))
        return
    lacking = [name for name in _FOR_GPUS if (gid := group_id(name)) is not None and gid not in servers.gids]
    if lacking:
        yield warning(
            f"{servers.name}, whom the servers run as, is not in {' and '.join(lacking)}, whose members may use GPUs",
            f"sudo usermod -aG {','.join(lacking)} {settings.llama_server_user}",
        )
    readers = group_id(READERS)
    if service and service.uid != 0 and readers is not None and readers in servers.gids - service.gids:
        name = service.name.rpartition(" ")[2]
        yield warning(
            f"{service.name}, whom the service runs as, is not in {READERS}: what that group may read, it may not",
            f"sudo usermod -aG {READERS} {name} && sudo systemctl restart magi-agent",
        )
    if not lacking:
        yield ok(f"the servers run as {servers.name}, the service as {service.name if service else 'nobody known'}")


def gpu(patient: Patient) -> Iterator[Finding]:
    """Whether the servers' user may use the GPUs there are."""
    found = gpus(patient.tree)
    on_wsl = patient.tree.dev / "dxg"
    if on_wsl.exists():
        denied = _denied(on_wsl, patient.servers_account) if patient.servers_account else None
        yield failed(*denied) if denied else ok(f"a GPU of the Windows host, by {on_wsl}")
    elif not found:
        yield ok("there is no GPU of NVIDIA, AMD or Intel; models run on the CPU")
    for each in found:
        yield from gpu_findings(each, patient.servers_account, patient.tree, installed_library(CUDA))


def gpu_findings(found: Gpus, account: Account | None, tree: Tree, cuda: Path | None) -> Iterator[Finding]:
    """What is to be said of one vendor's GPUs; ``cuda`` is the file of NVIDIA's library."""
    what = f"{counted(found.count, 'GPU')} of {found.vendor}" if found.count else f"{found.vendor}'s driver"
    if found.driver is None or found.driver == "nouveau":
        of = "no driver" if found.driver is None else f"the driver {found.driver}, which cannot compute"
        yield warning(f"{what}, and {of}: models run on the CPU", _driver_of(found.vendor))
        return
    trouble = list(_nvidia(tree, cuda)) if found.vendor is Vendor.NVIDIA else []
    # What else is there must not fail for a graphics unit that no model is run on.
    judge = warning if found.vendor is Vendor.INTEL else failed
    for node in found.missing:
        trouble.append(_missing(node))
    if account is None:
        trouble.append(unknown("whether the servers may use it: whom they run as is not known"))
    else:
        trouble += [judge(*denied) for node in found.nodes if (denied := _denied(node, account))]
    yield from trouble
    if not trouble and account is not None:
        nodes = ", ".join(map(str, found.nodes))
        yield ok(f"{what}, driver {_version(found, tree)}; {account.name} may use {nodes}")


def _nvidia(tree: Tree, cuda: Path | None) -> Iterator[Finding]:
    if cuda is None:
        yield warning(f"{CUDA} of NVIDIA's driver is not installed: CUDA finds no GPU", "sudo apt install libcuda1")
        return
    if mismatch := nvidia_mismatch(tree, cuda):
        yield failed(mismatch, "sudo reboot")


def _missing(node: Path) -> Finding:
    if node.name.startswith("nvidia"):
        lost = "that GPU" if node.name[-1].isdecimal() else "any GPU"
        return warning(
            f"there is no {node}, without which CUDA does not find {lost}; it is made before a server starts",
            "sudo systemctl start magi-nvidia-uvm.service",
        )
    if node.name == "kfd":
        return warning(f"there is no {node}: ROCm finds no GPU, Vulkan does", "sudo modprobe amdgpu")
    return warning(f"there is no {node}: nothing can compute on it")


def _denied(node: Path, account: Account) -> tuple[str, str | None] | None:
    """Why an account may not use a device node, and what mends it; ``None`` where it may."""
    try:
        if find_obstacle(str(node), account, needed=_READ_WRITE) is None:
            return None
        status = node.stat()
    except OSError as error:
        return f"{node}: {error.strerror}", AS_ROOT
    group = group_name(status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    found = f"{node} ({group}, mode {mode:04o}) does not let {account.name} use it"
    if (mode >> 3) & _READ_WRITE != _READ_WRITE or status.st_gid == 0:
        return found, f"sudo chmod g+rw {node}, by a udev rule for good" if status.st_gid else f"sudo chmod a+rw {node}"
    if account.uid is None:
        return found, "give the servers a user in that group: llama_server_user below [servers]"
    return found, f"sudo usermod -aG {group} {account.name.rpartition(' ')[2]}"


def _driver_of(vendor: Vendor) -> str:
    if vendor is Vendor.NVIDIA:
        return "sudo modprobe nvidia; where there is none: sudo apt install nvidia-driver"
    return f"sudo modprobe {'amdgpu' if vendor is Vendor.AMD else 'i915'}"


def _version(found: Gpus, tree: Tree) -> str:
    version = nvidia_driver_version(tree) if found.vendor is Vendor.NVIDIA else None
    return f"{found.driver} {version}" if version else str(found.driver)


def memory(patient: Patient) -> Iterator[Finding]:
    """Whether there is room for models."""
    try:
        lines = (patient.tree.proc / "meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        free, total = kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    except (OSError, ValueError, KeyError, IndexError) as error:
        yield unknown(f"the kernel does not tell of its memory: {error}")
        return
    said = f"{size(free)} of {size(total)} are available"
    if free < _LITTLE:
        yield warning(f"{said}: too little to start a model", "systemd-cgtop -m")
        return
    up = {text(server.get("modelId")) for server in patient.servers if server.get("isRunning") is True}
    large = [
        (bytes_of, model_id)
        for model_id, model in patient.models.items()
        if model.get("enabled") is True
        and model_id not in up
        and (bytes_of := number(model.get("sizeBytes")) or 0) > free
    ]
    if large and not gpus(patient.tree):
        bytes_of, model_id = max(large)
        yield warning(
            f"{said}; {model_id}, which is enabled and does not run, has {size(bytes_of)}",
            f"magictl disable {model_id}",
        )
        return
    yield ok(said)
