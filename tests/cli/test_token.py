"""`magictl token …`: made, listed and taken back in the file itself; and the token that `magictl` sends."""

from __future__ import annotations

import fcntl
import grp
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from magi_agent import token_file
from magi_agent.tokens import digest_of, new_secret, parse_tokens
from magi_agent.vocabulary import TokenScope
from tests.agent_process import AgentProcess, ended
from tests.cli.conftest import Magictl
from tests.cli.terminal import MAGICTL, piped, surroundings
from tests.conftest import PortRanges, SystemdUser

SECRET = re.compile(r"magi_[A-Za-z0-9_-]{43}\n")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the configuration has the tokens; no such file is there yet."""
    config = tmp_path / "agent.toml"
    found = tmp_path / "etc" / "tokens"
    config.write_text(f'[api]\ntokens_path = "{found}"\n')
    monkeypatch.setenv("MAGI_CONFIG", str(config))
    return found


def test_a_token_is_printed_once_and_its_hash_kept(magictl: Magictl, path: Path) -> None:
    made = magictl("token", "add", "front-end", "--scope", "read")

    assert made.status == 0
    assert SECRET.fullmatch(made.out)
    assert made.err == (
        f"✓ front-end (read) is in {path}; the token itself is shown this once\n"
        "to have the agent go by it: systemctl reload magi-agent\n"
    )
    [token] = parse_tokens(path.read_text(), path)
    assert (token.name, token.scope, token.until) == ("front-end", TokenScope.READ, None)
    assert token.digest == digest_of(made.out.strip())
    assert made.out.strip() not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [found.name for found in path.parent.iterdir()] == ["tokens"]


def test_every_token_is_another_and_what_stands_between_stays(magictl: Magictl, path: Path) -> None:
    path.parent.mkdir()
    remarks = "# for the front end,\r\n#   until it has one of its own\n\n"
    path.write_text(f"{remarks}old  admin\tsha256:{'0f' * 32}   # no")
    assert magictl("token", "add", "new", "--scope", "read").err.startswith("magictl: ")
    path.write_text(f"{remarks}old  admin\tsha256:{'0f' * 32}")

    first, second = (magictl("token", "add", name, "--scope", "infer").out for name in ("one", "two"))

    assert first != second
    lines = path.read_bytes().decode().split("\n")
    assert "\n".join(lines[:4]) == f"{remarks}old  admin\tsha256:{'0f' * 32}"
    assert [line.split()[:2] for line in lines[4:-1]] == [["one", "infer"], ["two", "infer"]]
    assert magictl("token", "revoke", "old").status == 0
    assert path.read_bytes().startswith(f"{remarks}one infer ".encode())


def test_what_a_killed_magictl_left_half_written_is_cleared_away(magictl: Magictl, path: Path) -> None:
    path.parent.mkdir()
    for verb in (("add", "front", "--scope", "read"), ("revoke", "front")):
        (path.parent / ".tokens.x1y2.tmp").write_text("half")
        assert magictl("token", *verb).status == 0
        assert [found.name for found in path.parent.iterdir()] == ["tokens"]


def test_as_json(magictl: Magictl, path: Path) -> None:
    made = magictl("token", "add", "ops", "--scope", "admin", "--until", "2999-01-31", "--json")
    magictl("token", "add", "front", "--scope", "read")

    assert made.err == ""
    end = "2999-02-01T00:00:00Z"
    ops = {"name": "ops", "scope": "admin", "until": end, "rate": None, "ended": False, "understood": True}
    assert made.json == {**ops, "token": made.json["token"], "path": str(path)}
    assert SECRET.fullmatch(made.json["token"] + "\n")
    front = {"name": "front", "scope": "read", "until": None, "rate": None, "ended": False, "understood": True}
    assert magictl("token", "list", "--json").json == {"path": str(path), "tokens": [ops, front]}
    assert magictl("token", "revoke", "ops", "--json").json == {**ops, "path": str(path)}
    assert magictl("token", "list", "--json").json["tokens"] == [front]


def test_a_rate_is_given_changed_and_taken_away_and_the_token_stays(magictl: Magictl, path: Path) -> None:
    remark = "# for the lab\n"
    path.parent.mkdir()
    path.write_text(remark)
    secret = magictl("token", "add", "laptop", "--scope", "infer", "--until", "2999-01-31", "--rate", "60").out.strip()
    rates = [parse_tokens(path.read_text(), path).find(secret)]

    for word in ("7", "none"):
        assert magictl("token", "rate", "laptop", word).status == 0
        rates.append(parse_tokens(path.read_text(), path).find(secret))

    assert [token and token.rate for token in rates] == [60, 7, None]
    assert path.read_text().startswith(remark)
    assert magictl("token", "rate", "other", "7").err.startswith("magictl: no token is called other")
    for word in ("0", "1000001", "many", "-1", "٣"):
        assert magictl("token", "rate", "laptop", "--", word).status == 2


def test_the_list_says_what_lets_nobody_in(magictl: Magictl, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(f"newer infer sha256:{'0f' * 32} hosts=10.0.0.0/8\n")

    assert "lets nobody in" in magictl("token", "list").out
    assert [token["understood"] for token in magictl("token", "list", "--json").json["tokens"]] == [False]
    assert magictl("token", "add", "newer", "--scope", "read").err.startswith("magictl: there is a token called newer")


def test_the_list_says_what_has_ended(magictl: Magictl, path: Path) -> None:
    assert magictl("token", "list").err == (
        f"magictl: there are no tokens in {path}; make one: magictl token add NAME --scope read\n".removeprefix(
            "magictl: "
        )
    )
    path.parent.mkdir()
    path.write_text(
        f"front read sha256:{'0f' * 32}\nold admin sha256:{'ab' * 32} 2020-01-31T00:00:00Z\n"
        f"brief infer sha256:{'cd' * 32} 2999-01-31T12:30:00Z rate=60\n"
    )

    told = magictl("token", "list")

    assert told.out == (
        "TOKEN  SCOPE  RATE  UNTIL\n"
        "front  read      -  -\n"
        "old    admin     -  2020-01-31T00:00:00Z (past)\n"
        "brief  infer    60  2999-01-31T12:30:00Z\n"
    )
    assert "sha256" not in told.out


@pytest.mark.parametrize(
    ("until", "end"),
    [
        ("2999-01-31", "2999-02-01T00:00:00Z"),
        ("2999-12-31", "3000-01-01T00:00:00Z"),
        ("2999-01-31T18:00", "2999-01-31T18:00:00Z"),
        ("2999-01-31T18:00Z", "2999-01-31T18:00:00Z"),
        ("2999-01-31T18:00:30+05:30", "2999-01-31T12:30:30Z"),
        ("2999-01-31 18:00:00.9", "2999-01-31T18:00:00Z"),
    ],
)
def test_an_end_is_a_day_or_a_time(magictl: Magictl, path: Path, until: str, end: str) -> None:
    assert magictl("token", "add", "x", "--scope", "read", "--until", until, "--json").json["until"] == end


@pytest.mark.parametrize(
    "words",
    [
        ["add", "x"],
        ["add", "--scope", "read"],
        ["add", "x", "--scope", "write"],
        ["add", "a b", "--scope", "read"],
        ["add", "-x", "--scope", "read"],
        ["add", "", "--scope", "read"],
        ["add", "x" * 65, "--scope", "read"],
        ["add", "magi_x", "--scope", "read"],
        ["add", "x", "--scope", "read", "--until", "tomorrow"],
        ["add", "x", "--scope", "read", "--until", "2999-02-30"],
        ["add", "x", "--scope", "read", "--until", "9999-12-31"],
        ["add", "x", "--scope", "read", "--until", "2020-01-01"],
        ["add", "x", "--scope", "read", "--until", ""],
        ["revoke"],
        ["nonsense"],
    ],
)
def test_wrong_usage_changes_nothing(magictl: Magictl, path: Path, words: list[str]) -> None:
    told = magictl("token", *words)

    assert (told.status, told.out) == (2, "")
    assert not path.parent.exists()


def test_what_cannot_be_done_says_what_to_do(magictl: Magictl, path: Path) -> None:
    assert magictl("token", "add", "x", "--scope", "read").status == 0
    before = path.read_bytes()
    for words, said in (
        (["add", "x", "--scope", "admin"], "there is a token called x already; give this one another name, or first: "),
        (["revoke", "y"], "no token is called y; the names are in: magictl token list"),
        (["revoke", "../y"], "no token is called ../y; "),
    ):
        told = magictl("token", *words)
        assert (told.status, told.out) == (1, "")
        assert told.err.startswith(f"magictl: {said}")
    assert path.read_bytes() == before
    assert magictl("token", "revoke", "y", "--json").error["error"] == "TokenNotFound"
    assert magictl("token", "add", "x", "--scope", "read", "--json").error["error"] == "TokenExists"


def test_taking_back_where_there_is_nothing_makes_nothing(magictl: Magictl, path: Path) -> None:
    assert magictl("token", "revoke", "x").status == 1
    assert not path.parent.exists()


@pytest.mark.parametrize("words", [["add", "x", "--scope", "read"], ["list"], ["revoke", "x"]])
def test_a_file_that_is_no_good_is_left_alone(magictl: Magictl, path: Path, words: list[str]) -> None:
    path.parent.mkdir()
    secret = new_secret()
    path.write_text(f"x read {secret}\n")

    told = magictl("token", *words)

    assert told.status == 1
    assert told.err.startswith(f"magictl: {path}:1: the hash of x wants sha256:")
    assert secret not in told.err
    assert path.read_text() == f"x read {secret}\n"


def test_a_bad_configuration_does_not_say_where_the_tokens_are(magictl: Magictl, path: Path, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text("[api]\ntoken_path = 1\n")

    told = magictl("token", "list")

    assert told.status == 1
    assert "agent.toml:2: api.token_path: unknown key" in told.err
    assert "--tokens-path" in told.err
    assert magictl("token", "add", "x", "--scope", "read", "--tokens-path", str(tmp_path / "mine")).status == 0
    assert (tmp_path / "mine").exists()


def test_there_is_a_most(magictl: Magictl, path: Path) -> None:
    path.parent.mkdir()
    path.write_text("".join(f"t{number} read sha256:{number:064x}\n" for number in range(256)))

    told = magictl("token", "add", "x", "--scope", "read")

    assert told.status == 1
    assert "holds 256 tokens, which is the most; revoke one first" in told.err


def test_owner_group_and_link_stay(magictl: Magictl, path: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "tokens"
    real.parent.mkdir()
    real.write_text("")
    os.chown(real, 33, 34)
    real.chmod(0o666)
    path.parent.mkdir()
    path.symlink_to(real)

    assert magictl("token", "add", "x", "--scope", "read").status == 0

    assert path.is_symlink()
    found = real.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (33, 34, 0o640)


def test_a_new_file_is_for_root_and_the_agents_group(
    magictl: Magictl, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A group that every host has stands in for the one that the package makes.
    monkeypatch.setattr(token_file, "AGENT_GROUP", "games")

    assert magictl("token", "add", "x", "--scope", "read").status == 0
    assert (path.stat().st_uid, path.stat().st_gid) == (0, grp.getgrnam("games").gr_gid)
    os.chown(path, 0, 0)
    assert magictl("token", "revoke", "x").status == 0
    assert (path.stat().st_uid, path.stat().st_gid) == (0, grp.getgrnam("games").gr_gid)


AS_NOBODY = """
import os, sys
from magi_agent.cli import token, token_commands
from magi_agent.cli.magictl import main
os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))
"""


def as_nobody(*words: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `magictl` as a user with no rights at all, once."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *words],
        capture_output=True, text=True, env=dict(environment), timeout=60, check=False,
    )  # fmt: skip


def test_other_users_are_told_to_be_root(path: Path, open_folder: Path) -> None:
    tokens = open_folder / "tokens"
    environment = surroundings(MAGI_TOKENS_PATH=str(tokens), MAGI_CONFIG="/dev/null")

    added = as_nobody("token", "add", "x", "--scope", "read", environment=environment)
    assert (added.returncode, added.stdout) == (1, "")
    assert added.stderr == (f"magictl: no permission for {tokens}; as root: sudo magictl token add x --scope read\n")
    tokens.write_text(f"x read sha256:{'0f' * 32}\n")
    tokens.chmod(0o640)
    for words in (["list"], ["revoke", "x"]):
        told = as_nobody("token", *words, environment=environment)
        assert told.returncode == 1
        assert told.stderr == (
            f"magictl: no permission to read the file of tokens; as root: sudo magictl token {' '.join(words)}\n"
        )


def test_many_at_once_lose_none(path: Path) -> None:
    running = [
        subprocess.Popen(
            [MAGICTL, "token", "add", f"t{number}", "--scope", "read"],
            env=surroundings(MAGI_CONFIG=os.environ["MAGI_CONFIG"]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in range(8)
    ]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said

    assert {token.name for token in parse_tokens(path.read_text(), path)} == {f"t{number}" for number in range(8)}


def test_who_keeps_the_file_locked_is_waited_for_and_not_for_ever(
    magictl: Magictl, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_file, "_PATIENCE", 0.2)
    path.parent.mkdir()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        told = magictl("token", "add", "x", "--scope", "read")
    finally:
        os.close(folder)

    assert told.status == 1
    assert "another program keeps" in told.err
    assert magictl("token", "add", "x", "--scope", "read").status == 0


@contextmanager
def recording(path: Path | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """Something that answers as an agent would: where it is, and the Authorization of each request."""
    seen: list[str | None] = []
    listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    listener.bind(str(path) if path else ("127.0.0.1", 0))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                lines.readline()
                seen.append(http.client.parse_headers(lines)["Authorization"])
                content = b'{"models": {}, "portRange": [1, 2]}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield (str(path) if path else f"http://127.0.0.1:{listener.getsockname()[1]}"), seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def test_magictl_sends_the_token_of_a_file(magictl: Magictl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = new_secret(), new_secret()
    (tmp_path / "one").write_text(f"{one}\n")
    (tmp_path / "other").write_text(f"  {other}")
    with recording() as (url, seen), recording(tmp_path / "s") as (path, seen_on_socket):
        magictl("port-range", "--url", url)
        magictl("port-range", "--url", url, "--token-file", str(tmp_path / "one"))
        magictl("--token-file", str(tmp_path / "other"), "port-range", "--url", url)
        monkeypatch.setenv("MAGI_TOKEN_FILE", str(tmp_path / "one"))
        magictl("port-range", "--url", url)
        magictl("port-range", "--url", url, "--token-file", str(tmp_path / "other"))
        magictl("port-range", "--socket", path)
        magictl("port-range", "--socket", path, "--token-file", str(tmp_path / "other"))
        monkeypatch.setenv("MAGI_SOCKET", path)
        magictl("port-range")
        monkeypatch.setenv("MAGI_URL", url)
        magictl("port-range")

    assert seen == [None, *(f"Bearer {secret}" for secret in (one, other, one, other, one))]
    assert seen_on_socket == [None, f"Bearer {other}", None]


@pytest.mark.parametrize("content", ["", "\n", "two tokens", "one\ntwo\n", "magi_\x00", "x" * 5000, "\xe4\xf6"])
def test_a_file_that_holds_no_token_is_refused_before_anything_is_sent(
    magictl: Magictl, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content.encode("latin-1"))
    with recording() as (url, seen):
        told = magictl("models", "--url", url, "--token-file", str(file))

    assert told.status == 2
    assert told.err.startswith(f"magictl: the token file {file} must hold one token and nothing else")
    assert not content.strip() or content.strip() not in told.err
    assert seen == []


def test_a_token_file_that_is_not_there_is_named(magictl: Magictl, tmp_path: Path) -> None:
    told = magictl("models", "--url", "127.0.0.1:1", "--token-file", str(tmp_path / "none"))

    assert told.status == 2
    assert told.err.startswith(f"magictl: the token file {tmp_path / 'none'} cannot be read: No such file")


@pytest.fixture
def agent(
    systemd_user: SystemdUser, tmp_path: Path, unused_ports: PortRanges, llama_server: Path
) -> Iterator[AgentProcess]:
    """A real agent, which lets nobody in over TCP without a token."""
    (tmp_path / "models").mkdir()
    agent = AgentProcess(tmp_path, tmp_path / "models", unused_ports(2), llama_server)
    agent.settings |= {
        "MAGI_TCP": f"127.0.0.1:{unused_ports()[0]}",
        "MAGI_TCP_ACCESS": "none",
        "MAGI_SYSTEMD_SCOPE": "user",
        "MAGI_JOURNAL_DIRECTORY": str(systemd_user.journal),
    }
    with ended(agent, "magi-llama-token-*"):
        yield agent


def test_a_token_that_was_made_lets_in_and_one_that_was_taken_back_does_not(agent: AgentProcess) -> None:
    environment = surroundings(
        MAGI_TOKENS_PATH=str(agent.folder / "tokens"),
        MAGI_SYSTEMD_SCOPE="user",
        MAGI_URL=f"http://{agent.settings['MAGI_TCP']}",
        MAGI_CONFIG="/dev/null",
    )
    made = piped("token", "add", "laptop", "--scope", "read", environment=environment)
    secret = agent.folder / "secret"
    secret.write_text(made.stdout)
    environment["MAGI_TOKEN_FILE"] = str(secret)
    agent.start()

    assert "systemctl --user reload magi-agent" in made.stderr
    assert json.loads(piped("models", "--json", environment=environment).stdout)["models"] == {}
    refused = piped("rescan", environment=environment)
    assert refused.returncode == 1
    assert refused.stderr == "magictl: this needs admin access: the token laptop has the scope read\n"
    without = piped("models", environment={**environment, "MAGI_TOKEN_FILE": ""})
    assert without.returncode == 1
    assert "--token-file" in without.stderr

    taken = piped("token", "revoke", "laptop", environment=environment)
    assert "it holds until the agent reads the file again" in taken.stderr
    assert piped("models", environment=environment).returncode == 0
    agent.stop()
    agent.start()
    told = piped("models", environment=environment)
    assert told.returncode == 1
    assert "the token is not known here" in told.stderr


def test_the_check_of_the_service_shows_the_tokens_and_no_secret(
    magictl: Magictl, path: Path, open_folder: Path
) -> None:
    def check(**more: str) -> subprocess.CompletedProcess[str]:
        environment = surroundings(MAGI_CONFIG=os.environ["MAGI_CONFIG"], **more)
        program = MAGICTL.parent / "magi-agent"
        return subprocess.run(
            [program, "--check"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    assert f"tokens: {path}: it is not there\n" in check().stdout
    made = magictl("token", "add", "front", "--scope", "read", "--until", "2999-01-31")
    yesterday = (datetime.now(UTC) - timedelta(days=1)).replace(microsecond=0)
    with path.open("a") as file:
        file.write(f"old admin sha256:{'ab' * 32} {yesterday.isoformat()}\n")
    shown = check()
    assert shown.returncode == 0
    assert f"tokens: {path}: it holds 2, of which 1 have ended\n" in shown.stdout
    assert "\n  front (read, until 2999-02-01T00:00:00Z)\n" in shown.stdout
    assert re.search(r"^  old \(admin, until \S+Z\), which is past$", shown.stdout, re.MULTILINE)
    assert made.out.strip() not in shown.stdout
    assert "sha256" not in shown.stdout
    path.chmod(0o644)
    assert "every user of this host may read it" in check().stdout
    with path.open("a") as file:
        file.write(f"newer read sha256:{'cd' * 32} hosts=10.0.0.0/8\n")
    shown = check()
    assert "\n  newer (read, with a key that is not known here)\n" in shown.stdout
    assert "lets nobody in" in shown.stdout
    assert "10.0.0.0" not in shown.stdout
    path.write_text("front read\n")
    refused = check()
    assert (refused.returncode, refused.stdout) == (78, "")
    assert refused.stderr.startswith(f"magi-agent: {path}:1: wants a name, a scope")
    path.write_text("")
    path.chmod(0o640)
    refused = check(MAGI_TCP="0.0.0.0:8000")
    assert refused.returncode == 78
    assert "0.0.0.0:8000 can be reached from other hosts, which needs a token" in refused.stderr
