"""Sockets that systemd made before it started this process, and hands over: sd_listen_fds(3)."""

import os
import socket
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Final

from magi_agent.errors import ConfigurationError

_FIRST: Final = 3
_MOST: Final = 256
_UNNAMED: Final = "unknown"
"""systemd's own word for a socket without a name."""


class InheritedSocket(socket.socket):
    """A socket that systemd made. It stays as its unit wants it, its queue of connections (``Backlog=``) included."""

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: it listens already, and to say so again would give it another queue, for good."""


def inherited_sockets(environment: MutableMapping[str, str]) -> list[tuple[str, InheritedSocket]]:
    """Return the sockets handed over to this process, each with its ``FileDescriptorName``, in systemd's order.

    The variables are removed from ``environment``, and the sockets are closed in programs that this process executes.
    Raises ``ConfigurationError`` for something handed over that is no socket.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    environment.pop("LISTEN_PIDFDID", None)
    # A shell between systemd and us, for one, passes on what was meant for it.
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found: list[tuple[str, InheritedSocket]] = []
    with ExitStack() as opened:
        for index in range(min(int(count), _MOST)):
            descriptor = _FIRST + index
            name = names[index] if index < len(names) and names[index] else _UNNAMED
            try:
                os.set_inheritable(descriptor, False)
                inherited = opened.enter_context(InheritedSocket(fileno=descriptor))
            except OSError as error:
                raise ConfigurationError(
                    f"systemd handed over {name!r} (file descriptor {descriptor}), which is no socket: {error.strerror}"
                ) from None
            found.append((name, inherited))
        opened.pop_all()
    return found
