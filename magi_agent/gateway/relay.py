"""Passing one request on to a server, and its answer back as it comes.

Nothing of the answer is looked into as it passes; of its last pieces, the tally makes what they say of tokens. When
the client leaves, the server's connection is cut, by which llama-server ends what it generates for it; when the server
breaks off, so is the client's: nobody takes half an answer for a whole one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Self

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from magi_agent.errors import MagiError
from magi_agent.gateway.model_use import ModelUse
from magi_agent.gateway.openai_errors import error_event
from magi_agent.gateway.tallies import Tally
from magi_agent.request_id import REQUEST_ID
from magi_agent.servers.connections import ServerConnections
from magi_agent.servers.http_exchange import Exchange, ExchangeError, NotConnected
from magi_agent.servers.reach import Reach

_LOG: Final = logging.getLogger(__name__)
SSE: Final = "text/event-stream"
_SHORT: Final = 64 * 1024
# RFC 9110, 7.6.1: what is between two neighbours only. Of the rest, the caller's rights are the agent's business, and
# which pages may read an answer is as well.
_NOT_ASKED: Final = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect", "authorization", "x-api-key", "cookie",
    "origin", "referer", "forwarded", "x-request-id", "accept-encoding",
})  # fmt: skip
_NOT_ANSWERED: Final = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer", "transfer-encoding",
    "upgrade", "server", "date", "content-length", "set-cookie", "x-request-id", "vary",
})  # fmt: skip
_CORS: Final = "access-control-"


class ServerFailed(MagiError):
    """The model's server gave no answer that can be passed on."""

    error = "ServerFailed"
    status = 502


class ServerEnded(ServerFailed):
    """The model's server ended the connection and gave no answer: it may have ended itself."""


class ServerUnreachable(ServerFailed):
    """Nobody takes connections at the model's server: nothing of the request was passed on."""


class ServerSilent(MagiError):
    """The model's server said nothing for longer than it may."""

    error = "ServerSilent"
    status = 504


class ServerAnswer:
    """A server's answer, of which the headers are there. It is to be closed, whatever becomes of it."""

    def __init__(self, answer: Exchange, model_id: str, tally: Tally) -> None:
        self.headers = answer.headers
        self.status = answer.status
        self.reason = answer.reason
        self.length = answer.length
        self.is_stream = answer.content_type == SSE
        self._answer = answer
        self._use: ModelUse | None = None
        self._model_id = model_id
        self._tally = tally
        tally.answered(answer.status, is_stream=self.is_stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the server, which ends what it generates, where it is not through."""
        self._answer.close()
        use, self._use = self._use, None
        if use is not None:
            use.end()

    def hold(self, use: ModelUse) -> None:
        """Have the use of the model end with the answer."""
        self._use = use

    def first_said(self) -> bytes:
        """What of the answer is there already, without waiting for it. It is not poured any more."""
        return self._answer.piece_there()

    async def pour_into(self, sink: web.StreamResponse, request: web.BaseRequest, first: bytes = b"") -> None:
        """Pass on ``first``, and all that the server says. Where it breaks off, so does the client's connection."""
        try:
            answer = self._answer
            is_chunked = sink.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"
            piece = first or await answer.next_piece()
            while piece:
                self._tally.keep(piece)
                # The last piece and the mark of the end go out together, where the end is known by then.
                await (sink.write_eof(piece) if answer.is_through else sink.write(piece))
                transport = request.transport if is_chunked else None
                if transport is not None and not transport.get_write_buffer_size():
                    await answer.pour(partial(self._passed, transport))
                piece = await answer.next_piece()
            self._tally.whole()
        except (ExchangeError, TimeoutError) as error:
            if request.transport is not None and not request.transport.is_closing():
                self._tally.broken()
            reason = "said nothing any more" if isinstance(error, TimeoutError) else "broke off"
            message = f"the server of {self._model_id} {reason} in the middle of its answer"
            _LOG.warning("%s", message, extra={"magi_request_id": REQUEST_ID.get(), "magi_model": self._model_id})
            with contextlib.suppress(ConnectionError):
                if self.is_stream and sink.content_length is None:
                    await sink.write(error_event(request.path, ServerFailed.status, ServerFailed.error, message))
            # Without the mark of its end, nobody takes it for whole.
            if request.transport is not None:
                request.transport.close()

    def _passed(self, transport: asyncio.WriteTransport, piece: bytes) -> bool:
        """Pass a piece on as a chunk, and tell whether the next one may follow without the client being waited for."""
        if transport.is_closing():
            return False
        self._tally.keep(piece)
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return not transport.get_write_buffer_size()

    async def next_piece(self) -> bytes:
        """What the server says next, as it came; empty where that was all. Raises ``ServerFailed``."""
        try:
            piece = await self._answer.next_piece()
        except (ExchangeError, TimeoutError):
            self._tally.broken()
            raise ServerFailed(f"the server of {self._model_id} broke off", {"modelId": self._model_id}) from None
        if piece:
            self._tally.keep(piece)
        else:
            self._tally.whole()
        return piece

    async def read(self) -> bytes:
        """The whole of a short answer; of one that is longer, nothing. Raises ``ServerFailed``."""
        try:
            said = await self._answer.read(_SHORT) or b""
        except (ExchangeError, TimeoutError):
            self._tally.broken()
            raise ServerFailed(f"the server of {self._model_id} broke off", {"modelId": self._model_id}) from None
        self._tally.keep(said)
        self._tally.whole()
        return said


class Relay:
    """Passes requests on."""

    def __init__(self, connections: ServerConnections, longest_silence: Callable[[], float]) -> None:
        """``longest_silence``: seconds for which a server may say nothing at all."""
        self._connections = connections
        self._longest_silence = longest_silence

    async def pass_on(
        self, request: web.Request, model_id: str, reach: Reach, path: str, body: bytes | None, tally: Tally
    ) -> ServerAnswer:
        """The server's answer to ``request``, asked as ``path`` and with ``body``; its rest is still to come.

        Raises ``ServerFailed``, ``ServerSilent``.
        """
        silence = self._longest_silence()
        try:
            answer = await self._connections.ask(
                reach,
                request.method,
                path,
                silence=silence,
                headers=_asked_headers(request),
                body=body,
                kept_open=True,
            )
        except TimeoutError:
            raise ServerSilent(
                f"the server of {model_id} said nothing for {silence:g} seconds", {"modelId": model_id}
            ) from None
        except (ExchangeError, OSError) as error:
            raise _failure(error)(
                f"the server of {model_id} gave no answer ({error}): magictl show {model_id} says what is wrong "
                "with it",
                {"modelId": model_id},
            ) from None
        return ServerAnswer(answer, model_id, tally)


class RelayedAnswer(web.StreamResponse):
    """What the client gets: the server's answer, which is passed on once our headers are complete."""

    def __init__(self, answer: ServerAnswer) -> None:
        super().__init__(status=answer.status, reason=answer.reason, headers=_answered_headers(answer.headers))
        self._answer = answer
        if answer.length is not None:
            self.content_length = answer.length
        if answer.is_stream:
            self.headers["X-Accel-Buffering"] = "no"

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the headers, and all that the server says."""
        if self.prepared:
            return await super().prepare(request)
        with self._answer:
            first = self._answer.first_said()
            # What is there goes out together with the headers; they wait for nothing else.
            self._send_headers_immediately = not first
            writer = await super().prepare(request)
            await self._answer.pour_into(self, request, first)
        return writer


def _failure(error: Exception) -> type[ServerFailed]:
    match error:
        case NotConnected():
            return ServerUnreachable
        case ExchangeError():
            return ServerEnded
        case _:
            return ServerFailed


def _asked_headers(request: web.Request) -> dict[str, str]:
    passed = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_ASKED}
    return passed | {"X-Request-ID": REQUEST_ID.get() or ""}


def _answered_headers(headers: CIMultiDict[str]) -> Mapping[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if (lower := name.lower()) not in _NOT_ANSWERED and not lower.startswith(_CORS)
    }
