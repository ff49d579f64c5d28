"""What ``magictl doctor`` looks at of control groups: whether the limits of the servers can be carried out."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magi_agent.cli.doctor_findings import Finding, ok, unknown, warning
from magi_agent.cli.doctor_patient import Patient
from magi_agent.host.control_groups import Controllers, controllers
from magi_agent.host.systemctl import SystemctlFailed, properties
from magi_agent.vocabulary import Scope

_ASKING: Final = ("systemd-detect-virt", "--container")
_SECONDS: Final = 10.0
_NO_CONTAINER: Final = frozenset({"", "none", "wsl"})
"""What is said where there is none. Windows starts a kernel of its own for WSL, with a command line."""
_DISABLING: Final = "cgroup_disable="
_OF_KERNEL: Final = {"blkio": "io"}
"""Names of controllers on the kernel's command line that are not those of version 2."""


def control_groups(patient: Patient) -> Iterator[Finding]:
    """Whether the servers' limits can be carried out."""
    scope = patient.servers_scope
    try:
        group = properties(scope, None, "ControlGroup").get("ControlGroup", "")
    except SystemctlFailed as error:
        yield unknown(f"systemd does not name its control group: {error}")
        return
    found = controllers(group)
    if found is None:
        yield unknown("the kernel does not show its control groups here")
        return
    yield control_groups_finding(found, controllers("/"), scope, container(), _command_line(patient))


def control_groups_finding(
    found: Controllers, at_root: Controllers | None, scope: Scope, inside: str | None, command_line: str
) -> Finding:
    """What is to be said of the controllers that the servers' manager has.

    ``at_root`` are those of the whole host or container, ``inside`` is the kind of container that this is, and
    ``command_line`` the kernel's.
    """
    if not found.is_unified:
        lost = "no limit of a user's servers holds" if scope is Scope.USER else "memory_high and io_weight do not hold"
        mend = "with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
        return warning(
            f"this host has version 1 of control groups: {lost}",
            f"boot the host of this container ({inside}) {mend}" if inside else f"boot {mend}",
        )
    if not found.missing:
        return ok(f"{', '.join(found.available)} are available to the servers")
    names, verb = ", ".join(found.missing), "is" if len(found.missing) == 1 else "are"
    if scope is Scope.USER and at_root and not set(found.missing) & set(at_root.missing):
        wanted = " ".join((*found.available, *found.missing))
        mend = f"sudo systemctl edit user@.service (below [Service] Delegate={wanted}); it holds from the next boot"
    else:
        mend = _restoring(found.missing, inside, command_line)
    return warning(f"{names} {verb} not available to the servers, so these limits do not hold", mend)


def _restoring(missing: tuple[str, ...], inside: str | None, command_line: str) -> str:
    if inside:
        return (
            f"this is a container ({inside}), which has what its host lets it have; where systemd runs it there, that "
            "is Delegate=yes in the container's unit"
        )
    for word in command_line.split():
        disabled = {_OF_KERNEL.get(name, name) for name in word.removeprefix(_DISABLING).split(",")}
        if word.startswith(_DISABLING) and disabled & set(missing):
            return f"take {word} from the kernel's command line (GRUB: /etc/default/grub, sudo update-grub) and boot"
    return "boot a kernel that has them, as Debian's do"


def container() -> str | None:
    """What kind of container this is, as systemd-detect-virt(1) calls it; ``None`` where it is none."""
    try:
        ran = subprocess.run(_ASKING, capture_output=True, text=True, timeout=_SECONDS, check=False)
        said = ran.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if not said:
        try:
            # Written by a systemd that was told so when it was started: https://systemd.io/CONTAINER_INTERFACE
            said = Path("/run/systemd/container").read_text().strip()
        except OSError:
            return None
    return None if said in _NO_CONTAINER else said


def _command_line(patient: Patient) -> str:
    try:
        return (patient.tree.proc / "cmdline").read_text(errors="replace")
    except OSError:
        return ""
