"""A Debian root booted in a container, with systemd as its PID 1, on an overlay that is thrown away.

To be used inside `packaging/workbench/private_systemd.py`: its namespaces and cgroups hold everything that is made
here, so nothing is left behind, whatever ends the run. A container has cgroup version 2 alone, as Debian hosts have, a
network of its own with nothing but loopback, and a real boot id. Standard library only.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cgroups
import kernel
from surroundings import inside_private_systemd

_PLACE = Path("/run/magi-roots")
_BOOT_SECONDS = 60.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_REBOOT = 133  # systemd-nspawn(1), "--keep-unit": whoever started it is to start it again
_SETTLED = frozenset({"running", "degraded"})
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
}

_numbers = itertools.count(1)


class ContainerError(Exception):
    """A container did not do as it should; the text says what it printed last."""


class Disk:
    """What containers write, in memory: a layer on top of layers that are only read."""

    def __init__(self, layers: Sequence[Path], folder: Path) -> None:
        self._layers = (folder / "changes", *layers)
        self.root = folder / "root"
        """The whole as the container sees it."""

    @property
    def layers(self) -> tuple[Path, ...]:
        """The layers that another disk can be made of, once no container runs on this one; the topmost first."""
        return self._layers

    @property
    def changes(self) -> Path:
        """What was written, as overlayfs keeps it: files as they are, a removed one as a device 0,0."""
        return self._layers[0]


@contextlib.contextmanager
def disk(layers: Sequence[Path]) -> Iterator[Disk]:
    """Give a disk that begins with what is in ``layers``, the topmost first. Raises ContainerError, OSError."""
    if not inside_private_systemd():
        raise ContainerError("containers run inside packaging/workbench/private_systemd.py alone")
    folder = _PLACE / f"disk{next(_numbers)}"
    folder.mkdir(parents=True)
    kernel.mount("tmpfs", folder, "tmpfs", options="mode=0755,size=50%")
    made = Disk(layers, folder)
    for path in (made.root, made.changes, folder / "work"):
        path.mkdir()
    lower = ":".join(str(layer) for layer in layers)
    options = f"lowerdir={lower},upperdir={made.changes},workdir={folder / 'work'}"
    try:
        kernel.mount("overlay", made.root, "overlay", options=options)
        yield made
    finally:
        for mounted in (made.root, folder):
            subprocess.run(["umount", "--lazy", str(mounted)], check=False, capture_output=True)
        folder.rmdir()


class Container:
    """One booted root. Commands are entered from outside, by the namespaces of its PID 1."""

    def __init__(self, on: Disk, shown: Mapping[str, Path]) -> None:
        self._disk = on
        self._shown = shown
        self._name = f"magi-{next(_numbers)}"
        self._console = on.root.parent / f"{self._name}.console"
        self._process: subprocess.Popen[bytes] | None = None
        self._group: cgroups.Group | None = None
        self._first = 0

    def boot(self) -> None:
        """Start it and wait until systemd says that everything is up. Raises ContainerError."""
        machine_id = self._disk.root / "etc/machine-id"
        # An empty one would make this a first boot, which enables every unit that there is.
        if not machine_id.exists() or len(machine_id.read_text().strip()) != len(uuid.uuid4().hex):
            machine_id.write_text(uuid.uuid4().hex + "\n")
        group = self._group = cgroups.create()
        command = [
            "systemd-nspawn", "--quiet", f"--directory={self._disk.root}", f"--machine={self._name}", "--boot",
            "--register=no", "--keep-unit", "--private-network", "--console=pipe", "--link-journal=no",
            "--resolv-conf=off", "--timezone=off",
            # Without these its systemd would pass over IPAddressDeny= and DeviceAllow=, and not say so.
            "--capability=CAP_BPF", "--system-call-filter=bpf",
            *(f"--bind-ro={outside}:{inside}" for inside, outside in self._shown.items()),
        ]  # fmt: skip
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}

        def enter() -> None:
            group.enter()
            kernel.die_with_parent()

        with self._console.open("wb") as console:
            try:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=enter,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise ContainerError("systemd-nspawn is missing. As root: packaging/roots/prepare") from error
        self._wait_until_up()

    def reboot(self) -> None:
        """Have its systemd shut everything down and boot again, and wait until it is up. Raises ContainerError."""
        if self._process is None:
            raise ContainerError("does not run")
        self.entered(["systemctl", "reboot"], check=False)
        try:
            status = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ContainerError(f"did not go down within {_STOP_SECONDS:.0f} s: {self._last_words()}") from error
        finally:
            self.destroy()
        if status != _REBOOT:
            raise ContainerError(f"ended with status {status} instead of rebooting: {self._last_words()}")
        self.boot()

    def power_off(self) -> None:
        """Have its systemd shut everything down, and wait for the end. Raises ContainerError."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ContainerError(f"did not power off within {_STOP_SECONDS:.0f} s: {self._last_words()}") from error
        finally:
            self.destroy()

    def destroy(self) -> None:
        """End everything in it at once."""
        if self._group is not None and not self._group.remove(_STOP_SECONDS):
            raise ContainerError(f"processes of {self._name} did not end within {_STOP_SECONDS:.0f} s")
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._group = self._process = None

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Begin a command in it as root, with pipes to all three streams."""
        return subprocess.Popen(
            self._entering(command), env=_ENVIRONMENT, text=True, errors="replace", bufsize=1, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def entered(
        self, command: Sequence[str], *, stdin: str = "", within: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it as root, to its end. Raises subprocess.SubprocessError."""
        return subprocess.run(
            self._entering(command), env=_ENVIRONMENT, text=True, errors="replace", input=stdin, timeout=within,
            capture_output=True, start_new_session=True, check=check,
        )  # fmt: skip

    def _entering(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self._first), "--all", "--", *command]

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _BOOT_SECONDS
        state = "no PID 1"
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ContainerError(f"ended instead of booting: {self._last_words()}")
            first = self._find_first()
            if first:
                self._first = first
                with contextlib.suppress(subprocess.TimeoutExpired):
                    asked = self.entered(["systemctl", "is-system-running"], within=5.0, check=False)
                    state = asked.stdout.strip() or asked.stderr.strip()
                    if state in _SETTLED:
                        return
            time.sleep(_POLL_SECONDS)
        raise ContainerError(f"not booted within {_BOOT_SECONDS:.0f} s, last seen: {state}; {self._last_words()}")

    def _find_first(self) -> int:
        """Return the process id, outside, of the container's PID 1; 0 while there is none."""
        if self._process is None:
            return 0
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                is_first = fields["NSpid"].split()[-1] == "1" and fields["Name"] == "systemd"
                if is_first and fields["PPid"] == str(self._process.pid):
                    return int(status.parent.name)
        return 0

    def _last_words(self) -> str:
        return " | ".join(self._console.read_text(errors="replace").split("\n")[-12:]).strip(" |") or "(nothing)"


@contextlib.contextmanager
def booted(on: Disk, shown: Mapping[str, Path]) -> Iterator[Container]:
    """Give a container that runs on a disk. Raises ContainerError.

    ``shown`` are folders of this machine that it may read, by their path in the container.
    """
    container = Container(on, shown)
    try:
        container.boot()
        yield container
    finally:
        container.destroy()
