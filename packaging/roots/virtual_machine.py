"""A Debian booted in a virtual machine, with a kernel of its own: for what only a whole kernel does.

The processor is emulated (QEMU's TCG), so it runs wherever the tests run, and is some ten times slower than this one.
The machine has no network; commands go through a serial port. It ends with the process that booted it, whatever ends
that. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import kernel
from vm_image import PORT, Image

_BOOT_SECONDS = 240.0
_END_SECONDS = 30.0
_SPARE_SECONDS = 30.0
"""What an answer may take beyond the time that its command was given."""
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
}


class VirtualMachineError(Exception):
    """A machine did not do as it should; the text says what it printed last."""


class VirtualMachine:
    """One booted machine."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, console: Path) -> None:
        self._process = process
        self._channel = channel
        self._console = console
        self._pending = b""

    def entered(
        self, command: Sequence[str], *, stdin: str = "", within: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it as root, to its end. Raises subprocess.SubprocessError, VirtualMachineError."""
        request = {"argv": list(command), "stdin": stdin, "within": within, "environment": _ENVIRONMENT}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answer(within + _SPARE_SECONDS)
        if "late" in answer:
            raise subprocess.TimeoutExpired(list(command), within)
        ran = subprocess.CompletedProcess(
            list(command), int(str(answer["returncode"])), str(answer["stdout"]), str(answer["stderr"])
        )
        if check:
            ran.check_returncode()
        return ran

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Not to be had: there is one channel, and a command holds it to its end."""
        raise NotImplementedError(f"a virtual machine runs one command at a time, and no {command[0]} beside others")

    def reboot(self) -> None:
        """Not to be had: nothing has asked for it yet."""
        raise NotImplementedError("a virtual machine is booted once")

    def wait_until_up(self) -> None:
        """Return when everything in it is started. Raises VirtualMachineError."""
        _ = self._answer(_BOOT_SECONDS)
        self.entered(["systemctl", "is-system-running", "--wait"], within=_BOOT_SECONDS, check=False)

    def last_words(self) -> str:
        """The end of what its kernel and its systemd printed."""
        return "\n".join(self._console.read_text(errors="replace").splitlines()[-25:])

    def _answer(self, within: float) -> Mapping[str, object]:
        deadline = time.monotonic() + within
        while b"\n" not in self._pending:
            self._channel.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                piece = self._channel.recv(1 << 16)
            except TimeoutError:
                raise VirtualMachineError(f"no answer within {within:.0f} s; {self.last_words()}") from None
            if not piece:
                raise VirtualMachineError(f"the machine ended; {self.last_words()}")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


@contextlib.contextmanager
def booted(image: Image, parts: Path, folder: Path, *, memory_mebibytes: int) -> Iterator[VirtualMachine]:
    """Give a machine that is up. Raises VirtualMachineError.

    It writes to the image's disk; ``parts`` is its second disk, ``folder`` is for its console and its port.
    """
    port, console = folder / "port", folder / "console"
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", f"{memory_mebibytes}M",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none",
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", "root=/dev/vda rw console=ttyS0 quiet systemd.unified_cgroup_hierarchy=1 panic=-1",
        "-drive", f"file={image.disk},if=virtio,format=raw,cache=unsafe",
        "-drive", f"file={parts},if=virtio,format=raw,readonly=on",
        "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console",
        "-chardev", f"socket,id=commands,path={port},server=on,wait=off",
        "-device", "virtio-serial", "-device", f"virtserialport,chardev=commands,name={PORT}",
    ]  # fmt: skip
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with (folder / "qemu").open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=kernel.die_with_parent,
        )  # fmt: skip
    try:
        with contextlib.closing(_connected(process, port, folder / "qemu")) as channel:
            machine = VirtualMachine(process, channel, console)
            machine.wait_until_up()
            yield machine
    finally:
        process.kill()
        process.wait(_END_SECONDS)


def _connected(process: subprocess.Popen[bytes], port: Path, said: Path) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + _END_SECONDS
    while True:
        try:
            channel.connect(str(port))
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                channel.close()
                raise VirtualMachineError(f"QEMU does not run: {said.read_text(errors='replace')}") from error
            time.sleep(0.05)
        else:
            return channel
