"""The messages by which the kernel is asked about TCP sockets: sock_diag(7), linux/inet_diag.h, linux/netlink.h."""

import struct
from typing import Final

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLM_F_REQUEST: Final = 0x1
HEADER: Final = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port id."""
REQUEST: Final = struct.Struct("=BBBBI HH16s16sI8s")
"""inet_diag_req_v2: family, protocol, extensions, padding, states, then inet_diag_sockid."""
SOCKET: Final = struct.Struct("=BBBB HH16s16sI8s IIIII")
"""inet_diag_msg: family, state, timer, retransmits, inet_diag_sockid, expires, queues, uid, inode."""
NO_COOKIE: Final = b"\xff" * 8
