"""Who is at the other end of a connection, as the kernel says it; nothing that the peer says counts here."""

import asyncio
import ipaddress
import socket
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from weakref import WeakKeyDictionary

from magi_agent.host.connections import user_of

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_UCRED: Final = struct.Struct("=iII")
"""ucred of unix(7): process, user, group."""
# linux/include/uapi/asm-generic/socket.h; Python's socket module does not know it.
_SO_PEERGROUPS: Final = 59
_MOST_GROUPS: Final = 256


@dataclass(frozen=True)
class Peer:
    """One end of a real socket: a process of this host, or an address."""

    name: str
    """For the log, and for whoever wants to know who wished for something."""
    uid: int | None = None
    """The user: on a unix socket, and on loopback where the kernel tells."""
    groups: frozenset[int] = frozenset()
    """All groups of the peer's process, on a unix socket."""
    address: Address | None = None
    """The IP address, on TCP."""

    @cached_property
    def whom(self) -> str:
        """Who it counts for, where each may have so much at a time: a user of this host, or an address."""
        if self.uid is not None:
            return f"uid {self.uid}"
        # Whoever is on this host has all of loopback's addresses.
        return self.name if self.address is None or not self.address.is_loopback else "loopback"

    @cached_property
    def is_local(self) -> bool:
        """Whether it is a process at the other end of a unix socket."""
        return self.uid is not None and self.address is None

    @cached_property
    def is_loopback(self) -> bool:
        """Whether it is this host's loopback interface it comes from."""
        return self.address is not None and self.address.is_loopback


class Peers:
    """Asks the kernel once for each connection."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[asyncio.BaseTransport, Peer] = WeakKeyDictionary()

    def of(self, transport: asyncio.BaseTransport | None) -> Peer:
        """The peer of a connection; one that nothing is known of where the connection is gone already."""
        if transport is None:
            return Peer("a client that left")
        peer = self._known.get(transport)
        if peer is None:
            peer = self._known[transport] = _peer_of(transport)
        return peer


def _peer_of(transport: asyncio.BaseTransport) -> Peer:
    channel = transport.get_extra_info("socket")
    if channel is not None and channel.family == socket.AF_UNIX:
        return _process_at(channel)
    name = transport.get_extra_info("peername")
    if not name:
        return Peer("a client that left")
    address = ipaddress.ip_address(name[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    # Whoever listens on loopback and passes on what comes to it is known by this alone.
    uid = user_of(name, transport.get_extra_info("sockname")) if address.is_loopback else None
    return Peer(str(address) if uid is None else f"{address} (uid {uid})", uid, address=address)


def _process_at(channel: socket.socket) -> Peer:
    try:
        pid, uid, gid = _UCRED.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return Peer("a process that left")
    try:
        raw = channel.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:
        # Older than Linux 4.13, or in more groups than we ask for: only the first one is known then.
        raw = b""
    groups = struct.unpack(f"={len(raw) // 4}I", raw)
    return Peer(f"uid {uid} (pid {pid})", uid, frozenset({gid, *groups}))
