"""Shows a folder under another path by FUSE, so that what changes in it is told by no event there.

    python -m tests.discovery.fuse_folder SOURCE MOUNT_POINT

Reads only, and just what a scan needs. Format of the requests: <linux/fuse.h>, version 7.31.

Told by a line to do so, it takes no request until the next line. A process stopped by a signal might have taken one and
not answered it yet, and the kernel lets nobody be killed who waits for that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
from collections.abc import Callable
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = 27, 28, 29, 34, 36, 38, 42
_HEADER = struct.Struct("<IIQQIIIHH")
_ROOT = 1
_BUFFER = 1 << 20
_FIXED = {
    INIT: struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 16, 12, 65536, 1, 16, 0, 0),
    OPEN: bytes(16),
    OPENDIR: bytes(16),
    STATFS: bytes(80),
    **dict.fromkeys((RELEASE, RELEASEDIR, FLUSH, ACCESS, DESTROY), b""),
}
_SILENT = (FORGET, BATCH_FORGET, INTERRUPT)


class Served:
    """A folder, served request by request."""

    def __init__(self, source: Path) -> None:
        self._paths = {_ROOT: os.fspath(source)}
        self._nodes = {os.fspath(source): _ROOT}
        self._answers: dict[int, Callable[[int, bytes], bytes]] = {
            LOOKUP: self._lookup,
            GETATTR: self._state,
            READ: self._read,
            READDIR: self._list,
        }

    def serve(self, fd: int) -> None:
        """Answer until the folder is unmounted."""
        os.set_blocking(fd, False)
        # Unbuffered: of a line that was read ahead, no poll would tell.
        orders = open(0, "rb", buffering=0)  # noqa: SIM115  # for as long as the process lives
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(orders, select.POLLIN)
        while True:
            if any(ready == orders.fileno() for ready, _ in poll.poll()):
                if not orders.readline():
                    poll.unregister(orders)
                    continue
                print("silent", flush=True)
                orders.readline()
            try:
                request = os.read(fd, _BUFFER)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # the request was taken back
                return
            _, kind, unique, node, *_ = _HEADER.unpack_from(request)
            if kind in _SILENT:
                continue
            answer, code = _FIXED.get(kind, b""), 0 if kind in _FIXED else errno.ENOSYS
            if kind in self._answers:
                try:
                    answer, code = self._answers[kind](node, request[_HEADER.size :]), 0
                except OSError as error:
                    code = error.errno or errno.EIO
            os.write(fd, struct.pack("<IiQ", 16 + len(answer), -code, unique) + answer)

    def _lookup(self, node: int, body: bytes) -> bytes:
        path = os.path.join(self._paths[node], os.fsdecode(body.rstrip(b"\0")))  # noqa: PTH118
        attributes = self._attributes(path)
        child = self._nodes.setdefault(path, len(self._nodes) + 1)
        self._paths[child] = path
        return struct.pack("<QQQQII", child, 0, 0, 0, 0, 0) + attributes

    def _state(self, node: int, _: bytes) -> bytes:
        return bytes(16) + self._attributes(self._paths[node])

    @staticmethod
    def _attributes(path: str) -> bytes:
        status = os.lstat(path)
        moments = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        seconds, rest = zip(*(divmod(moment, 10**9) for moment in moments), strict=True)
        return struct.pack(
            "<QQQQQQIIIIIIIIII",
            *(status.st_ino, status.st_size, status.st_blocks, *seconds, *rest),
            *(status.st_mode, status.st_nlink, status.st_uid, status.st_gid, 0, 4096, 0),
        )

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        fd = os.open(self._paths[node], os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def _list(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        listing = b""
        for number, name in enumerate(sorted(os.listdir(self._paths[node]))[offset:], offset + 1):  # noqa: PTH208
            encoded = os.fsencode(name)
            entry = struct.pack("<QQII", number, number, len(encoded), 0) + encoded
            entry += bytes(-len(entry) % 8)
            if len(listing) + len(entry) > size:
                break
            listing += entry
        return listing


def main() -> None:
    source, point = map(Path, sys.argv[1:])
    fd = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"toy", os.fsencode(point), b"fuse.toy", 0, options.encode()):
        sys.exit(os.strerror(ctypes.get_errno()))
    print("mounted", flush=True)
    Served(source).serve(fd)


if __name__ == "__main__":
    main()
