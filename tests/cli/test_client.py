"""What stands between `magictl` and the agent is said in one sentence that tells what to do."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from magi_agent.cli import client as client_module
from magi_agent.cli.address import SocketAddress, parse_url
from magi_agent.cli.client import Client, segment
from magi_agent.cli.exits import RefusedError, UnknownNameError, UnreachableError
from magi_agent.vocabulary import RESERVED_IDS
from tests.cli.conftest import Magictl
from tests.cli.stand_in import BreakOff, StandIn, error, standing_in
from tests.cli.terminal import as_nobody


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Have each connection to a port of its own served by ``serve``."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def test_nobody_at_the_port(magictl: Magictl, unused_ports: Callable[[], tuple[int, int]]) -> None:
    port = unused_ports()[0]

    told = magictl("models", "--url", f"127.0.0.1:{port}")

    assert told.status == 3
    assert told.err == (
        f"magictl: nobody listens at http://127.0.0.1:{port}; is the agent up? systemctl status magi-agent\n"
    )


def test_no_socket_a_dead_socket_and_no_socket_at_all(magictl: Magictl, tmp_path: Path) -> None:
    missing, dead, plain = tmp_path / "missing.sock", tmp_path / "dead.sock", tmp_path / "plain"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(dead))
    plain.touch()

    for path, said in ((missing, "there is no socket at"), (dead, "nobody listens at"), (plain, "nobody listens at")):
        told = magictl("status", "--socket", str(path))

        assert told.status == 3
        assert f"{said} {path}; is the agent up? systemctl status magi-agent" in told.err


def test_a_path_too_long_for_a_socket(magictl: Magictl) -> None:
    told = magictl("status", "--socket", "/tmp/" + "a" * 200)

    assert told.status == 3
    assert "AF_UNIX path too long" in told.err


def test_no_permission_names_the_group_and_the_command(open_folder: Path) -> None:
    path = open_folder / "api.sock"
    with standing_in(StandIn(), path):
        path.chmod(0o600)
        ended = as_nobody("status", "--socket", str(path))

    assert ended.returncode == 3
    assert f"no permission to use {path}; members of the group magi may (sudo usermod -aG magi" in ended.stderr


@pytest.mark.parametrize("words", [["models"], ["servers"], ["status"], ["check"], ["rescan"], ["start", "tiny-chat"]])
@pytest.mark.parametrize(
    "answer",
    [
        (404, b"<html>nginx</html>"),
        (404, {"detail": "Not Found"}),
        (404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}),
        (200, b"hello"),
        (200, b""),
        (302, b""),
        (500, b"Internal Server Error"),
        (200, b'{"models": NaN}'),
        (200, b"[" * 100_000),
    ],
)
def test_whoever_else_listens_there_is_not_taken_for_the_agent(
    agent: StandIn, magictl: Magictl, words: list[str], answer: tuple[int, object]
) -> None:
    agent.always(*answer)

    told = magictl(*words)

    assert told.status == 3
    assert told.out == ""
    assert f"what answers at {agent.url} is not the agent (HTTP {answer[0]}); name the agent's address" in told.err


@pytest.mark.parametrize("words", [["models"], ["servers"], ["status"], ["check"]])
@pytest.mark.parametrize("answer", [{}, [], None, "ok", 1])
def test_json_of_another_kind_is_not_taken_for_an_empty_list(
    agent: StandIn, magictl: Magictl, words: list[str], answer: object
) -> None:
    agent.always(200, answer)

    told = magictl(*words)

    assert told.status == 3
    assert "is not the agent" in told.err


def test_a_port_that_speaks_something_else(magictl: Magictl) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        connection.recv(1000)

    with listening(greet) as port:
        told = magictl("status", "--url", f"127.0.0.1:{port}")

    assert told.status == 3
    assert f"what answers at http://127.0.0.1:{port} speaks no HTTP" in told.err


def test_a_connection_that_is_closed_without_an_answer(agent: StandIn, magictl: Magictl) -> None:
    def close(method: str, path: str, right: object) -> tuple[int, object]:
        raise BreakOff

    agent.fault = close

    told = magictl("models")

    assert told.status == 3
    assert f"no answer from {agent.url}: " in told.err
    assert "is the agent up?" in told.err


def test_an_answer_that_breaks_off(agent: StandIn, magictl: Magictl) -> None:
    def cut(method: str, path: str, right: object) -> tuple[int, object]:
        raise BreakOff(in_body=True)

    agent.fault = cut

    told = magictl("models")

    assert told.status == 3
    assert f"the answer from {agent.url} broke off; did the agent stop just now?" in told.err


def test_an_answer_in_chunks_is_read_and_a_cut_one_is_not_taken_for_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = head + b'6\r\n{"a": \r\n3\r\n[1]\r\n1\r\n}\r\n0\r\n\r\n'

    def answer_with(content: bytes) -> Callable[[socket.socket], None]:
        def serve(connection: socket.socket) -> None:
            connection.recv(10_000)
            connection.sendall(content)

        return serve

    with listening(answer_with(whole)) as port:
        assert Client(parse_url(f"127.0.0.1:{port}")).get("/") == {"a": [1]}
    with listening(answer_with(whole[:-20])) as port, pytest.raises(UnreachableError, match="broke off"):
        Client(parse_url(f"127.0.0.1:{port}")).get("/")


def test_a_slow_answer_is_given_up_after_the_time_it_was_given(agent: StandIn) -> None:
    agent.hold("GET", "/registry")
    client = Client(parse_url(agent.url))
    begun = time.monotonic()

    with pytest.raises(UnreachableError, match=r"did not answer within 0\.3 s; see: journalctl -u magi-agent"):
        client.get("/api/models/registry", timeout=0.3)

    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_an_answer_that_trickles_is_given_up_too(header: bytes) -> None:
    def trickle(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + header + b"Content-Length: 1000\r\n\r\n")
        try:
            for _ in range(1000):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            return

    begun = time.monotonic()
    with listening(trickle) as port, pytest.raises(UnreachableError) as raised:
        Client(parse_url(f"127.0.0.1:{port}")).get("/", timeout=0.5)

    assert raised.value.details["reason"] == "timeout"
    assert time.monotonic() - begun < 20


def test_an_answer_without_end_is_not_read_for_ever(agent: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LARGEST_ANSWER", 100_000)
    agent.always(200, b"[" + b"0," * 100_000)

    with pytest.raises(UnreachableError, match="an answer of more than 100000 bytes"):
        Client(parse_url(agent.url)).get("/")


def test_a_certificate_nobody_vouches_for_is_no_question_of_groups(tmp_path: Path, magictl: Magictl) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate}",
        shell=True,
        check=True,
        capture_output=True,
        timeout=60,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def shake_hands(connection: socket.socket) -> None:
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            return

    with listening(shake_hands) as port:
        told = magictl("status", "--url", f"https://localhost:{port}")

    assert told.status == 3
    assert f"the certificate of https://localhost:{port} is not trusted: self-signed certificate" in told.err
    assert "SSL_CERT_FILE" in told.err


def test_https_where_plain_http_is_spoken(agent: StandIn, magictl: Magictl) -> None:
    told = magictl("status", "--url", agent.url.replace("http", "https"))

    assert told.status == 3
    assert "is it http:// after all?" in told.err


def test_below_a_prefix_every_path_has_it(agent: StandIn) -> None:
    with pytest.raises(RefusedError):
        Client(parse_url(f"{agent.url}/magi/")).get("/api/models/registry")

    assert agent.seen == [("GET", "/magi/api/models/registry")]


def test_an_error_of_the_agents_keeps_its_words(agent: StandIn, magictl: Magictl) -> None:
    agent.always(*error(503, "ServiceUnavailable", "systemd does not answer", service="x"))

    plain, as_json = magictl("servers"), magictl("servers", "--json")

    assert (plain.status, plain.err) == (1, "magictl: systemd does not answer\n")
    assert as_json.status == 1
    assert as_json.out == ""
    assert as_json.error == {
        "error": "ServiceUnavailable",
        "message": "systemd does not answer",
        "details": {"service": "x"},
    }


def test_only_a_404_that_names_a_model_or_a_profile_is_an_unknown_name(agent: StandIn) -> None:
    client = Client(parse_url(agent.url))

    with pytest.raises(UnknownNameError):
        client.get("/api/models/nobody")
    with pytest.raises(RefusedError) as raised:
        client.get("/api/nothing")

    assert not isinstance(raised.value, UnknownNameError)


def test_no_name_can_leave_its_segment_of_the_path(agent: StandIn, magictl: Magictl) -> None:
    assert [segment(name) for name in ("a/b", "..", "?x=1", "ü", "a b")] == [
        "a%2Fb", "%2E%2E", "%3Fx%3D1", "%C3%BC", "a%20b",
    ]  # fmt: skip
    told = magictl("start", "../registry", "\udcff")

    assert told.status == 4
    paths = [path for method, path in agent.seen if method == "POST"]
    assert sorted(paths) == [
        "/api/models/servers/%FF/start?wait=600",
        "/api/models/servers/..%2Fregistry/start?wait=600",
    ]


def test_a_client_on_a_socket_address_speaks_for_itself(tmp_path: Path) -> None:
    assert str(Client(SocketAddress(str(tmp_path / "x"))).address) == str(tmp_path / "x")


@pytest.mark.parametrize("name", [*sorted(RESERVED_IDS), ""])
@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["start"],
        ["stop"],
        ["restart"],
        ["enable"],
        ["disable", "--now"],
        ["settings"],
        ["tier", "fast"],
        ["thinking", "on"],
        ["port", "auto"],
    ],
    ids=lambda words: words[0],
)
def test_a_word_of_the_apis_own_paths_is_no_model(
    agent: StandIn, magictl: Magictl, words: list[str], name: str
) -> None:
    command, *rest = words

    told = magictl(command, name, *rest)

    assert told.status == 4
    assert told.err.startswith(f"magictl: no model has the id {name!r}; ")
    assert {path for _, path in agent.seen} <= {"/api/models/registry"}


@pytest.mark.parametrize("name", ["active", ""])
@pytest.mark.parametrize("command", ["show", "activate", "edit", "delete"])
def test_a_word_of_the_apis_own_paths_is_no_profile(agent: StandIn, magictl: Magictl, command: str, name: str) -> None:
    told = magictl("profile", command, name)

    assert told.status == 4
    assert told.err.startswith("magictl: no profile is ")
    assert "magictl profile list" in told.err
    assert {path for _, path in agent.seen} <= {"/api/models/profiles/active"}
