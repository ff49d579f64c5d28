"""The agent's API as a synchronous client sees it: one request, one connection, one time limit.

Errors are those of :mod:`magi_agent.cli.exits`: ``UnreachableError`` where nothing answers, ``RefusedError``
(``UnknownNameError`` for a 404 that names a model or a profile) where the agent says no.
"""

import errno
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import quote

from magi_agent.cli.address import Address, SocketAddress
from magi_agent.cli.exits import CommandError, RefusedError, UnknownNameError, UnreachableError
from magi_agent.cli.silence import Silence
from magi_agent.vocabulary import RESERVED_IDS

Json = dict[str, object] | list[object] | str | int | float | bool | None

REQUEST_SECONDS = 30.0
"""How long one answer may take where the caller says nothing else."""
CONNECT_SECONDS = 5.0
_PATIENT_SECONDS = 10.0
"""Who waits shorter has a reason to say nothing."""
_LONG_SECONDS = 60.0
"""Who waits longer than this waits for what the agent does, and knows."""
LARGEST_ANSWER = 64 * 1024 * 1024
"""Bytes of one answer: some 40,000 models; what is larger is no answer of the agent's."""

EVENT_STREAM = "text/event-stream"
_LONGEST_LINE = 4 * 1024 * 1024
"""Bytes of one line of a stream."""
_CHUNK = 64 * 1024
_IS_IT_UP = "is the agent up? systemctl status magi-agent"
_NOT_FOUND = frozenset({"ModelNotFound", "ProfileNotFound"})

ACTIVE_PROFILE = "active"
"""Stands in a path where a profile's name does, for the one that is active."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. ``body`` is the decoded JSON; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: Json


class Client:
    """Asks the agent at one address. Holds no connection between requests, so threads may share it."""

    def __init__(self, address: Address, token: str | None = None, silence: Silence | None = None) -> None:
        """``token`` goes with each request: it says who asks. ``silence`` looks after the wait for the first answer."""
        self.address = address
        self._token = token
        self._silence = silence

    def get(self, path: str, *keys: str, timeout: float = REQUEST_SECONDS) -> dict[str, object]:
        """Return the JSON object at ``path``; an answer without ``keys`` is none of the agent's."""
        reply = self.request("GET", path, timeout=timeout)
        if not isinstance(reply.body, dict) or any(key not in reply.body for key in keys):
            raise _stranger(self.address, reply.status)
        return reply.body

    def request(
        self,
        method: str,
        path: str,
        body: Json = None,
        *,
        timeout: float = REQUEST_SECONDS,
        also_accept: frozenset[int] = frozenset(),
        is_long: bool = False,
    ) -> Reply:
        """Send one request and return its answer; ``timeout`` (seconds) holds for all of it.

        ``is_long`` is whether the agent was asked to take its time. A status from 400 up raises, unless it is in
        ``also_accept``. A body of ``None`` sends none.
        """
        reply = self.ask(method, path, body, timeout=timeout, is_long=is_long)
        if reply.status >= 400 and reply.status not in also_accept:
            raise refusal(self.address, reply)
        if reply.body is None:
            raise _stranger(self.address, reply.status)
        return reply

    def ask(
        self, method: str, path: str, body: Json = None, *, timeout: float = REQUEST_SECONDS, is_long: bool = False
    ) -> Reply:
        """Send one request and return its answer, whatever its status; ``body`` is ``None`` where it has none."""
        deadline = time.monotonic() + timeout
        # The connection closes with the answer's headers, and leaves the socket to the answer.
        with (
            self._connected(timeout) as connection,
            closing(self._send(connection, method, path, body, is_long=is_long)) as response,
        ):
            # What was waited for an agent that stopped does not count; the rest of an answer comes at once.
            content = self._read(connection, response, max(deadline, time.monotonic() + CONNECT_SECONDS))
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, self._decode(content, response.status))

    @contextmanager
    def follow(self, path: str, last_id: str, *, silence: float) -> Iterator[Iterator[str]]:
        """Have the lines of a stream of server-sent events, after the event ``last_id`` where that is not empty.

        The lines end where the stream does; ``silence`` seconds without a byte are an error.
        """
        headers = {"Accept": EVENT_STREAM, **({"Last-Event-ID": last_id} if last_id else {})}
        with (
            self._connected(silence) as connection,
            closing(self._send(connection, "GET", path, None, headers)) as response,
        ):
            kind = response.headers.get_content_type()
            if response.status != http.client.OK or kind != EVENT_STREAM:
                content = self._read(connection, response, time.monotonic() + REQUEST_SECONDS)
                told = {name.lower(): value for name, value in response.getheaders()}
                raise refusal(self.address, Reply(response.status, told, self._decode(content, response.status)))
            yield _lines(response)

    @contextmanager
    def _connected(self, timeout: float) -> Iterator[http.client.HTTPConnection]:
        seconds = min(timeout, CONNECT_SECONDS)
        connection = _connection(self.address, seconds)
        try:
            connection.connect()
            seconds = timeout
            if connection.sock is not None:
                connection.sock.settimeout(seconds)
            yield connection
        except TimeoutError:
            raise UnreachableError(
                f"the agent at {self.address} did not answer within {seconds:g} s; see: journalctl -u magi-agent -e",
                {"address": str(self.address), "reason": "timeout"},
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self.address, error) from error
        finally:
            connection.close()

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Json,
        more_headers: Mapping[str, str] | None = None,
        *,
        is_long: bool = False,
    ) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json", "Connection": "close", "User-Agent": "magictl", **(more_headers or {})}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        content: bytes | None = None
        if body is not None:
            try:
                content = json.dumps(body).encode()
            except RecursionError:
                # What a person gave could just be read.
                raise CommandError("RequestInvalid", "what is to be sent is nested too deeply") from None
            headers["Content-Type"] = "application/json"
        prefix = "" if isinstance(self.address, SocketAddress) else self.address.prefix
        connection.request(method, prefix + path, content, headers)
        silence, channel = self._silence, connection.sock
        if silence is not None and channel is not None and (seconds := channel.gettimeout() or 0.0) >= _PATIENT_SECONDS:
            left = silence.until_answered(channel, seconds, quiet=is_long or seconds > _LONG_SECONDS)
            channel.settimeout(max(0.01, left))
        response = connection.getresponse()
        # The agent is there; what takes long from here on is what it does.
        self._silence = None
        return response

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
                    raise http.client.IncompleteRead(b"".join(pieces), response.length)
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


def _lines(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline(_LONGEST_LINE):
        if not line.endswith(b"\n"):
            # The end, in the midst of a line, or no end at all.
            return
        yield line.decode(errors="replace").rstrip("\r\n")


def segment(name: str) -> str:
    """Return ``name`` as one segment of a path: nothing in it can leave the segment."""
    return quote(name, safe="", errors="surrogateescape") if name not in {".", ".."} else name.replace(".", "%2E")


def model_path(model_id: str) -> str:
    """Return the path of one model. Raises ``UnknownNameError`` for a word that is no id, and a path of its own."""
    return f"/api/models/{segment(_an_id(model_id))}"


def server_path(model_id: str, verb: str) -> str:
    """Return the path that starts, stops or restarts a model's server. Raises as ``model_path`` does."""
    return f"/api/models/servers/{segment(_an_id(model_id))}/{verb}"


def profile_path(name: str) -> str:
    """Return the path of one profile. Raises ``UnknownNameError`` for a word that is none, and a path of its own."""
    if name in {"", ACTIVE_PROFILE}:
        raise UnknownNameError(
            404,
            "ProfileNotFound",
            f"no profile is called {name!r}; the names are in: magictl profile list",
            {"profileName": name},
        )
    return f"/api/models/profiles/{segment(name)}"


def no_such_model(model_id: str) -> UnknownNameError:
    """Return the exception for an id that no model has, as the agent says it."""
    return UnknownNameError(404, "ModelNotFound", f"no model has the id {model_id!r}", {"modelId": model_id})


def _an_id(model_id: str) -> str:
    if not model_id or model_id in RESERVED_IDS:
        raise no_such_model(model_id)
    return model_id


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
    message = str(body.get("message") or f"the agent answered with HTTP status {reply.status}")
    if kind == "Unauthorized" and "token" in message:
        message = f"{message}; magictl sends the token in the file that --token-file or MAGI_TOKEN_FILE names"
    return error(
        reply.status,
        kind,
        message,
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
        except BaseException:  # Ctrl-C too; it goes on its way
            channel.close()
            raise
        self.sock = channel


def _connection(address: Address, timeout: float) -> http.client.HTTPConnection:
    if isinstance(address, SocketAddress):
        return _UnixConnection(address.path, timeout)
    if address.secure:
        return http.client.HTTPSConnection(address.host, address.port, timeout=timeout)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def _unreachable(address: Address, error: OSError | http.client.HTTPException) -> UnreachableError:
    """Say what stands between us and the agent, and what to do about it."""
    reason, sentence = _obstacle(address, error)
    return UnreachableError(sentence, {"address": str(address), "reason": reason})


def _obstacle(address: Address, error: OSError | http.client.HTTPException) -> tuple[str, str]:
    if isinstance(error, http.client.IncompleteRead):
        return "broken", f"the answer from {address} broke off; did the agent stop just now? {_IS_IT_UP}"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        return "protocol", f"what answers at {address} speaks no HTTP: {str(error) or type(error).__name__}"
    if isinstance(error, ssl.SSLCertVerificationError):
        # Its errno is 1, which is no EPERM.
        advice = "for an authority of your own set SSL_CERT_FILE"
        return "certificate", f"the certificate of {address} is not trusted: {error.verify_message}; {advice}"
    if isinstance(error, ssl.SSLError):
        return "tls", f"no TLS with {address}: {error.reason or error.strerror}; is it http:// after all?"
    if error.errno in {errno.EACCES, errno.EPERM} and isinstance(address, SocketAddress):
        advice = 'members of the group magi may (sudo usermod -aG magi "$USER", then log in again)'
        return "permission", f"no permission to use {address}; {advice}"
    if error.errno == errno.ENOENT:
        return "missing", f"there is no socket at {address}; {_IS_IT_UP}"
    if error.errno == errno.ECONNREFUSED:
        return "refused", f"nobody listens at {address}; {_IS_IT_UP}"
    said = error.strerror or str(error) or type(error).__name__
    return "connection", f"no answer from {address}: {said}; {_IS_IT_UP}"
