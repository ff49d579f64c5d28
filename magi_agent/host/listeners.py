"""Who listens on a TCP port, as the kernel says it.

An unprivileged process may not look into others' ``/proc/PID/fd``, but it may ask for sockets by netlink
(sock_diag(7), linux/inet_diag.h), and the answer names the control group that each socket was made in (Linux 5.8).
The id of a control group is the inode number of its folder in the version 2 hierarchy, which systemd keeps beside
the version 1 hierarchies too ("hybrid").

Everything here takes well under a millisecond, so it is called from the event loop.
"""

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from magi_agent.host.sock_diag import (
    HEADER,
    NETLINK_SOCK_DIAG,
    NLM_F_REQUEST,
    NO_COOKIE,
    REQUEST,
    SOCK_DIAG_BY_FAMILY,
    SOCKET,
)
from magi_agent.host.unified_hierarchy import groups_of

_NLM_F_DUMP: Final = 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_INET_DIAG_CGROUP_ID: Final = 21
_TCP_LISTEN: Final = 10

_ATTRIBUTE: Final = struct.Struct("=HH")

_TIMEOUT: Final = 0.2
_READ_BYTES: Final = 65536
_MOST_READS: Final = 64
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening TCP socket."""

    address: str
    """The IP address it is bound to; ``0.0.0.0`` and ``::`` are all of the host's."""
    uid: int
    """The user that owns the socket."""
    inode: int
    cgroup_id: int | None
    """The control group it was made in; ``None`` where the kernel does not tell."""


def listeners(port: int) -> tuple[Listener, ...]:
    """Return the TCP sockets of this network namespace that listen on ``port``, at whatever address.

    Where the kernel does not answer by netlink, it is asked by /proc/net, which knows no control groups.
    """
    try:
        return tuple(_by_netlink(port))
    except (OSError, struct.error):
        return tuple(_by_proc(port))


def owned_by(port: int, control_group: str, address: str | None = None) -> bool | None:
    """Tell whether every socket that listens on ``port`` is of this control group or one below it.

    ``control_group`` is what systemd calls it: a path below the hierarchy's root. With ``address``, only the sockets
    count that may answer there; where it is a name, all do. ``False`` also when nobody listens there or the control
    group is gone; ``None`` where the kernel does not tell.
    """
    asked = _ip_address(address)
    found = [listener for listener in listeners(port) if asked is None or _may_answer(listener, asked)]
    if not found:
        return False
    ids = {listener.cgroup_id for listener in found}
    if None in ids:
        return None
    groups = groups_of(control_group)
    if groups is None:
        return None
    for group in groups:
        with contextlib.suppress(OSError):
            ids.discard(group.stat().st_ino)
        if not ids:
            return True
    return False


def _ip_address(text: str | None) -> _Address | None:
    try:
        return ipaddress.ip_address(text) if text else None
    except ValueError:
        return None


def _may_answer(listener: Listener, asked: _Address) -> bool:
    """Whether a connection to ``asked`` may end at this socket; one for all IPv6 addresses may take IPv4 too."""
    bound: _Address = ipaddress.ip_address(listener.address)
    if isinstance(bound, ipaddress.IPv6Address) and bound.ipv4_mapped:
        bound = bound.ipv4_mapped
    if bound.is_unspecified:
        return bound.version == 6 or asked.version == 4
    return bound == asked


def _by_netlink(port: int) -> Iterator[Listener]:
    """Raises ``OSError`` where the kernel refuses or does not know the question."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_TIMEOUT)
        kernel.bind((0, 0))
        # A socket that takes both families is listed once, as IPv6.
        for sequence, family in enumerate((socket.AF_INET, socket.AF_INET6), start=1):
            kernel.send(_question(family, port, sequence))
            yield from _answers(kernel, port, sequence)


def _question(family: int, port: int, sequence: int) -> bytes:
    # The port is in network byte order. The kernel compares it for every listening socket and sends the equal ones.
    body = REQUEST.pack(
        family, socket.IPPROTO_TCP, 0, 0, 1 << _TCP_LISTEN, socket.htons(port), 0, bytes(16), bytes(16), 0, NO_COOKIE
    )
    length = HEADER.size + len(body)
    return HEADER.pack(length, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | _NLM_F_DUMP, sequence, 0) + body


def _answers(kernel: socket.socket, port: int, sequence: int) -> Iterator[Listener]:
    for _ in range(_MOST_READS):
        data = memoryview(kernel.recv(_READ_BYTES))
        while len(data) >= HEADER.size:
            length, kind, _, answered, _ = HEADER.unpack_from(data)
            if length < HEADER.size:
                raise OSError("netlink: a message of no length")
            message, data = data[HEADER.size : length], data[(length + 3) & ~3 :]
            if answered != sequence:
                continue
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", message)
                raise OSError(-code, os.strerror(-code))
            listener = _listener(message, port)
            if listener is not None:
                yield listener
    raise OSError("netlink: the list of sockets does not end")


def _listener(message: memoryview, port: int) -> Listener | None:
    family, _, _, _, source_port, _, source, *_, uid, inode = SOCKET.unpack_from(message)
    if socket.ntohs(source_port) != port:
        return None
    address = ipaddress.ip_address(source[:4] if family == socket.AF_INET else source)
    return Listener(str(address), uid, inode, _cgroup_id(message[SOCKET.size :]))


def _cgroup_id(attributes: memoryview) -> int | None:
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if length < _ATTRIBUTE.size:
            return None
        if kind == _INET_DIAG_CGROUP_ID:
            return int.from_bytes(attributes[_ATTRIBUTE.size : length], sys.byteorder)
        attributes = attributes[(length + 3) & ~3 :]
    return None


def _by_proc(port: int) -> Iterator[Listener]:
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
            for columns in map(str.split, lines):
                address, _, number = columns[1].partition(":")
                if int(number, 16) == port and int(columns[3], 16) == _TCP_LISTEN:
                    yield Listener(_proc_address(address), int(columns[7]), int(columns[9]), None)


def _proc_address(text: str) -> str:
    """Read an address as /proc/net/tcp has it (proc(5)): words of four bytes, each in the machine's byte order."""
    words = (int(text[start : start + 8], 16) for start in range(0, len(text), 8))
    return str(ipaddress.ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words)))
