"""The agent's API as a synchronous client sees it: one request, one connection, one time limit.

Errors are those of :mod:`magi_agent.cli.exits`: ``UnreachableError`` where nothing answers, ``RefusedError``
(``UnknownNameError`` for a 404 that names a model or a profile) where the agent says no.
"""

import errno
import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

from magi_agent.cli.address import Address, SocketAddress
from magi_agent.cli.exits import CommandError, RefusedError, UnknownNameError, UnreachableError

Json = dict[str, object] | list[object] | str | int | float | bool | None

REQUEST_SECONDS = 30.0
"""How long one answer may take where the caller says nothing else."""
CONNECT_SECONDS = 5.0
LARGEST_ANSWER = 64 * 1024 * 1024
"""Bytes of one answer: some 40,000 models; what is larger is no answer of the agent's."""
LONGEST_LINE = 1024 * 1024
"""Bytes of one line of a stream."""

_CHUNK = 64 * 1024
_NOT_FOUND = frozenset({"ModelNotFound", "ProfileNotFound"})


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. ``body`` is the decoded JSON; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: Json


class Client:
    """Asks the agent at one address. Holds no connection between requests, so threads may share it."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def get(self, path: str, *, timeout: float = REQUEST_SECONDS) -> Json:
        """Return the decoded JSON of ``path``."""
        return self.request("GET", path, timeout=timeout).body

    def request(
        self,
        method: str,
        path: str,
        body: Json = None,
        *,
        timeout: float = REQUEST_SECONDS,
        also_accept: frozenset[int] = frozenset(),
    ) -> Reply:
        """Send one request and return its answer; ``timeout`` (seconds) holds for all of it.

        A status from 400 up raises, unless it is in ``also_accept``. A body of ``None`` sends none.
        """
        reply = self.ask(method, path, body, timeout=timeout)
        if reply.status >= 400 and reply.status not in also_accept:
            raise refusal(self.address, reply)
        return reply

    def ask(self, method: str, path: str, body: Json = None, *, timeout: float = REQUEST_SECONDS) -> Reply:
        """Send one request and return its answer, whatever its status."""
        deadline = time.monotonic() + timeout
        with self._connected(timeout) as connection:
            response = self._send(connection, method, path, body)
            content = self._read(connection, response, deadline)
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, self._decode(content, response.status))

    def stream(self, path: str, *, idle_timeout: float) -> Iterator[str]:
        """Yield the lines of an endless answer; ``idle_timeout`` (seconds) is the longest silence.

        Ends when the agent closes the stream.
        """
        with self._connected(idle_timeout) as connection:
            response = self._send(connection, "GET", path, None)
            if response.status >= 400:
                deadline = time.monotonic() + REQUEST_SECONDS
                content = self._read(connection, response, deadline)
                raise refusal(self.address, Reply(response.status, {}, self._decode(content, response.status)))
            while line := response.readline(LONGEST_LINE):
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    @contextmanager
    def _connected(self, timeout: float) -> Iterator[http.client.HTTPConnection]:
        connection = _connection(self.address, min(timeout, CONNECT_SECONDS))
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            yield connection
        except TimeoutError:
            raise UnreachableError(
                f"the agent at {self.address} did not answer within {timeout:g} s; see: journalctl -u magi-agent -e",
                {"address": str(self.address), "reason": "timeout"},
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self.address, error) from error
        finally:
            connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Json
    ) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json", "Connection": "close", "User-Agent": "magictl"}
        content: bytes | None = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        prefix = "" if isinstance(self.address, SocketAddress) else self.address.prefix
        connection.request(method, prefix + path, content, headers)
        return connection.getresponse()

    def _read(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float
    ) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            # http.client lets go of the socket once the whole answer is in its buffer.
            if connection.sock is not None:
                connection.sock.settimeout(left)
            piece = response.read1(_CHUNK)
            if not piece:
                if response.length:
                    raise http.client.HTTPException("the answer broke off; did the agent stop just now?")
                return b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_ANSWER:
                raise http.client.HTTPException(f"an answer of more than {LARGEST_ANSWER} bytes")

    def _decode(self, content: bytes, status: int) -> Json:
        if not content:
            return None
        try:
            decoded: Json = json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise _stranger(self.address, status) from None
        return decoded


def segment(name: str) -> str:
    """Return ``name`` as one segment of a path: nothing in it can leave the segment."""
    return quote(name, safe="") if name not in {".", ".."} else name.replace(".", "%2E")


def refusal(address: Address, reply: Reply) -> CommandError:
    """Return the exception for an answer that is an error.

    An error that is not of the agent's shape comes from somebody else who listens there.
    """
    body = reply.body
    if not isinstance(body, dict) or not isinstance(body.get("error"), str):
        return _stranger(address, reply.status)
    kind = str(body["error"])
    details = body.get("details")
    error = UnknownNameError if kind in _NOT_FOUND else RefusedError
    return error(
        reply.status,
        kind,
        str(body.get("message") or f"the agent answered with HTTP status {reply.status}"),
        details if isinstance(details, dict) else {},
        reply.headers.get("x-request-id"),
    )


def _stranger(address: Address, status: int) -> UnreachableError:
    return UnreachableError(
        f"what answers at {address} is not the agent (HTTP {status}); name the agent's address with --socket or --url",
        {"address": str(address), "httpStatus": status, "reason": "stranger"},
    )


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is no JSON")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._seconds = timeout

    def connect(self) -> None:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.settimeout(self._seconds)
            channel.connect(self._path)
        except BaseException:
            channel.close()
            raise
        self.sock = channel


def _connection(address: Address, timeout: float) -> http.client.HTTPConnection:
    if isinstance(address, SocketAddress):
        return _UnixConnection(address.path, timeout)
    if address.secure:
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def _unreachable(address: Address, error: OSError | http.client.HTTPException) -> CommandError:
    """Say what stands between us and the agent, and what to do about it."""
    details: dict[str, object] = {"address": str(address)}
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        details["reason"] = "protocol"
        return UnreachableError(
            f"what answers at {address} speaks no HTTP: {str(error) or type(error).__name__}", details
        )
    if number in {errno.EACCES, errno.EPERM}:
        details["reason"] = "permission"
        return UnreachableError(
            f"no permission to use {address}; members of the group magi may "
            '(sudo usermod -aG magi "$USER", then log in again)',
            details,
        )
    if number == errno.ENOENT:
        details["reason"] = "missing"
        return UnreachableError(
            f"there is no socket at {address}; is the agent up? systemctl status magi-agent", details
        )
    if number == errno.ECONNREFUSED:
        details["reason"] = "refused"
        return UnreachableError(f"nobody listens at {address}; is the agent up? systemctl status magi-agent", details)
    details["reason"] = "connection"
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UnreachableError(f"no answer from {address}: {said}; is the agent up? systemctl status magi-agent", details)
