"""One connection to a message bus, in plain Python values.

This is the only module that imports dbus-next. It adds what dbus-next 0.2.3 lacks: a time limit on every call,
an error instead of endless waiting once the connection is gone, sockets that are closed, a bound on the calls in
flight, patience where the socket's buffer is full (its writer gives up the whole connection then), and a check of the
answer to ``Hello``.

Values: D-Bus strings, numbers and booleans are Python's; arrays and structs are lists, ``ay`` is bytes, dictionaries
are dicts. Variants that arrive are unwrapped; where a signature asks for one, give ``(signature, value)``.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from dbus_next.aio import MessageBus
from dbus_next.constants import MessageType
from dbus_next.errors import AuthError, InvalidAddressError, InvalidSignatureError, SignatureBodyMismatchError
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, Variant

from magi_agent.systemd.errors import BusDisconnected, BusTimeout, call_error
from magi_agent.vocabulary import Scope

CALLS_IN_FLIGHT: Final = 8
CALL_TIMEOUT: Final = 25.0
CONNECT_TIMEOUT: Final = 5.0
DBUS_NAME: Final = "org.freedesktop.DBus"
DBUS_PATH: Final = "/org/freedesktop/DBus"
_MAX_AUTH_LINE: Final = 4096

Reply = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal as it arrived. ``sender`` is the unique name that the bus itself filled in."""

    sender: str
    path: str
    interface: str
    member: str
    body: Reply


@dataclass(slots=True)
class _Pending:
    future: asyncio.Future[Reply]
    at_reply: Callable[[Reply], None] | None


def address_of(scope: Scope, environment: Mapping[str, str] | None = None) -> str:
    """Return the D-Bus address where ``scope``'s systemd manager answers.

    The private sockets of systemd are no choice: they speak D-Bus without a bus, which dbus-next does not.
    """
    env = os.environ if environment is None else environment
    if scope is Scope.SYSTEM:
        return env.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
    runtime = env.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return env.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path={Path(runtime) / 'bus'}"


class Bus:
    """A connection to a message bus. It is used once: after its end, make a new one."""

    def __init__(self, connection: "_Connection") -> None:
        self._connection = connection
        self._pending: dict[int, _Pending] = {}
        self._slots = asyncio.Semaphore(CALLS_IN_FLIGHT)
        self._handler: Callable[[Signal], None] | None = None
        self._end: BusDisconnected | None = None
        self._failure: Exception | None = None
        self._at_end: Callable[[], None] | None = None
        connection.at_end = self._finish
        connection.add_message_handler(self._take)

    @classmethod
    async def connect(cls, scope: Scope, *, address: str | None = None, limit: float = CONNECT_TIMEOUT) -> Self:
        """Connect to the bus of ``scope``, or to ``address``.

        Raises ``BusDisconnected`` when nothing answers there, ``BusTimeout`` when the answer takes longer than
        ``limit`` seconds.
        """
        where = address or address_of(scope)
        try:
            connection = _Connection(bus_address=where)
        except (OSError, InvalidAddressError) as error:
            raise BusDisconnected(f"no message bus at {where}: {error}") from error
        try:
            async with asyncio.timeout(limit):
                await connection.connect()
        except TimeoutError as error:
            connection.abandon()
            raise BusTimeout(f"the message bus at {where} did not answer within {limit:g} s") from error
        except (OSError, EOFError, AuthError, UnicodeDecodeError, ValueError) as error:
            connection.abandon()
            raise BusDisconnected(f"the message bus at {where} ended the connection: {error}") from error
        except BaseException:  # a cancelled attempt leaves no socket either; it goes on its way
            connection.abandon()
            raise
        # dbus-next takes any answer to Hello, an error's text too, for its unique name.
        if not str(connection.unique_name).startswith(":"):
            connection.abandon()
            raise BusDisconnected(f"the bus at {where} refused: {connection.unique_name}")
        return cls(connection)

    @property
    def unique_name(self) -> str:
        """This connection's own name on the bus, like ``:1.42``."""
        return str(self._connection.unique_name)

    @property
    def connected(self) -> bool:
        """Whether the connection is up, as far as is known."""
        return self._end is None

    def on_signal(self, handler: Callable[[Signal], None]) -> None:
        """Hand every signal to ``handler``, in the order of arrival, from the event loop.

        An exception out of it ends the connection: whoever missed a signal must read everything again.
        """
        self._handler = handler

    async def add_match(self, rule: str) -> None:
        """Ask the bus to deliver the signals that fit ``rule`` (D-Bus match rule syntax)."""
        await self.call(DBUS_NAME, DBUS_PATH, DBUS_NAME, "AddMatch", "s", rule)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *arguments: object,
        limit: float = CALL_TIMEOUT,
        at_reply: Callable[[Reply], None] | None = None,
    ) -> Reply:
        """Call a method and return the values of its answer.

        ``at_reply`` runs at the moment the answer arrives, before any message that came after it is handled: that is
        where an answer is put in order with signals. The wait for a free slot counts into ``limit`` (seconds).

        Raises ``BusCallFailed`` (or one of its kinds) for an error answer, ``BusTimeout``, ``BusDisconnected``, and
        ``ValueError`` for arguments that do not fit the signature.
        """
        try:
            body = [_built(kind, value) for kind, value in _pairs(signature, arguments)]
        except (InvalidSignatureError, SignatureBodyMismatchError) as error:
            raise ValueError(f"{member}: {error}") from error
        try:
            async with asyncio.timeout(limit), self._slots:
                return await self._exchange(destination, path, interface, member, signature, body, at_reply)
        except TimeoutError as error:
            raise BusTimeout(f"{member} was not answered within {limit:g} s") from error

    def on_end(self, handler: Callable[[], None]) -> None:
        """Call ``handler`` once, when the connection is gone; at once if it is already."""
        if self._end is not None:
            handler()
        else:
            self._at_end = handler

    def raise_if_ended(self) -> None:
        """Raise ``BusDisconnected`` if the connection is gone, or the exception of the handler that ended it."""
        if self._failure is not None:
            raise self._failure
        if self._end is not None:
            raise self._end

    def close(self) -> None:
        """End the connection; calls in flight fail with ``BusDisconnected``. Closing twice does no harm."""
        self._connection.abandon()

    async def _exchange(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[object],
        at_reply: Callable[[Reply], None] | None,
    ) -> Reply:
        if self._end is not None:
            raise BusDisconnected(self._end.message)
        serial = self._connection.next_serial()
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body,
            serial=serial,
        )
        pending = _Pending(asyncio.get_running_loop().create_future(), at_reply)
        self._pending[serial] = pending
        try:
            # The answer is what we wait for; a failed write ends the connection, and that fails the pending call.
            self._connection.send(message).add_done_callback(_retrieve)
            return await pending.future
        except SignatureBodyMismatchError as error:
            raise ValueError(f"{member}: {error}") from error
        finally:
            self._pending.pop(serial, None)

    def _take(self, message: Any) -> bool:
        """Handle one message; true means that dbus-next has nothing left to do with it."""
        kind = message.message_type
        if kind is MessageType.METHOD_CALL:
            return False
        try:
            if kind is MessageType.SIGNAL:
                self._signal(message)
            else:
                self._reply(message)
        except Exception as error:  # noqa: BLE001  # see below
            # The top of everything that runs on a message. dbus-next would log it and go on without the message.
            self._failure = error
            self._connection.abandon(error)
        return True

    def _signal(self, message: Any) -> None:
        if self._handler is not None:
            body = tuple(_plain(value) for value in message.body)
            self._handler(Signal(message.sender or "", message.path, message.interface, message.member, body))

    def _reply(self, message: Any) -> None:
        pending = self._pending.pop(message.reply_serial, None)
        if pending is None or pending.future.done():
            return
        body = tuple(_plain(value) for value in message.body)
        if message.message_type is MessageType.ERROR:
            text = body[0] if body and isinstance(body[0], str) else ""
            pending.future.set_exception(call_error(str(message.error_name), text))
            return
        try:
            if pending.at_reply is not None:
                pending.at_reply(body)
        except BaseException:  # whatever it was, who waits for the answer is told; it goes on its way
            self._pending[message.reply_serial] = pending
            raise
        pending.future.set_result(body)

    def _finish(self, error: BaseException | None) -> None:
        """Let everyone who waits for this connection know that it is gone."""
        if self._end is not None:
            return
        reason = f": {error!r}" if error is not None and not isinstance(error, EOFError) else ""
        self._end = BusDisconnected(f"the connection to the message bus ended{reason}")
        if error is not None:
            self._end.__cause__ = error
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(BusDisconnected(self._end.message))
        self._pending.clear()
        self._handler = None
        if self._at_end is not None:
            self._at_end()


class _Connection(MessageBus):  # type: ignore[misc]
    """dbus-next's connection, which closes its socket and does not wait for the dead."""

    at_end: Callable[[BaseException | None], None] | None = None

    def __init__(self, bus_address: str) -> None:
        super().__init__(bus_address=bus_address)
        self._writer.sock = _PatientSender(self._sock)

    def _setup_socket(self) -> None:
        try:
            super()._setup_socket()
        except BaseException:  # a cancelled attempt leaves no socket either; it goes on its way
            self._close_socket()
            raise

    async def _auth_readline(self) -> str:
        # The original reads again and again, without ever yielding to the loop, once the other side has closed.
        line = b""
        while not line.endswith(b"\r\n"):
            chunk = await self._loop.sock_recv(self._sock, 1)
            if not chunk or len(line) > _MAX_AUTH_LINE:
                raise EOFError("the bus closed the connection during authentication")
            line += chunk
        return line[:-2].decode()

    def disconnect(self) -> None:
        """Shut the socket down, quietly where the other side was first."""
        self._user_disconnect = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(2)

    def abandon(self, error: BaseException | None = None) -> None:
        """End the connection now, because of ``error`` if there was one."""
        self._finalize(error)

    def _finalize(self, err: BaseException | None = None) -> None:
        super()._finalize(err)
        if self._disconnect_future.done() and not self._disconnect_future.cancelled():
            # Somebody must have looked at it, or asyncio logs the end of the connection as a lost exception.
            self._disconnect_future.exception()
        self._close_socket()
        if self.at_end is not None:
            self.at_end(err)

    def _close_socket(self) -> None:
        stream, sock = getattr(self, "_stream", None), getattr(self, "_sock", None)
        for closing in (stream, sock):
            if closing is not None:
                with contextlib.suppress(OSError, ValueError):
                    closing.close()


class _PatientSender:
    """The sending side of a socket: what does not fit into its buffer now is sent when there is room."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, data: memoryview) -> int:
        """Return how many bytes were taken; none of them while the buffer is full."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0


def _retrieve(future: "asyncio.Future[None]") -> None:
    if not future.cancelled():
        future.exception()


def _plain(value: Any) -> object:
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _pairs(signature: str, arguments: tuple[object, ...]) -> list[tuple[Any, object]]:
    kinds = SignatureTree(signature).types
    if len(kinds) != len(arguments):
        raise ValueError(f"signature {signature!r} takes {len(kinds)} arguments, not {len(arguments)}")
    return list(zip(kinds, arguments, strict=True))


def _built(kind: Any, value: Any) -> object:
    """Return ``value`` as dbus-next wants it for the type ``kind``: variants made, containers as lists and dicts."""
    match kind.token:
        case "v":
            inner, content = value
            return Variant(inner, _built(SignatureTree(inner).types[0], content))
        case "a":
            return _built_array(kind.children[0], value)
        case "(":
            if len(kind.children) != len(value):
                raise ValueError(f"{kind.signature} takes {len(kind.children)} members, not {len(value)}")
            return [_built(child, item) for child, item in zip(kind.children, value, strict=True)]
        case _:
            return _checked(value)


def _checked(value: object) -> object:
    if isinstance(value, str) and "\0" in value:
        # The bus drops a connection that sends one.
        raise ValueError("a D-Bus string cannot hold a NUL character")
    return value


def _built_array(item_kind: Any, value: Any) -> object:
    match item_kind.token:
        case "y":
            return bytes(value)
        case "{":
            key, item = item_kind.children
            return {_built(key, k): _built(item, v) for k, v in value.items()}
        case _:
            return [_built(item_kind, item) for item in value]
