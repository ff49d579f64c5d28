"""Whose socket is at the other end of a connection within this host."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing

import pytest

from magi_agent.host.connections import user_of

NOBODY = 65534
CONNECT = """
import os, socket, sys
os.setuid(int(sys.argv[3]))
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family) as channel:
    channel.connect((sys.argv[1], int(sys.argv[2])))
    print("connected", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1"])
@pytest.mark.parametrize("uid", [0, NOBODY, 33])
def test_the_user_at_the_other_end(host: str, uid: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        words = [sys.executable, "-c", CONNECT, host, str(server.getsockname()[1]), str(uid)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE):
            connection, _ = server.accept()
            with connection:
                assert user_of(connection.getpeername(), connection.getsockname()) == uid


def test_through_a_socket_for_both_families() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port)), closing(server.accept()[0]) as connection:
                assert user_of(connection.getpeername(), connection.getsockname()) == 0


def test_what_its_process_closed_is_nobodys_and_not_roots() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        with connection:
            client.close()
            assert user_of(connection.getpeername(), connection.getsockname()) is None


def test_where_there_is_no_such_connection_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = server.getsockname()
        assert user_of(("127.0.0.1", 1), here) is None
        # Where a socket listens at the address that is asked for, the kernel finds that one.
        assert user_of(here, ("127.0.0.1", 1)) is None
        assert user_of(here, here) is None
        assert user_of(("no address", 1), here) is None
        assert user_of((), here) is None
