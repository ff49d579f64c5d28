"""The sandboxes, as tables: one for each scope, with the systemd version from which an entry is understood.

Both tables were tried on systemd 252: a property that the manager of the scope cannot carry out makes the start fail,
or is left out without a word, and neither may happen. What a table promises is checked on a running unit by the tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.systemd.transient import Sandbox
from magi_agent.vocabulary import Scope


@dataclass(frozen=True, slots=True)
class Entry:
    """One property of a sandbox; ``since`` is the first systemd version that has it."""

    name: str
    value: object
    since: int = 0


GPU_DEVICES: Final = (
    # NVIDIA: device classes, as paths to the nodes are lost at a daemon-reload.
    "char-nvidia",
    "char-nvidiactl",
    "char-nvidia-caps",
    "char-nvidia-frontend",
    "char-nvidia-uvm",
    # AMD, Intel, and everything with a DRM driver.
    "char-drm",
    "char-kfd",
)
"""What a unit with GPU access may open. Classes that the kernel does not know are dropped without a word."""
_WSL: Final = Path("/dev/dxg")
"""The GPU of a Windows host. It has no class of its own, and of a path that is not there systemd complains."""

_EVERYWHERE: Final = (
    Entry("NoNewPrivileges", True),
    Entry("PrivateTmp", True),
    Entry("ProtectSystem", "strict"),
    Entry("ProtectControlGroups", True),
    Entry("ProtectKernelModules", True),
    Entry("RestrictNamespaces", 0),
    Entry("RestrictRealtime", True),
    Entry("RestrictSUIDSGID", True),
    Entry("LockPersonality", True),
    Entry("SystemCallArchitectures", ["native"]),
    Entry("SystemCallFilter", (True, ["@system-service"])),
    Entry("SystemCallFilter", (False, ["@privileged"])),
    Entry("SystemCallErrorNumber", 1),
    Entry("RestrictAddressFamilies", (True, ["AF_INET", "AF_INET6", "AF_UNIX"])),
    Entry("KeyringMode", "private"),
)

_SYSTEM: Final = (
    *_EVERYWHERE,
    Entry("CapabilityBoundingSet", 0),
    Entry("AmbientCapabilities", 0),
    Entry("ProtectHome", "tmpfs"),
    Entry("ProtectClock", True),
    Entry("ProtectHostname", True),
    Entry("ProtectKernelLogs", True),
    Entry("ProtectKernelTunables", True),
    Entry("ProtectProc", "invisible"),
    Entry("RemoveIPC", True),
)

_USER: Final = (
    *_EVERYWHERE,
    # Without it an unprivileged manager leaves out everything that needs a mount namespace, and says nothing.
    Entry("PrivateUsers", True),
    Entry("ProtectHome", "read-only"),
    Entry("ProtectHostname", True),
)

_TABLES: Final[Mapping[Scope, Mapping[Sandbox, tuple[Entry, ...]]]] = {
    Scope.SYSTEM: {
        Sandbox.NONE: (),
        Sandbox.GPU: (
            *_SYSTEM,
            Entry("DevicePolicy", "closed"),
            Entry("DeviceAllow", [(device, "rw") for device in GPU_DEVICES]),
        ),
        Sandbox.CPU: (*_SYSTEM, Entry("PrivateDevices", True), Entry("MemoryDenyWriteExecute", True)),
    },
    Scope.USER: {
        Sandbox.NONE: (),
        # An unprivileged manager can neither filter devices nor give a /dev of its own.
        Sandbox.GPU: _USER,
        Sandbox.CPU: (*_USER, Entry("MemoryDenyWriteExecute", True)),
    },
}


def sandbox_entries(sandbox: Sandbox, scope: Scope, systemd_version: int) -> tuple[Entry, ...]:
    """Return the properties of a sandbox that a systemd of this version understands in this scope."""
    entries = tuple(entry for entry in _TABLES[scope][sandbox] if entry.since <= systemd_version)
    if (scope, sandbox) == (Scope.SYSTEM, Sandbox.GPU) and _WSL.exists():
        entries += (Entry("DeviceAllow", [(str(_WSL), "rw")]),)
    return entries
