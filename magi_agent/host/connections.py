"""Who is at the other end of a TCP connection within this host, as the kernel says it: sock_diag(7), linux/inet_diag.h.

Takes some 20 microseconds, so it is called from the event loop.
"""

import ipaddress
import socket
import struct
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

_ALL_STATES: Final = 0xFFFFFFFF
_TIMEOUT: Final = 0.1
_READ_BYTES: Final = 8192


def user_of(address: tuple[object, ...], other_end: tuple[object, ...]) -> int | None:
    """Return the user whose socket is at ``address``, connected to ``other_end``: both as Python's sockets have them.

    ``None`` where this network namespace has no such socket, where its process let go of it, or where the kernel does
    not tell.
    """
    try:
        question = _question(address, other_end)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(_TIMEOUT)
            kernel.bind((0, 0))
            kernel.send(question)
            answer = kernel.recv(_READ_BYTES)
        return _user_in(answer, question)
    except (OSError, ValueError, IndexError, struct.error):
        return None


def _question(address: tuple[object, ...], other_end: tuple[object, ...]) -> bytes:
    here, there = _ip_address(address), _ip_address(other_end)
    family = socket.AF_INET if here.version == 4 else socket.AF_INET6
    body = REQUEST.pack(
        family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES, _port(address), _port(other_end),
        here.packed.ljust(16, b"\0"), there.packed.ljust(16, b"\0"), 0, NO_COOKIE,
    )  # fmt: skip
    return HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + body


def _port(address: tuple[object, ...]) -> int:
    return socket.htons(int(str(address[1])))


def _ip_address(address: tuple[object, ...]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(str(address[0]).partition("%")[0])
    # A socket for both families is at an IPv6 address for one that knows IPv4 alone.
    return found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found


def _user_in(answer: bytes, question: bytes) -> int | None:
    _, kind, *_ = HEADER.unpack_from(answer)
    if kind != SOCK_DIAG_BY_FAMILY:
        return None
    asked = REQUEST.unpack_from(question, HEADER.size)
    found = SOCKET.unpack_from(answer, HEADER.size)
    # Where there is no such connection, the kernel may answer with a socket that listens.
    if found[4:8] != asked[5:9]:
        return None
    uid, inode = found[-2:]
    # What its process has closed belongs to nobody, which the kernel writes as root.
    return int(uid) if inode else None
