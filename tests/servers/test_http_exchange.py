"""Questions over HTTP/1.1 and what servers make of them, well-behaved or not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magi_agent.servers.http_exchange import (
    BrokenOff,
    Exchange,
    ExchangeError,
    NotConnected,
    NothingSaid,
    question,
)
from magi_agent.servers.reach import AtPort
from magi_agent.servers.server_connection import ServerConnection, connected
from magi_agent.servers.silence import SilenceWatch

SECONDS = 10.0
HERE = AtPort("127.0.0.1", 1)
OK = b"HTTP/1.1 200 OK\r\n"
END = b"end"
"""Ends the connection, where a server is to say several things."""

Speak = Callable[..., Awaitable[Exchange]]
GiveBack = Callable[[ServerConnection | None], None]


def head(target: str = "/x", **headers: str) -> bytes:
    return question(HERE, "GET", target, headers, None, is_last=False)


@pytest.fixture
async def speak() -> AsyncIterator[Speak]:
    """Asks a server that says these pieces, each by itself, and gives the answer once its head is there."""
    exchanges: list[Exchange] = []
    writers: list[asyncio.StreamWriter] = []
    servers: list[asyncio.Server] = []

    async def make(
        *pieces: bytes, give_back: Callable[[ServerConnection | None], None] | None = None, **how: bool
    ) -> Exchange:
        async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                if piece == END:
                    writer.close()
                else:
                    writer.write(piece)
                    await writer.drain()
                await asyncio.sleep(0.01)

        server = await asyncio.start_server(say, "127.0.0.1", 0)
        servers.append(server)
        reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
        exchange = Exchange(await connected(reach), SilenceWatch(), SECONDS, give_back)
        exchanges.append(exchange)
        await exchange.ask(head(), None, **how)
        return exchange

    yield make
    for exchange in exchanges:
        exchange.close()
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    for server in servers:
        server.close()
        await server.wait_closed()


async def everything(exchange: Exchange) -> bytes:
    body = await exchange.read(1 << 20)
    assert body is not None
    return body


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([OK + b"Content-Length: 4\r\n\r\nwhat"], b"what"),
        ([OK + b"Content-Length: 0\r\n\r\n"], b""),
        ([OK + b"Content-Length: 4\r\n\r\n", b"w", b"hat"], b"what"),
        ([OK[:9], OK[9:] + b"Content-Le", b"ngth: 4\r\n\r\nwhat"], b"what"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nwh\r\n", b"2\r\nat\r", b"\n0\r\n\r\n"], b"what"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Late: 1\r\n\r\n"], b""),
        ([OK + b"Connection: close\r\n\r\nwh", b"at", END], b"what"),
        ([b"HTTP/1.0 200 OK\r\n\r\nwhat", END], b"what"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n" + OK + b"Content-Length: 4\r\n\r\nwhat"], b"what"),
        ([b"HTTP/1.1 103 Early Hints\r\nX: 1\r\n\r\n", OK + b"Content-Length: 4\r\n\r\nwhat"], b"what"),
    ],
)
async def test_answers_in_every_form(speak: Speak, pieces: list[bytes], body: bytes) -> None:
    exchange = await speak(*pieces)

    assert await everything(exchange) == body
    assert exchange.is_through
    assert await exchange.next_piece() == b""
    assert "X" not in exchange.headers
    assert exchange.status in {200, 204}


async def test_a_head_is_what_the_server_said(speak: Speak) -> None:
    exchange = await speak(
        b"HTTP/1.1 418 I'm a teapot\r\nA: 1\r\na: 2\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n"
        b"Odd: \xff\xc3\xa9\r\nContent-Length: 3\r\n\r\nabc"
    )

    assert (exchange.status, exchange.reason) == (418, "I'm a teapot")
    assert exchange.headers.getall("A") == ["1", "2"]
    assert exchange.headers["Odd"].encode("utf-8", "surrogateescape") == b"\xff\xc3\xa9"
    assert exchange.content_type == "text/event-stream"
    assert exchange.length == 3


async def test_a_head_alone_has_no_body(speak: Speak) -> None:
    exchange = await speak(OK + b"Content-Length: 4\r\n\r\n", has_no_body=True)

    assert exchange.length == 4
    assert await everything(exchange) == b""


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([END], NothingSaid),
        ([b"HTTP/1.1 20", END], BrokenOff),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], BrokenOff),
        ([b"\x00" * 100], BrokenOff),
        ([OK + b"Content-Length: x\r\n\r\n"], BrokenOff),
        ([OK + b"Content-Length: 99999999999999999999999\r\n\r\n"], BrokenOff),
        ([OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"], BrokenOff),
        ([OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"], BrokenOff),
        ([OK + b"A: b\rc\r\n\r\n"], BrokenOff),
        ([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"], BrokenOff),
        ([OK, *([b"A: " + b"b" * 10_000 + b"\r\n"] * 10)], BrokenOff),
        ([*([b"HTTP/1.1 100 Continue\r\n\r\n" * 400] * 10)], BrokenOff),
    ],
)
async def test_what_is_no_answer(speak: Speak, pieces: list[bytes], error: type[ExchangeError]) -> None:
    with pytest.raises(error):
        await speak(*pieces)


@pytest.mark.parametrize(
    "pieces",
    [
        [OK + b"Content-Length: 4\r\n\r\nwh", END],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nwhat\r\n", END],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nwhat\r\n", b"no number\r\n"],
    ],
)
async def test_what_breaks_off_is_not_whole(speak: Speak, pieces: list[bytes]) -> None:
    exchange = await speak(*pieces)

    for _ in range(2):
        with pytest.raises(BrokenOff):
            await everything(exchange)
    assert exchange.piece_there() == b""
    assert not exchange.is_through


async def test_a_reset_is_no_end_of_an_answer_that_ends_with_the_connection() -> None:
    is_reset = asyncio.Event()

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"\r\nwh")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        is_reset.set()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
        with Exchange(await connected(reach), SilenceWatch(), SECONDS) as exchange:
            await exchange.ask(head(), None)
            assert await exchange.next_piece() == b"wh"
            await is_reset.wait()
            assert exchange.piece_there() == b""
            for _ in range(2):
                with pytest.raises(BrokenOff):
                    await exchange.next_piece()


@pytest.mark.parametrize(
    ("pieces", "is_given_back"),
    [
        ([OK + b"Content-Length: 4\r\n\r\nwhat"], True),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nwhat\r\n0\r\n\r\n"], False),
        ([OK + b"Content-Length: 4\r\nConnection: close\r\n\r\nwhat"], False),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nwhat"], False),
        ([OK + b"\r\nwhat", END], False),
        ([OK + b"Content-Length: 4\r\n\r\nwhat" + OK], False),
        ([OK + b"Content-Length: 4\r\n\r\nwhat" + OK + b"Content-Length: 4\r\n\r\nelse"], False),
        ([OK + b"Content-Length: 4\r\n\r\nwhatever"], False),
    ],
)
async def test_a_connection_is_used_again_where_nothing_else_is_on_it(
    speak: Speak, pieces: list[bytes], is_given_back: bool
) -> None:
    given: list[ServerConnection | None] = []
    exchange = await speak(*pieces, give_back=given.append)
    assert await everything(exchange) == b"what"
    exchange.close()
    exchange.close()

    # Either way it is told, once, that the answer was whole.
    (connection,) = given
    assert (connection is not None) is is_given_back
    if connection is not None:
        assert connection.is_quiet
        connection.close()


async def test_a_connection_is_not_used_again_with_an_answer_on_its_way(speak: Speak) -> None:
    given: list[ServerConnection | None] = []
    exchange = await speak(OK + b"Content-Length: 4\r\n\r\nwh", give_back=given.append)
    assert await exchange.next_piece() == b"wh"
    exchange.close()

    assert given == []


async def test_who_waits_as_it_is_closed_is_told(speak: Speak) -> None:
    exchange = await speak(OK + b"Content-Length: 4\r\n\r\nwh")
    assert await exchange.next_piece() == b"wh"
    waiting = asyncio.create_task(exchange.next_piece())
    await asyncio.sleep(0.02)
    exchange.close()

    with pytest.raises(BrokenOff):
        await asyncio.wait_for(waiting, 2)


async def test_a_long_body_is_not_read(speak: Speak) -> None:
    exchange = await speak(OK + b"Content-Length: 4\r\n\r\nwhat")

    assert await exchange.read(3) is None


async def test_silence_has_an_end(speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.servers.test_http_exchange.SECONDS", 0.05)
        with pytest.raises(TimeoutError):
            await speak()
        exchange = await speak(OK + b"Content-Length: 4\r\n\r\nwh")
    assert await exchange.next_piece() == b"wh"
    with pytest.raises(TimeoutError):
        await exchange.next_piece()


@pytest.mark.parametrize("is_busy", [False, True], ids=["waiting", "busy"])
async def test_what_was_said_before_is_no_part_of_a_silence(is_busy: bool) -> None:
    """One timer serves many waits: none of them ends too early for those before, nor much too late."""
    said = b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n"
    silence = 0.3
    is_over = asyncio.Event()

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + said)
        for _ in range(5):
            await asyncio.sleep(silence / 2)
            writer.write(b"1\r\nx\r\n")
        await reader.read()
        writer.close()
        is_over.set()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
        with Exchange(await connected(reach), SilenceWatch(), silence) as exchange:
            await exchange.ask(head(), None)
            for _ in range(6):
                assert await exchange.next_piece() == b"x"
            if is_busy:
                # With something else: that is no waiting.
                await asyncio.sleep(silence * 1.5)
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(TimeoutError):
                await exchange.next_piece()
            assert silence * 0.9 < loop.time() - began < silence * 3
        await asyncio.wait_for(is_over.wait(), 2)


def not_expected(piece: bytes) -> bool:
    pytest.fail(f"{piece!r} is taken")


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


async def test_what_is_poured_is_taken_as_it_comes_but_for_the_last_piece(speak: Speak) -> None:
    exchange = await speak(CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n1\r\nc\r\n", b"2\r", b"\nde", b"\r\n1\r\nf\r\n0\r\n\r\n")
    taken: list[bytes] = []

    await asyncio.wait_for(exchange.pour(lambda piece: not taken.append(piece)), 5)  # type: ignore[func-returns-value]

    assert taken == [b"a", b"bc", b"de"]
    assert await exchange.next_piece() == b"f"
    assert exchange.is_through
    await exchange.pour(not_expected)
    assert await exchange.next_piece() == b""


async def test_pouring_ends_with_the_piece_after_which_no_more_is_taken(speak: Speak) -> None:
    exchange = await speak(CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", b"1\r\nc\r\n", b"0\r\n\r\n")
    taken: list[bytes] = []

    def take(piece: bytes) -> bool:
        taken.append(piece)
        return piece != b"b"

    await asyncio.wait_for(exchange.pour(take), 5)
    await asyncio.sleep(0.1)
    assert taken == [b"a", b"b"]
    assert await exchange.next_piece() == b"c"
    assert await exchange.next_piece() == b""


async def test_what_is_there_already_is_not_poured(speak: Speak) -> None:
    exchange = await speak(CHUNKED + b"1\r\na\r\n", b"0\r\n\r\n")
    await exchange.pour(not_expected)

    assert await exchange.next_piece() == b"a"


async def test_where_the_server_breaks_off_or_is_silent_who_pours_is_told(speak: Speak) -> None:
    taken: list[bytes] = []

    def take(piece: bytes) -> bool:
        taken.append(piece)
        return True

    exchange = await speak(CHUNKED, b"1\r\na\r\n", END)
    with pytest.raises(BrokenOff):
        await exchange.pour(take)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.servers.test_http_exchange.SECONDS", 0.8)
        exchange = await speak(CHUNKED, *[b"1\r\nx\r\n"] * 100)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        await exchange.pour(take)

    # Each piece began the silence anew: a hundred of them, a hundredth of a second apart.
    assert taken == [b"a", *[b"x"] * 100]
    assert 1.6 < loop.time() - began < 6


async def test_what_goes_wrong_in_taking_is_for_who_pours(speak: Speak) -> None:
    exchange = await speak(CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", b"0\r\n\r\n")

    def take(_: bytes) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await exchange.pour(take)
    assert await exchange.next_piece() == b"b"


async def test_pouring_that_is_given_up_takes_no_more(speak: Speak) -> None:
    exchange = await speak(CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", *[b""] * 30, b"1\r\nc\r\n", b"0\r\n\r\n")
    taken: list[bytes] = []
    pouring = asyncio.create_task(exchange.pour(lambda piece: not taken.append(piece)))  # type: ignore[func-returns-value]
    async with asyncio.timeout(5):
        while len(taken) < 2:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.001)
    pouring.cancel()
    await asyncio.gather(pouring, return_exceptions=True)

    before = list(taken)
    assert before == [b"a", b"b"]
    await asyncio.sleep(0.5)
    assert taken == before
    assert await exchange.next_piece() == b"c"


async def test_where_nobody_reads_the_server_cannot_write_on() -> None:
    piece, written = b"x" * (1 << 16), 0
    length = 512 * len(piece)
    is_over = asyncio.Event()

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % length)
        while written < length:
            writer.write(piece)
            await writer.drain()
            written += len(piece)
        writer.close()
        is_over.set()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
        with Exchange(await connected(reach), SilenceWatch(), SECONDS) as exchange:
            await exchange.ask(head(), None)
            got = len(await exchange.next_piece())
            before = -1
            while before != written:
                before = written
                await asyncio.sleep(0.1)
            # Some of it is in the kernel's hands.
            assert got <= 1 << 17
            assert written < length // 2
            while more := await exchange.next_piece():
                got += len(more)
            assert got == length
        await asyncio.wait_for(is_over.wait(), 2)


async def test_a_large_body_goes_through_and_an_early_answer_counts() -> None:
    body = b"x" * (20 << 20)
    got = 0
    is_over = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal got
        asked = await reader.readuntil(b"\r\n\r\n")
        while b"/all" in asked and got < len(body):
            got += len(await reader.read(1 << 16))
        if b"/never" in asked:
            await is_over.wait()
        writer.write(OK + b"Content-Length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])

        async def ask(target: str, silence: float) -> bytes:
            with Exchange(await connected(reach), SilenceWatch(), silence) as exchange:
                await exchange.ask(question(reach, "POST", target, {}, len(body), is_last=True), body)
                return await everything(exchange)

        assert await ask("/all", SECONDS) == b"ok"
        assert got == len(body)
        with contextlib.suppress(NothingSaid):  # where the kernel drops what came before the connection was reset
            assert await ask("/early", SECONDS) == b"ok"
        with pytest.raises(TimeoutError):
            await ask("/never", 0.2)
        is_over.set()


async def test_nobody_is_there(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        connection = await connected(AtPort("127.0.0.1", unused.getsockname()[1]))
        with (
            pytest.raises(NotConnected, match="Connection refused") as refused,
            Exchange(connection, SilenceWatch(), SECONDS) as asking,
        ):
            await asking.ask(head(), None)
    assert not refused.value.is_forbidden


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/x y", {}),
        ("/x\r\nA: b", {}),
        ("x", {}),
        ("/x", {"A": "b\r\nC: d"}),
        ("/x", {"A": "b\nC: d"}),
        ("/x", {"A": "b\rC: d"}),
        ("/x", {"A": "b\0"}),
        ("/x", {"A\r\nB": "c"}),
    ],
)
def test_what_would_be_more_than_one_question_is_not_asked(target: str, headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is no path|more than one line"):
        question(HERE, "GET", target, headers, None, is_last=False)


def test_a_question_is_what_was_meant() -> None:
    asked = question(AtPort("::1", 80), "POST", "/x?y=%0a\udcff", {"A": "\udcff", "B": "é"}, 3, is_last=True)

    assert asked == (
        b"POST /x?y=%0a\xff HTTP/1.1\r\nHost: [::1]:80\r\nA: \xff\r\nB: \xc3\xa9\r\nContent-Length: 3\r\n"
        b"Connection: close\r\n\r\n"
    )


async def test_who_leaves_is_gone_at_once() -> None:
    """Cancelled while it waits, an exchange leaves nothing behind in the event loop, and the server sees its end."""
    is_gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        is_gone.set()
        writer.close()

    async with await asyncio.start_server(wait, "127.0.0.1", 0) as server:
        reach = AtPort("127.0.0.1", server.sockets[0].getsockname()[1])
        connection = await connected(reach)
        descriptor = connection._socket.fileno()

        silences = SilenceWatch()

        async def ask() -> None:
            with Exchange(connection, silences, SECONDS) as exchange:
                await exchange.ask(head(), None)

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not asyncio.get_running_loop().remove_reader(descriptor)
        assert not silences._waiting
        await asyncio.wait_for(is_gone.wait(), 1)


ANSWERS = [
    (OK + b"Content-Length: 12\r\n\r\nwhat is said", b"what is said"),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nwhat \r\n7;a=b\r\nis said\r\n0\r\n\r\n", b"what is said"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"X: y\r\n\r\nwhat is said", b"what is said"),
]


async def heard(pieces: list[bytes]) -> bytes:
    """What is made of these pieces, of which each is there before the next one comes."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    async def say() -> None:
        # Who has heard enough hangs up.
        with theirs, contextlib.suppress(BrokenPipeError):
            await asyncio.get_running_loop().sock_recv(theirs, 1000)
            for piece in pieces:
                theirs.sendall(piece)
                await asyncio.sleep(0)

    with Exchange(ServerConnection(ours), SilenceWatch(), SECONDS) as exchange:
        saying = asyncio.create_task(say())
        try:
            await exchange.ask(head(), None)
            return await everything(exchange)
        finally:
            await saying


def cut(text: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % len(text) for place in places)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 200), max_size=8))
def test_an_answer_may_come_in_any_pieces(answer: tuple[bytes, bytes], places: list[int]) -> None:
    text, body = answer

    assert asyncio.run(heard(cut(text, places))) == body


@given(
    st.sampled_from(ANSWERS),
    st.lists(st.integers(0, 200), max_size=4),
    st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3)), min_size=1, max_size=3),
)
def test_whatever_a_server_says_is_an_answer_or_none(
    answer: tuple[bytes, bytes], places: list[int], changes: list[tuple[int, bytes]]
) -> None:
    text, _ = answer
    for place, put in changes:
        at = place % len(text)
        text = text[:at] + put + text[at + 1 :]
    if text:
        with contextlib.suppress(ExchangeError):
            asyncio.run(heard(cut(text, places)))
